"""A TLOB-style net for order-book windows: attention over the steps of a window, then over its features, by turns.

Berti and Kasneci, TLOB: A Novel Transformer Model with Dual Attention for Price Trend Prediction with Limit Order Book
Data, 2025 (arXiv:2502.15757); positions and scaled attention as in Vaswani et al., Attention Is All You Need, 2017.
Their bilinear normalisation of each window is left out: the scaler in the graph is the training rows', so that a calm
window still looks calm. Letters: B rows, T steps of a window (oldest first), F features, H hidden units, N tokens of W
numbers each.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from models.net import Net
from tickserve.errors import ArtifactError
from tickserve.manifest import CLASSES

# A block's inner layer is so many times wider than its tokens; the last maps shrink each side of [T, H] as much.
WIDER = SMALLER = 4


class TlobClassifier(Net):
    """`[B, T, F]` float32 windows to `[B, 3]` probabilities (down, flat, up).

    A layer is two blocks: tokens are steps of H numbers (`heads` heads), then hidden features of T numbers (one head).
    Raises ArtifactError when the heads do not divide the hidden units.
    """

    kind = "tlob"
    sizes = {"features": 10_000, "window": 2_048, "hidden": 2_048, "heads": 64, "layers": 32}  # noqa: RUF012

    def __init__(self, features: int, window: int, hidden: int, heads: int, layers: int) -> None:
        super().__init__(features)
        if hidden % heads:
            expected = f"a divisor of hidden ({hidden})"
            raise ArtifactError("bad size", field="architecture.heads", expected=expected, was=str(heads))
        self.window, self.hidden, self.heads, self.layers = window, hidden, heads, layers
        self.embedding = nn.Linear(features, hidden)
        self.register_buffer("position", positions(window, hidden), persistent=False)
        self.steps = nn.ModuleList(AttentionBlock(hidden, heads) for _ in range(layers))
        self.columns = nn.ModuleList(AttentionBlock(window, 1) for _ in range(layers))
        few_units, few_steps = max(1, hidden // SMALLER), max(1, window // SMALLER)
        self.fewer_units, self.fewer_steps = nn.Linear(hidden, few_units), nn.Linear(window, few_steps)
        self.head = nn.Linear(few_units * few_steps, len(CLASSES))

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """`[B, T, F]` to unnormalised `[B, 3]`."""
        tokens = self.embedding(self.scaled(rows)) + self.position  # [B, T, H]
        for over_steps, over_columns in zip(self.steps, self.columns, strict=True):
            tokens = over_steps(tokens)
            tokens = over_columns(tokens.transpose(1, 2)).transpose(1, 2)
        tokens = nn.functional.gelu(self.fewer_units(tokens)).transpose(1, 2)  # [B, H / 4, T]
        tokens = nn.functional.gelu(self.fewer_steps(tokens))  # [B, H / 4, T / 4]
        answer: torch.Tensor = self.head(tokens.flatten(1))
        return answer


def positions(steps: int, width: int) -> torch.Tensor:
    """Sinusoids of the step's number, float32 [T, H]: sines in even columns, cosines in odd ones."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))  # [ceil(H / 2)]
    angles = torch.arange(steps)[:, None] * rates
    return torch.stack([torch.sin(angles), torch.cos(angles)], dim=-1).flatten(1)[:, :width]


class AttentionBlock(nn.Module):
    """Self-attention and a two-layer net on each token, each beside a way around it: `[B, N, W]` to `[B, N, W]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.before_attention, self.before_mixing = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixing = nn.Sequential(nn.Linear(width, WIDER * width), nn.GELU(), nn.Linear(WIDER * width, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B, N, W]` to `[B, N, W]`."""
        tokens = tokens + self.attention(self.before_attention(tokens))
        mixed: torch.Tensor = tokens + self.mixing(self.before_mixing(tokens))
        return mixed


class SelfAttention(nn.Module):
    """Scaled dot-product attention of every token to all of its window: `[B, N, W]` to `[B, N, W]`.

    Written out rather than torch's fused call, so that the graph is the same few operators whatever torch fuses.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.asked = nn.Linear(width, 3 * width)
        self.answered = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B, N, W]` to `[B, N, W]`."""
        apart = (part.unflatten(-1, (self.heads, self.size)) for part in self.asked(tokens).chunk(3, dim=-1))
        queries, keys, values = (part.transpose(1, 2) for part in apart)  # each [B, heads, N, size]
        weights = torch.softmax(queries @ keys.transpose(-1, -2) / math.sqrt(self.size), dim=-1)
        answer: torch.Tensor = self.answered((weights @ values).transpose(1, 2).flatten(-2))
        return answer

"""A DeepLOB-style net for order-book windows: convolutions over levels and time, an inception module, an LSTM.

Zhang, Zohren and Roberts, DeepLOB: Deep Convolutional Neural Networks for Limit Order Books, IEEE Transactions on
Signal Processing 67(11), 2019. Letters: B rows, T steps of a window (oldest first), F features, L levels, C channels,
H hidden units.

The paper reads 40 raw columns: price and size of both sides at ten levels. Its first two convolutions join price with
size and bid with ask. Here the feature engine has done both, with one column a level: `level_imbalance_1 .. _L`. What
is left to convolve is neighbouring levels, then all of them, with convolutions over time in between, as in the paper.
The other columns (flow, volatility, returns, clocks) have no order that a convolution could use: each step's are mixed
by one linear layer and join the levels before the LSTM. The paper's batch normalisation is left out: the scaler in the
graph does its work at the input, and no running statistics of training batches are served.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import leaky_relu, pad

from models.net import Net
from tickserve.errors import ArtifactError, ConfigError
from tickserve.manifest import CLASSES

LEVEL = re.compile(r"level_imbalance_([0-9]+)")
MIN_LEVELS = 2
# Of LeakyReLU, and the steps that a convolution over time spans: the paper's.
SLOPE = 0.01
SPAN = 4


class DeepLobClassifier(Net):
    """`[B, T, F]` float32 windows to `[B, 3]` probabilities (down, flat, up).

    The levels are the `levels` columns up to column number `levels_end`, best level first. Raises ArtifactError when
    the row has fewer columns.
    """

    kind = "deeplob"
    sizes = {  # noqa: RUF012 - typed by Net
        "features": 10_000,
        "window": 10_000,
        "levels": 1_000,
        "levels_end": 10_000,
        "channels": 1_024,
        "hidden": 4_096,
    }

    def __init__(self, features: int, window: int, levels: int, levels_end: int, channels: int, hidden: int) -> None:
        super().__init__(features)
        if not MIN_LEVELS <= levels <= levels_end <= features:
            expected = f"{MIN_LEVELS} <= levels <= levels_end <= features ({features})"
            raise ArtifactError("no such columns", field="architecture.levels", expected=expected, was=str(levels))
        self.window, self.levels, self.levels_end = window, levels, levels_end
        self.channels, self.hidden = channels, hidden
        neighbours = LevelBlock(1, channels, MIN_LEVELS)
        together = LevelBlock(channels, channels, levels - MIN_LEVELS + 1)
        self.blocks = nn.ModuleList([neighbours, together])
        self.inception = Inception(channels)
        others = features - levels
        self.context = nn.Linear(others, channels) if others else None
        self.lstm = nn.LSTM(channels * (3 + bool(others)), hidden, batch_first=True)
        self.head = nn.Linear(hidden, len(CLASSES))

    @classmethod
    def column_sizes(cls, columns: Sequence[str]) -> dict[str, int]:
        """`features`, and where the levels are. Raises ConfigError without two neighbouring levels in order."""
        places = [place for place, name in enumerate(columns) if LEVEL.fullmatch(name)]
        numbers = [int(match[1]) for match in map(LEVEL.fullmatch, columns) if match]
        in_order = places == list(range(places[0], places[0] + len(places))) if places else False
        if len(places) < MIN_LEVELS or not in_order or numbers != list(range(1, len(numbers) + 1)):
            expected = f"columns level_imbalance_1 to _{MIN_LEVELS} or more, side by side"
            was = ", ".join(columns[place] for place in places[:4]) or "none"
            raise ConfigError("no levels to convolve", field="deeplob", expected=expected, was=was)
        return super().column_sizes(columns) | {"levels": len(places), "levels_end": places[-1] + 1}

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """`[B, T, F]` to unnormalised `[B, 3]`."""
        scaled = self.scaled(rows)
        first = self.levels_end - self.levels
        book = scaled[:, None, :, first : self.levels_end]  # [B, 1, T, L]
        for block in self.blocks:
            book = block(book)  # [B, C, T, L - 1], then [B, C, T, 1]
        steps = self.inception(book[..., 0]).transpose(1, 2)  # [B, T, 3 C]
        if self.context is not None:
            others = torch.cat([scaled[..., :first], scaled[..., self.levels_end :]], dim=-1)
            steps = torch.cat([steps, leaky_relu(self.context(others), SLOPE)], dim=-1)  # [B, T, 4 C]
        hidden, _ = self.lstm(steps)
        answer: torch.Tensor = self.head(hidden[:, -1])
        return answer


class LevelBlock(nn.Module):
    """A convolution over `span` neighbouring levels, then two over the last steps: `[B, K, T, L]` to `[B, C, T, M]`."""

    def __init__(self, inputs: int, channels: int, span: int) -> None:
        super().__init__()
        self.levels = nn.Conv2d(inputs, channels, (1, span))
        self.steps = nn.ModuleList(nn.Conv2d(channels, channels, (SPAN, 1)) for _ in range(2))

    def forward(self, book: torch.Tensor) -> torch.Tensor:
        """`[B, K, T, L]` to `[B, C, T, M]`, M = L - span + 1."""
        book = leaky_relu(self.levels(book), SLOPE)
        for convolution in self.steps:
            book = leaky_relu(convolution(pad(book, (0, 0, SPAN - 1, 0))), SLOPE)
        return book


class Inception(nn.Module):
    """What the last steps say at three time scales, side by side: `[B, C, T]` to `[B, 3 C, T]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.entries = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(3))
        self.short = nn.Conv1d(channels, channels, 3, padding=1)
        self.long = nn.Conv1d(channels, channels, 5, padding=2)
        self.largest = nn.MaxPool1d(3, stride=1, padding=1)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        """`[B, C, T]` to `[B, 3 C, T]`."""
        short, long = (leaky_relu(entry(steps), SLOPE) for entry in self.entries[:2])
        pooled = self.entries[2](self.largest(steps))
        return leaky_relu(torch.cat([self.short(short), self.long(long), pooled], dim=1), SLOPE)

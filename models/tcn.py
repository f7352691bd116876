"""A temporal convolutional net: dilated causal convolutions in residual blocks, of which the last step answers.

Bai, Kolter and Koltun, An Empirical Evaluation of Generic Convolutional and Recurrent Networks for Sequence Modeling,
2018 (arXiv:1803.01271). Their weight normalisation and dropout are left out: weights are as they are stored, and
training stops early instead. Letters: B rows, T steps of a window (oldest first), F features, C channels.
"""

from __future__ import annotations

import torch
from torch import nn

from models.net import Net
from tickserve.config import tcn_reach
from tickserve.errors import ArtifactError
from tickserve.manifest import CLASSES


class TcnClassifier(Net):
    """`[B, T, F]` float32 windows to `[B, 3]` probabilities (down, flat, up).

    Block i convolves with dilation 2**i, so the answer looks back over `tcn_reach(kernel, layers)` steps; a window
    longer than that holds rows that nothing reads, and is refused.
    """

    kind = "tcn"
    sizes = {"features": 10_000, "window": 10_000, "channels": 4_096, "kernel": 64, "layers": 16}  # noqa: RUF012

    def __init__(self, features: int, window: int, channels: int, kernel: int, layers: int) -> None:
        super().__init__(features)
        reach = tcn_reach(kernel, layers)
        if window > reach:
            expected = f"at most the {reach} rows that kernel {kernel} and {layers} layers reach back"
            field, was = "architecture.window", str(window)
            raise ArtifactError("rows that nothing reads", field=field, expected=expected, was=was)
        self.window, self.channels, self.kernel, self.layers = window, channels, kernel, layers
        widths = [features, *[channels] * (layers - 1)]
        blocks = (ResidualBlock(width, channels, kernel, 2**place) for place, width in enumerate(widths))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(channels, len(CLASSES))

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """`[B, T, F]` to unnormalised `[B, 3]`."""
        steps = self.scaled(rows).transpose(1, 2)  # [B, F, T]
        for block in self.blocks:
            steps = block(steps)  # [B, C, T]
        answer: torch.Tensor = self.head(steps[:, :, -1])
        return answer


class ResidualBlock(nn.Module):
    """Two dilated causal convolutions and a way around them: `[B, K, T]` to `[B, C, T]`."""

    def __init__(self, inputs: int, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        # Zeros before the first step, which after scaling is the training mean: step t sees steps up to t only.
        self.past = (kernel - 1) * dilation
        self.first = nn.Conv1d(inputs, channels, kernel, dilation=dilation)
        self.second = nn.Conv1d(channels, channels, kernel, dilation=dilation)
        self.around = nn.Identity() if inputs == channels else nn.Conv1d(inputs, channels, 1)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        """`[B, K, T]` to `[B, C, T]`."""
        inner = torch.relu(self.first(nn.functional.pad(steps, (self.past, 0))))
        inner = torch.relu(self.second(nn.functional.pad(inner, (self.past, 0))))
        return torch.relu(inner + self.around(steps))

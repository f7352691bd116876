"""An LSTM that reads raw feature windows and answers class probabilities.

Hochreiter and Schmidhuber, Long Short-Term Memory, Neural Computation 9(8), 1997.
Letters: B rows, T steps of a window (oldest first), F features, H hidden units.
"""

from __future__ import annotations

import torch
from torch import nn

from models.net import Net
from tickserve.manifest import CLASSES


class LstmClassifier(Net):
    """`[B, T, F]` float32 windows to `[B, 3]` probabilities (down, flat, up)."""

    kind = "lstm"
    sizes = {"features": 10_000, "window": 10_000, "hidden": 8_192, "layers": 32}  # noqa: RUF012 - typed by Net

    def __init__(self, features: int, window: int, hidden: int, layers: int) -> None:
        super().__init__(features)
        self.window, self.hidden, self.layers = window, hidden, layers
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, len(CLASSES))

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """`[B, T, F]` to unnormalised `[B, 3]`: what cross-entropy is taken of."""
        steps, _ = self.lstm(self.scaled(rows))  # [B, T, H]
        answer: torch.Tensor = self.head(steps[:, -1])
        return answer

"""A feed-forward net on one feature row: the smallest net there is, and what trees are distilled into.

Hendrycks and Gimpel, Gaussian Error Linear Units, 2016 (arXiv:1606.08415); Ba, Kiros and Hinton, Layer Normalization,
2016 (arXiv:1607.06450). Letters: B rows, F features, H hidden units.
"""

from __future__ import annotations

import torch
from torch import nn

from models.net import Net
from tickserve.manifest import CLASSES

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class MlpClassifier(Net):
    """`[B, F]` float32 rows to `[B, 3]` probabilities (down, flat, up).

    `norm = "layer"` normalises each row's hidden units over themselves, so a row never sees its batch.
    """

    kind = "mlp"
    sizes = {"features": 10_000, "hidden": 8_192, "layers": 32}  # noqa: RUF012 - typed by Net
    choices = {"activation": tuple(ACTIVATIONS), "norm": ("none", "layer")}  # noqa: RUF012 - typed by Net

    def __init__(self, features: int, hidden: int, layers: int, activation: str, norm: str) -> None:
        super().__init__(features)
        self.hidden, self.layers, self.activation, self.norm = hidden, layers, activation, norm
        widths = [features, *[hidden] * (layers - 1)]
        self.blocks = nn.ModuleList(_block(width, hidden, activation, norm) for width in widths)
        self.head = nn.Linear(hidden, len(CLASSES))

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """`[B, F]` to unnormalised `[B, 3]`."""
        units = self.scaled(rows)
        for block in self.blocks:
            units = block(units)  # [B, H]
        answer: torch.Tensor = self.head(units)
        return answer


def _block(width: int, hidden: int, activation: str, norm: str) -> nn.Sequential:
    between = [nn.LayerNorm(hidden)] if norm == "layer" else []
    return nn.Sequential(nn.Linear(width, hidden), *between, ACTIVATIONS[activation]())

"""Nets for the trainer's tests that no family has: linear layers only, in blocks, with dropout between them."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from models.net import Net
from models.registry import NETS
from tickserve.config import NetSettings, TrainerSettings
from training.examples import Examples
from training.nets import NetJob

Drawn = TypeVar("Drawn", bound=Net)


def drawn(family: type[Drawn], **sizes: Any) -> Drawn:
    """A net with seeded weights: the same in any order of the tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return family(**sizes)


class BlockSettings(NetSettings):
    """Of the net below."""

    width: int = 16
    blocks: int = 3


class BlockNet(Net):
    """Residual blocks of linear layers over one row."""

    kind = "blocks"
    sizes = {"features": 100, "width": 1_000, "blocks": 10}  # noqa: RUF012

    def __init__(self, features: int, width: int, blocks: int) -> None:
        super().__init__(features)
        self.width, self.number = width, blocks
        self.first = nn.Linear(features, width)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 3)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        hidden = self.first(self.scaled(rows))
        for part in self.parts:
            hidden = hidden + part(hidden)
        answer: torch.Tensor = self.head(hidden)
        return answer

    def architecture(self) -> dict[str, Any]:
        return {"kind": self.kind, "features": self.features, "width": self.width, "blocks": self.number}


def block_job(examples: Examples, trainer: TrainerSettings, seed: int = 7, **settings: Any) -> NetJob:
    """The job of such a net, which the registry then knows."""
    NETS["blocks"] = BlockNet
    chosen: dict[str, Any] = {"epochs": 2, "max_train_windows": 1_000, "batch_rows": 128} | settings
    return NetJob("blocks", examples, BlockSettings(**chosen), seed, trainer)  # type: ignore[arg-type]

"""What a family of models has to offer to be trained, judged and bundled by `training.train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tickserve.manifest import Family, NanPolicy, TensorSpec, Tolerance
from training.examples import IntArray, LabelledFold, Rows


@dataclass(frozen=True)
class Fit:
    """A trained model: `best` is the round or epoch that early stopping kept (from 1), `rows` how many it saw.

    `columns` are the positions of the table's columns that this model takes, in order; None: all of them.
    `resumed_at` is the step of the checkpoint that the training went on from (0: none).
    """

    model: Any
    best: int
    rows: int
    columns: IntArray | None = None
    resumed_at: int = 0


class Watch(Protocol):
    """Told the validation loss after each round or epoch (from 1); what it raises ends the training."""

    def __call__(self, step: int, loss: float) -> None:
        """Look at one step."""
        ...


class Job(Protocol):
    """One family over one `Examples`. `watch` is told how each fit goes."""

    family: Family
    model_file: str
    nan_policy: NanPolicy
    tolerance: Tolerance
    watch: Watch | None

    @property
    def tensor(self) -> TensorSpec:
        """The input tensor."""
        ...

    def eligible(self, rows: IntArray) -> IntArray:
        """Those of `rows` that the family can judge."""
        ...

    def fit(self, fold: LabelledFold) -> Fit:
        """Learn from the fold's training rows, stop by its validation rows. Raises InsufficientDataError."""
        ...

    def inputs(self, rows: IntArray) -> Rows:
        """The model inputs of `rows`: [n, F] or [n, T, F]."""
        ...

    def predict(self, fit: Fit, rows: IntArray) -> Rows:
        """Research's probabilities [n, 3] of table `rows`, in bounded memory."""
        ...

    def score(self, fit: Fit, inputs: Rows) -> Rows:
        """Research's probabilities [n, 3] of model inputs."""
        ...

    def save(self, fit: Fit, path: Path) -> None:
        """Write the model file."""
        ...

    def architecture(self, fit: Fit) -> dict[str, Any]:
        """What the manifest declares of the model."""
        ...

    def importance(self, fit: Fit, columns: tuple[str, ...]) -> list[dict[str, Any]]:
        """The ten columns that matter most, where the family can say."""
        ...

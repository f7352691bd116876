"""One model in every fold: what a step starts from and what it makes, with what each fold's model answers.

The model of a fold learned from rows before the fold's test rows alone, and so did its teacher: what is measured on
the pooled test rows is out of sample along the whole line. Letters: n rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from export.measured import Cost
from tickserve.manifest import Manifest
from training.examples import Examples, IntArray, Rows
from training.job import Fit, Job


@dataclass(frozen=True)
class Generation:
    """A model of each fold, and the bundle of the last fold's. `fits` are in the order of the folds."""

    job: Job
    fits: tuple[Fit, ...]
    bundle: Path
    manifest: Manifest
    _answers: dict[int, Rows] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The bundle's."""
        return self.manifest.name

    def rows(self, examples: Examples, place: int) -> IntArray:
        """The test rows of the fold at `place` that the model can judge."""
        return self.job.eligible(examples.folds[place].rows.test)

    def answers(self, examples: Examples, place: int) -> Rows:
        """Probabilities [n, 3] of those rows, computed once."""
        if place not in self._answers:
            self._answers[place] = self.job.predict(self.fits[place], self.rows(examples, place))
        return self._answers[place]


@dataclass(frozen=True)
class Teacher:
    """What a recipe starts from: one model, or several whose probabilities are averaged. Asked as one."""

    members: tuple[Generation, ...]
    _answers: dict[int, Rows] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """Of its members."""
        return " + ".join(member.name for member in self.members)

    @property
    def first(self) -> Generation:
        """The member whose contract the children take over."""
        return self.members[0]

    def eligible(self, rows: IntArray) -> IntArray:
        """Those of `rows` that every member can judge."""
        for member in self.members:
            rows = member.job.eligible(rows)
        return rows

    def predict(self, place: int, rows: IntArray) -> Rows:
        """Probabilities [n, 3] of eligible table rows by the models of the fold at `place`."""
        said = [member.job.predict(member.fits[place], rows) for member in self.members]
        return np.mean(said, axis=0, dtype=np.float32) if len(said) > 1 else said[0]

    def rows(self, examples: Examples, place: int) -> IntArray:
        """The test rows of the fold at `place` that every member can judge."""
        return self.eligible(examples.folds[place].rows.test)

    def answers(self, examples: Examples, place: int) -> Rows:
        """Probabilities [n, 3] of those rows, computed once."""
        if len(self.members) == 1:
            return self.first.answers(examples, place)
        if place not in self._answers:
            self._answers[place] = self.predict(place, self.rows(examples, place))
        return self._answers[place]

    def cost(self, costs: list[Cost]) -> Cost:
        """What asking all members one after the other costs: the p99 of the slowest, while the others take their p50.

        Members are seldom slow at the same time, so the sum of their p99 would flatter whatever replaces them.
        """
        p50 = sum(cost.p50_us for cost in costs)
        p99 = max(cost.p99_us + p50 - cost.p50_us for cost in costs)
        return Cost(sum(cost.size_bytes for cost in costs), p50, p99, costs[0].calls)

"""What a student learns from in one fold, and how: the teacher's probabilities and the truth on the training rows.

The loss of a row is `w T^2 KL(p_T || q_T) + (1 - w) CE(y, q)`: Hinton, Vinyals and Dean, Distilling the Knowledge in a
Neural Network, 2015 (arXiv:1503.02531). p_T and q_T are the teacher's and the student's probabilities at temperature
T, so that trees, which have no logits, teach as well as nets. Written out, since the wrappers for it expect a teacher
that is a module. A student learns in float32 in one process. Letters: n rows, m validation rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from models.net import Net
from tickserve.config import TrainerSettings
from training.compress.generation import Teacher
from training.compress.recipe import Learning
from training.examples import Examples, IntArray, LabelledFold, Rows, evenly
from training.nets import NetJob, reproducible
from training.nets.machine import device_of
from training.nets.windows import view

# Validation only has to rank epochs.
VALIDATION_SHARE = 4
SCORED_ROWS = 4_096
SMALLEST = 1e-7
Say = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """Table rows [n] with their classes int64 [n] and the teacher's probabilities float32 [n, 3]."""

    rows: IntArray
    classes: IntArray
    soft: Rows

    def of(self, keep: IntArray) -> Part:
        """Only the rows among `keep`."""
        kept = np.isin(self.rows, keep, assume_unique=True)
        return Part(self.rows[kept], self.classes[kept], self.soft[kept])


@dataclass(frozen=True)
class Lesson:
    """What is learned from in the fold at `place`: training and validation rows, no test row."""

    place: int
    fold: LabelledFold
    train: Part
    validation: Part

    def eligible(self, job: NetJob) -> Lesson:
        """Only the rows that the student of `job` can read."""
        parts = (part.of(job.eligible(part.rows)) for part in (self.train, self.validation))
        return Lesson(self.place, self.fold, *parts)


@dataclass(frozen=True)
class Lessons:
    """The lessons of a teacher, one a fold, each asked for once. `max_rows` caps the training rows (0: all)."""

    teacher: Teacher
    examples: Examples
    max_rows: int
    _made: dict[int, Lesson] = field(default_factory=dict, repr=False)

    def of(self, place: int) -> Lesson:
        """The lesson of the fold at `place`."""
        if place not in self._made:
            fold = self.examples.folds[place]
            caps = (self.max_rows, math.ceil(self.max_rows / VALIDATION_SHARE))
            parts = (
                self._part(place, fold, evenly(self.teacher.eligible(rows), cap))
                for rows, cap in zip((fold.rows.train, fold.rows.validation), caps, strict=True)
            )
            self._made[place] = Lesson(place, fold, *parts)
        return self._made[place]

    def _part(self, place: int, fold: LabelledFold, rows: IntArray) -> Part:
        return Part(rows, self.examples.classes(rows, fold.threshold), self.teacher.predict(place, rows))


@dataclass(frozen=True)
class Learned:
    """How it went: the epoch whose weights are kept (0: those it began with), and its validation loss."""

    best: int
    loss: float


class Course:
    """One student and one lesson. The order of the rows follows from the seed and the epoch alone."""

    def __init__(self, net: Net, job: NetJob, lesson: Lesson, how: Learning, trainer: TrainerSettings) -> None:
        self.net, self.job, self.lesson, self.how, self.trainer = net, job, lesson.eligible(job), how, trainer
        self.device = device_of(trainer)
        self._windows = view(job.examples.features, job.window)

    def learn(self, *, from_start: bool = True, logits: nn.Module | None = None) -> Learned:
        """Learn in place and keep the weights of the epoch with the lowest validation loss.

        With `from_start` the weights that it began with are no candidate.
        """
        with reproducible(self.job.seed, self.job.settings.threads):
            self.net.to(self.device)
            learned = self._epochs(from_start)
            self.net.to("cpu").eval()
        return learned

    def _epochs(self, from_start: bool) -> Learned:
        optimizer = torch.optim.Adam(self.net.parameters(), lr=self.how.learning_rate)
        kept = Learned(0, math.inf if from_start else self.validation_loss())
        weights: dict[str, Any] = copy.deepcopy(self.net.state_dict())
        for epoch in range(1, self.how.epochs + 1):
            self._epoch(epoch, optimizer)
            loss = self.validation_loss()
            if loss < kept.loss or (from_start and epoch == 1):
                kept, weights = Learned(epoch, loss), copy.deepcopy(self.net.state_dict())
            if epoch - kept.best >= self.how.patience:
                break
        self.net.load_state_dict(weights)
        return kept

    def _epoch(self, epoch: int, optimizer: torch.optim.Adam) -> None:
        part, size = self.lesson.train, self.how.batch_rows
        order = np.random.default_rng((self.job.seed, epoch)).permutation(len(part.rows))
        steps = math.ceil(len(order) / size)
        self.net.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = self._rate((epoch - 1) * steps + step, self.how.epochs * steps)
            loss = self._loss(part, order[step * size : (step + 1) * size]).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.net.parameters(), self.trainer.clip_norm)
            optimizer.step()

    def _rate(self, step: int, steps: int) -> float:
        rate = self.how.learning_rate
        return rate if self.trainer.schedule == "constant" else rate * 0.5 * (1 + math.cos(math.pi * step / steps))

    def validation_loss(self) -> float:
        """The mean loss of the validation rows."""
        part = self.lesson.validation
        self.net.eval()
        with torch.no_grad():
            chunks = range(0, len(part.rows), SCORED_ROWS)
            total = sum(
                float(self._loss(part, np.arange(at, min(at + SCORED_ROWS, len(part.rows)))).sum()) for at in chunks
            )
        return total / len(part.rows)

    def gradients(self, rows: int) -> None:
        """Leave the loss's gradient over the first `rows` training rows in the net's parameters."""
        self.net.to(self.device).eval()
        self.net.zero_grad()
        loss = self._loss(self.lesson.train, np.arange(min(rows, len(self.lesson.train.rows)))).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.net.to("cpu")

    def _loss(self, part: Part, at: IntArray) -> torch.Tensor:
        """The loss of each of the rows at these positions of a part."""
        logits = self.net.logits(self._inputs(part.rows[at]))
        weight, heat = self.how.teacher_weight, self.how.temperature
        loss = torch.zeros(len(at), device=self.device)
        if weight:
            wanted = self._softened(part.soft[at])
            said = torch.log_softmax(logits / heat, dim=-1)
            loss = loss + weight * heat**2 * (wanted * (wanted.log() - said)).sum(dim=-1)
        if weight < 1:
            truth = torch.from_numpy(part.classes[at]).to(self.device)
            loss = loss + (1 - weight) * nn.functional.cross_entropy(logits, truth, reduction="none")
        return loss

    def _inputs(self, rows: IntArray) -> torch.Tensor:
        taken = np.ascontiguousarray(self._windows[rows - (self.job.window - 1)])
        return torch.from_numpy(taken.reshape(len(rows), *self.job.tensor.shape)).to(self.device)

    def _softened(self, probabilities: Rows) -> torch.Tensor:
        """Probabilities [n, 3] at the temperature."""
        known = torch.from_numpy(probabilities).to(self.device).clamp(min=SMALLEST)
        return torch.softmax(known.log() / self.how.temperature, dim=-1)

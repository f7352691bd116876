"""Is a step worth it? Its gates: information coefficient, decisions, the time of a lone row, bytes, and the goal.

Information coefficients are compared on the test rows of all folds that child and teacher both judge, by the paired
block bootstrap (`training/comparison.py`). A step passes when every gate does; what each measured is kept either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.measured import Cost
from tickserve.errors import GateRefusedError
from tickserve.manifest import GateResult
from training.cells import Cells
from training.comparison import difference
from training.compress.generation import Generation, Teacher
from training.compress.recipe import Gates, Goal
from training.examples import Examples, IntArray, Rows
from training.metrics import Prediction

CHILD, TEACHER, NOTHING = "child", "teacher", "nothing"
Interval = tuple[float, float] | None
Measured = dict[str, float | int | str | None]


@dataclass(frozen=True)
class Quality:
    """Child against teacher on the `rows` both judge: information coefficients, their difference, 95 % intervals."""

    rows: int
    ic: float
    interval: Interval
    teacher_ic: float
    teacher_interval: Interval
    loss: float
    loss_interval: Interval

    @property
    def share(self) -> float:
        """The child's IC over the teacher's."""
        return self.ic / self.teacher_ic if self.teacher_ic else 0.0

    def to_json(self) -> dict[str, Any]:
        """For the report and the manifest."""
        return {
            "rows": self.rows,
            "ic": self.ic,
            "ic_95": _listed(self.interval),
            "teacher_ic": self.teacher_ic,
            "teacher_ic_95": _listed(self.teacher_interval),
            "ic_share": self.share,
            "ic_difference": self.loss,
            "ic_difference_95": _listed(self.loss_interval),
        }


def compare(child: Generation | Teacher, teacher: Teacher, examples: Examples, seed: int) -> Quality:
    """Pooled over the folds."""
    cells, count = [], 0
    for place in range(len(examples.folds)):
        rows, said, wanted = common(child, teacher, examples, place)
        scores = {
            CHILD: Prediction.of(said).score,
            TEACHER: Prediction.of(wanted).score,
            NOTHING: np.zeros(len(rows)),
        }
        cells.append(Cells.of(rows, examples.end[rows], examples.ret[rows], scores))
        count += len(rows)
    (ic, own), (teacher_ic, its), (loss, between) = (
        difference(cells, one, other, seed) for one, other in ((CHILD, NOTHING), (TEACHER, NOTHING), (CHILD, TEACHER))
    )
    return Quality(count, ic, own, teacher_ic, its, loss, between)


def common(
    one: Generation | Teacher, other: Generation | Teacher, examples: Examples, place: int
) -> tuple[IntArray, Rows, Rows]:
    """The test rows of a fold that both judge, and what each answers there."""
    left, right = one.rows(examples, place), other.rows(examples, place)
    rows, at, there = np.intersect1d(left, right, assume_unique=True, return_indices=True)
    return rows, one.answers(examples, place)[at], other.answers(examples, place)[there]


def flips(child: Generation, parent: Generation | Teacher, examples: Examples) -> float:
    """The share of the rows both judge where the child's most likely class is another one than its parent's."""
    differ, count = 0, 0
    for place in range(len(examples.folds)):
        rows, said, wanted = common(child, parent, examples, place)
        differ += int((said.argmax(axis=1) != wanted.argmax(axis=1)).sum())
        count += len(rows)
    return differ / max(count, 1)


def refuse_unproven(quality: Quality, name: str) -> None:
    """Raise GateRefusedError for a teacher whose information coefficient is not clear of 0."""
    interval = quality.teacher_interval
    if interval is None or interval[0] <= 0:
        was = (
            "too few independent rows for an interval"
            if interval is None
            else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
        )
        raise GateRefusedError(
            "the teacher's information coefficient is not clear of 0",
            field=name[:100],
            expected="a 95 % interval above 0",
            was=was,
            hint="a share of nothing says nothing: use more data, or another teacher",
        )


def quality_gate(quality: Quality, gates: Gates) -> GateResult:
    """Non-inferior, and at least the asked share of the teacher's information coefficient."""
    reasons = []
    low = quality.loss_interval[0] if quality.loss_interval else None
    if quality.share < gates.min_ic_share:
        reasons.append(f"{quality.share:.1%} of the teacher's IC, {gates.min_ic_share:.1%} needed")
    if low is None:
        reasons.append("too few independent rows for an interval of the IC difference")
    elif low < -gates.max_ic_loss:
        reasons.append(f"IC may be {-low:.4f} below the teacher's (95 %), {gates.max_ic_loss} allowed")
    said = quality.to_json()
    measured: Measured = {key: value for key, value in said.items() if not isinstance(value, list)}
    measured["ic_difference_low_95"] = low
    limits: Measured = {"ic_share": gates.min_ic_share, "ic_difference_low_95": -gates.max_ic_loss}
    return _gate("quality", reasons, measured, limits, f"{quality.share:.1%} of the teacher's IC")


def decisions_gate(share: float, limit: float | None) -> GateResult:
    """How many decisions are other ones than the parent's; no limit for a student, which is another model."""
    reasons = [] if limit is None or share <= limit else [f"{share:.1%} of decisions flip, {limit:.1%} allowed"]
    return _gate("decisions", reasons, {"flips": share}, {"flips": limit}, f"{share:.1%} of decisions flip")


def latency_gate(child: Cost, parent: Cost, limit: float) -> GateResult:
    """P50 and p99 of a lone row against the parent's, measured in the same run."""
    ratios = {"p50": child.p50_us / parent.p50_us, "p99": child.p99_us / parent.p99_us}
    reasons = [
        f"{name} is {ratio:.2f} times the parent's, {limit:g} allowed"
        for name, ratio in ratios.items()
        if ratio > limit
    ]
    measured: Measured = {
        "p50_us": child.p50_us,
        "p99_us": child.p99_us,
        "parent_p50_us": parent.p50_us,
        "parent_p99_us": parent.p99_us,
        "calls": child.calls,
    }
    said = f"p50 {child.p50_us:.1f} us, p99 {child.p99_us:.1f} us"
    return _gate("latency", reasons, measured, {"p50_ratio": limit, "p99_ratio": limit}, said)


def size_gate(child: Cost, parent: Cost, limit: float) -> GateResult:
    """Bytes of the served graph against the parent's."""
    ratio = child.size_bytes / parent.size_bytes
    reasons = [] if ratio <= limit else [f"{ratio:.2f} times the parent's bytes, {limit:g} allowed"]
    measured: Measured = {"size_bytes": child.size_bytes, "parent_size_bytes": parent.size_bytes}
    return _gate("size", reasons, measured, {"size_ratio": limit}, f"{child.size_bytes:,} bytes")


def goal_gate(child: Cost, teacher: Cost, goal: Goal) -> GateResult:
    """What all steps together have come to, against the teacher."""
    reached = {
        "speedup_p50": teacher.p50_us / child.p50_us,
        "speedup_p99": teacher.p99_us / child.p99_us,
        "shrink": teacher.size_bytes / child.size_bytes,
    }
    wanted = {"speedup_p50": goal.speedup, "speedup_p99": goal.speedup, "shrink": goal.shrink}
    reasons = [
        f"{name} over the teacher is {reached[name]:.2f}, {limit:g} is the goal"
        for name, limit in wanted.items()
        if reached[name] < limit
    ]
    said = ", ".join(f"{name} {value:.1f}" for name, value in reached.items())
    return _gate("goal", reasons, dict(reached), dict(wanted), said)


def verdict(results: Sequence[GateResult]) -> str:
    """Accepted, or the reasons it was not."""
    reasons = [gate.detail for gate in results if not gate.passed]
    return f"refused: {'; '.join(reasons)}" if reasons else f"accepted: {'; '.join(gate.detail for gate in results)}"


def _gate(name: str, reasons: Sequence[str], measured: Measured, limits: Measured, said: str) -> GateResult:
    detail = "; ".join(reasons) if reasons else said
    return GateResult(name=f"compress.{name}", passed=not reasons, measured=measured, limits=limits, detail=detail)


def _listed(interval: Interval) -> list[float] | None:
    return None if interval is None else list(interval)

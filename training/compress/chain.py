"""A recipe run: each step fitted in every fold, measured beside its parent, judged, and kept or left.

A step that every gate accepts becomes a child bundle that names its parent's digest; one that a gate refuses leaves its
measurements in `report.json` and nothing else. The report is written when the run ends, whole; what an earlier run of
the recipe left is removed when it starts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.measured import ROUND_CALLS, Cost, compare_bundles
from tickserve.errors import LimitExceededError, UsageError
from tickserve.limits import PREFIX, hold, of_training
from tickserve.manifest import GateResult, Manifest, check_model_name, load_manifest
from tickserve.meter import Meter, Stage
from tickserve.store import check_writable, write_json_atomic
from training import baselines
from training.bundles import TrainedBundle
from training.compress.child import Told, described, write_child
from training.compress.distill import student_job
from training.compress.former import REPORT, child_name, remove_former
from training.compress.gates import (
    Quality,
    compare,
    decisions_gate,
    flips,
    goal_gate,
    latency_gate,
    quality_gate,
    refuse_unproven,
    size_gate,
    verdict,
)
from training.compress.generation import Generation, Teacher
from training.compress.lesson import Lessons, Say
from training.compress.recipe import DistillStep, Goal, PruneStep, Recipe, Step, families_of
from training.compress.steps import made
from training.compress.teacher import Data, Opened, open_teacher, refitted
from training.families import check_fit


@dataclass(frozen=True)
class Outcome:
    """What a recipe came to: the bundles that were accepted, in order, and the report (JSON values)."""

    bundles: tuple[TrainedBundle, ...]
    report: dict[str, Any]

    @property
    def accepted(self) -> bool:
        """Whether the last step was."""
        return bool(self.report["accepted"])


def compress(bundles: Sequence[Path], recipe: Recipe, data: Data, out: Path, say: Say) -> Outcome:
    """Run a recipe on the teacher in `bundles` (several: their average), and write children and report below `out`.

    Raises as `teacher_of` and `run_recipe`.
    """
    _refuse_overwriting(bundles, out)
    check_writable(out)
    opened = opened_of(bundles, data, recipe)
    remove_former(out, opened[0].manifest.name, recipe)
    return run_recipe(*_taught(opened, data, say), recipe, data, out, say)


def teacher_of(bundles: Sequence[Path], data: Data, say: Say) -> tuple[Teacher, dict[str, Any]]:
    """The teacher in every fold, and how each member's refits compare with its report, by name.

    Raises as `opened_of`, and ArtifactError for a refit that is another model.
    """
    return _taught(opened_of(bundles, data), data, say)


def opened_of(bundles: Sequence[Path], data: Data, recipe: Recipe | None = None) -> list[Opened]:
    """The members of a teacher: every bundle, and the recipe, looked over before anything is fitted.

    Raises ArtifactError for a bundle of other
    data, folds or settings, UsageError for a family given twice, and ConfigError and UsageError for a step that there
    is nothing for.
    """
    manifests = [load_manifest(bundle) for bundle in bundles]
    _refuse_twice(manifests)
    if recipe:
        _check_steps(recipe, manifests, data)
    return [open_teacher(bundle, data) for bundle in bundles]


def _taught(opened: Sequence[Opened], data: Data, say: Say) -> tuple[Teacher, dict[str, Any]]:
    loaded = [_refitted(each, data, say) for each in opened]
    teacher = Teacher(tuple(member for member, _ in loaded))
    return teacher, {member.name: refits for member, refits in loaded}


def _refitted(opened: Opened, data: Data, say: Say) -> tuple[Generation, list[dict[str, Any]]]:
    """A member's refits, held to the limits of time and memory of training. Raises LimitExceededError."""
    with Meter() as meter, meter.stage("refits") as stage:
        found = refitted(opened, data, say)
    held = of_training(data.config.limits, stage.seconds, stage.peak_memory_mb, None)
    taken = [gate for gate in held if gate.name != f"{PREFIX}hit_rate"]  # the teacher was held to that when trained
    hold(taken, lambda text: say(f"teacher {opened.manifest.name}: {text}"))
    return found


def run_recipe(teacher: Teacher, refits: dict[str, Any], recipe: Recipe, data: Data, out: Path, say: Say) -> Outcome:
    """Run a recipe on a teacher that is loaded.

    Raises GateRefusedError for a teacher whose information coefficient is not clear of 0, ComponentError for a folder
    that cannot be written, ConfigError, MissingExtraError for a step whose library is not installed, and
    LimitExceededError for a limit that is to fail; the children of the run are then removed.
    """
    check_writable(out)
    remove_former(out, teacher.first.name, recipe)
    run = _Chain(teacher, refits, recipe, data, out, say)
    report = run.start() | {"refits": refits}
    try:
        while run.left and not run.stopped:
            run.step()
    except LimitExceededError:
        remove_former(out, teacher.first.name, recipe)
        raise
    report |= run.ended()
    write_json_atomic(out / REPORT, report)
    return Outcome(tuple(run.made), report)


def _refuse_overwriting(bundles: Sequence[Path], out: Path) -> None:
    for bundle in bundles:
        if out.resolve() == bundle.resolve():
            raise UsageError("is the teacher's own folder", field="--out", expected="another folder", was=str(out))


def _refuse_twice(teachers: Sequence[Manifest]) -> None:
    """One configuration and seed train one model of a family: a second one adds its cost to the teacher, and no more.

    Raises UsageError.
    """
    seen: dict[str, Manifest] = {}
    for teacher in teachers:
        before = seen.setdefault(teacher.family, teacher)
        if before is not teacher:
            same = f"{before.name} twice" if before.digest() == teacher.digest() else f"{before.name}, {teacher.name}"
            raise UsageError(
                "one teacher is counted twice",
                field="BUNDLE",
                expected="a family once",
                was=f"{same}: {teacher.family}",
            )


def _check_steps(recipe: Recipe, teachers: Sequence[Manifest], data: Data) -> None:
    families_of(recipe, teachers[0].family)
    if len(teachers) > 1 and recipe.step[0].kind != "distill":
        was = recipe.step[0].kind
        raise UsageError("several teachers", field="step 1", expected="distill: they become one model", was=was)
    for step in recipe.step:
        if isinstance(step, DistillStep):
            check_fit(step.family, data.meta)
            student_job(step, data.examples, data.config)


@dataclass
class _Chain:
    """A recipe under way: `parent` is what the next step starts from."""

    teacher: Teacher
    refits: dict[str, Any]
    recipe: Recipe
    data: Data
    out: Path
    say: Say
    made: list[TrainedBundle] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    parent: Generation | Teacher = field(init=False)
    stopped: bool = False

    def __post_init__(self) -> None:
        self.parent = self.teacher if len(self.teacher.members) > 1 else self.teacher.first
        self.lessons = Lessons(self.teacher, self.data.examples, self.recipe.max_rows)
        examples, meta = self.data.examples, self.data.meta
        self.yardsticks = {fold.number: baselines.predict_all(examples, fold, meta.columns) for fold in examples.folds}

    @property
    def left(self) -> bool:
        """Whether there is a step that was not tried."""
        return len(self.rows) < len(self.recipe.step)

    def start(self) -> dict[str, Any]:
        """Measure the teacher. Raises GateRefusedError when its information coefficient is not clear of 0."""
        quality = compare(self.teacher, self.teacher, self.data.examples, self.data.config.seed)
        refuse_unproven(quality, self.teacher.name)
        cost = self._costs(())[0]
        low, high = quality.teacher_interval or (0.0, 0.0)
        self.say(
            f"teacher {self.teacher.name}: IC {quality.ic:+.4f} ({low:+.4f} to {high:+.4f}), "
            f"{cost.size_bytes:,} bytes, p50 {cost.p50_us:.1f} us, p99 {cost.p99_us:.1f} us"
        )
        members = self.teacher.members
        return {
            "recipe": self.recipe.model_dump(mode="json", exclude_unset=True),
            "folds": len(self.data.examples.folds),
            "teacher": {
                "model": self.teacher.name,
                "digests": [member.manifest.digest() for member in members],
                "families": [member.manifest.family for member in members],
                **_cost_row(cost),
                "ic": quality.ic,
                "ic_95": [low, high],
                "rows": quality.rows,
            },
        }

    def step(self) -> None:
        """Try the next step."""
        place = len(self.rows)
        step = self.recipe.step[place]
        name = child_name(self.teacher.first.name, self.recipe, place)
        check_model_name(name)
        self.say(f"step {place + 1}/{len(self.recipe.step)}, {step.kind}: from {self.parent.name}")
        with Meter() as meter, meter.stage("compress") as stage:
            job, fits = made(step, self.parent, self.lessons, self.data.config, self.say)
        told = described(job, fits, self.data, self.yardsticks, stage)
        held = self._held(name, stage, told)
        with tempfile.TemporaryDirectory(prefix="tickserve-compress-") as folder:
            child = write_child(Path(folder), name, job, fits, self._parents(), told, (), {}, self.data)
            row, gates = self._judged(step, child, last=place + 1 == len(self.recipe.step))
        accepted = all(gate.passed for gate in gates)
        against = {"against_teacher": row["quality"], "against_parent": row["measured"], "refits": self.refits}
        if accepted:
            child = write_child(self.out, name, job, fits, self._parents(), told, gates + held, against, self.data)
            self.made.append(TrainedBundle(child.bundle, child.manifest, row))
            self.parent = child
        else:
            self.stopped = self.recipe.on_refusal == "stop"
        digest = child.manifest.digest() if accepted else None
        took = {"limits": [gate.model_dump(mode="json") for gate in held], "seconds": stage.seconds}
        self.rows.append({"step": step.kind, "model": name, "digest": digest, **row, **took})
        self.say(f"{name}: {row['verdict']}")

    def _held(self, name: str, stage: Stage, told: Told) -> tuple[GateResult, ...]:
        """What a step took and how often its model is right, against `[limits]`. Raises LimitExceededError."""
        hit_rate = told.report["pooled"]["model"]["hit_rate"]
        held = of_training(self.data.config.limits, stage.seconds, stage.peak_memory_mb, hit_rate)
        hold(held, lambda text: self.say(f"{name}: {text}"))
        return held

    def _parents(self) -> tuple[Generation, ...]:
        return self.parent.members if isinstance(self.parent, Teacher) else (self.parent,)

    def _judged(self, step: Step, child: Generation, last: bool) -> tuple[dict[str, Any], tuple[GateResult, ...]]:
        """The report row of a step, and its gates."""
        examples, gates = self.data.examples, self.recipe.gates
        quality = compare(child, self.teacher, examples, self.data.config.seed)
        flipped = flips(child, self.parent, examples)
        teacher_cost, parent_cost, cost = self._costs_of(child)
        judged = [
            quality_gate(quality, gates),
            decisions_gate(flipped, _allowed_flips(step, self.recipe)),
            latency_gate(cost, parent_cost, gates.max_latency_ratio),
            size_gate(cost, parent_cost, gates.max_size_ratio),
        ]
        if last and self.recipe.goal != Goal():
            judged.append(goal_gate(cost, teacher_cost, self.recipe.goal))
        row = {
            "parent": self.parent.name,
            "family": child.manifest.family,
            "precision": child.manifest.precision,
            "passed": all(gate.passed for gate in judged),
            "verdict": verdict(judged),
            "quality": quality.to_json(),
            "measured": _measured(cost, parent_cost, teacher_cost, flipped, quality),
            "gates": [gate.model_dump(mode="json") for gate in judged],
        }
        return row, tuple(judged)

    def _costs_of(self, child: Generation) -> list[Cost]:
        """Of teacher, parent and child; timed once more where the child looks slow, since noise seldom comes twice."""
        costs = self._costs((child.bundle,))
        if latency_gate(costs[2], costs[1], self.recipe.gates.max_latency_ratio).passed:
            return costs
        return [one.quieter(other) for one, other in zip(costs, self._costs((child.bundle,)), strict=True)]

    def _costs(self, children: Sequence[Path]) -> list[Cost]:
        """Of the teacher, of the parent, and of each of `children`, timed in turns."""
        members = [member.bundle for member in self.teacher.members]
        own = [] if isinstance(self.parent, Teacher) or self.parent.bundle in members else [self.parent.bundle]
        costs = compare_bundles([*members, *own, *children], self.data.config.export, self.recipe.latency_calls)
        whole = self.teacher.cost(costs[: len(members)])
        rest = costs[len(members) :]
        return [whole, *rest] if own else [whole, whole, *rest]

    def ended(self) -> dict[str, Any]:
        """The rest of the report. The last step decides."""
        tried = [row["passed"] for row in self.rows]
        untried = [step.kind for step in self.recipe.step[len(tried) :]]
        return {"steps": self.rows, "not_tried": untried, "accepted": not untried and tried[-1]}


def _allowed_flips(step: Step, recipe: Recipe) -> float | None:
    """A student is another model, and is judged by what it forecasts."""
    if isinstance(step, DistillStep):
        return None
    return recipe.gates.max_flips_tuned if isinstance(step, PruneStep) else recipe.gates.max_flips


def _cost_row(cost: Cost) -> dict[str, float | int | str]:
    """Times that are each of the quietest round say less of a bad day than a p99 of all calls would, so it is said."""
    timing = f"p50 and p99, each of the quietest of {cost.calls // ROUND_CALLS} rounds of {ROUND_CALLS} calls"
    times = {"p50_us": cost.p50_us, "p99_us": cost.p99_us, "calls": cost.calls}
    return {"size_bytes": cost.size_bytes, **times, "timing": timing}


def _measured(cost: Cost, parent: Cost, teacher: Cost, flipped: float, quality: Quality) -> dict[str, Any]:
    return {
        **_cost_row(cost),
        "parent_size_bytes": parent.size_bytes,
        "parent_p50_us": parent.p50_us,
        "parent_p99_us": parent.p99_us,
        "speedup_p50": teacher.p50_us / cost.p50_us,
        "speedup_p99": teacher.p99_us / cost.p99_us,
        "shrink": teacher.size_bytes / cost.size_bytes,
        "ic": quality.ic,
        "ic_share": quality.share,
        "flips": flipped,
    }

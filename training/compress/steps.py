"""What a step of a recipe makes of its parent, fold by fold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from export.parity import ROUNDED_ACTIVATIONS
from tickserve.config import Config
from training.compress.distill import distill, student_job
from training.compress.generation import Generation, Teacher
from training.compress.lesson import Lesson, Lessons, Say
from training.compress.pruning import check_examples, prune, pruned_job
from training.compress.quantization import GraphJob, quantize
from training.compress.recipe import DistillStep, PruneStep, QuantizeStep, Step, TruncateStep
from training.compress.truncation import truncate
from training.gbdt import GbdtJob
from training.job import Fit, Job

Make = Callable[[Lesson], Fit]


def made(
    step: Step, parent: Generation | Teacher, lessons: Lessons, config: Config, say: Say
) -> tuple[Job, tuple[Fit, ...]]:
    """The job of what a step makes, and its model of each fold.

    Raises ConfigError, ArtifactError, MissingExtraError.
    """
    if isinstance(step, DistillStep):
        job = student_job(step, lessons.examples, config)
        return job, _each(lessons, lambda lesson: distill(step, job, lesson, config.trainer, say))
    if isinstance(parent, Teacher):
        raise TypeError("several teachers can only be distilled")
    return _from_one(step, parent, lessons, config, say)


def _from_one(
    step: PruneStep | TruncateStep | QuantizeStep, parent: Generation, lessons: Lessons, config: Config, say: Say
) -> tuple[Job, tuple[Fit, ...]]:
    own: Any = parent.job
    if isinstance(step, TruncateStep):
        trees: GbdtJob = own
        folds = lessons.examples.folds
        return trees, tuple(truncate(step, trees, fit, fold, say) for fit, fold in zip(parent.fits, folds, strict=True))
    if isinstance(step, PruneStep):
        job = pruned_job(step, own, config)
        check_examples(lessons.examples, job)
        return job, _each(
            lessons, lambda lesson: prune(step, job, parent.fits[lesson.place].model, lesson, config, say)
        )
    tolerance = own.tolerance if step.method == "weights" else ROUNDED_ACTIVATIONS
    return GraphJob(own, tolerance), _each(
        lessons, lambda lesson: quantize(step, own, parent.fits[lesson.place], lesson, say)
    )


def _each(lessons: Lessons, make: Make) -> tuple[Fit, ...]:
    return tuple(make(lessons.of(place)) for place in range(len(lessons.examples.folds)))

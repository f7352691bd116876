"""Distillation: in every fold a new net learns what that fold's teacher answers, be that trees, a net or several."""

from __future__ import annotations

import difflib
import time

import torch

from models.registry import NETS
from tickserve.config import Config, NetSettings, TrainerSettings
from tickserve.errors import ConfigError
from training.compress.lesson import Course, Lesson, Say
from training.compress.recipe import DistillStep
from training.examples import Examples
from training.job import Fit
from training.nets import NetJob, reproducible
from training.nets.windows import scaler


def student_job(step: DistillStep, examples: Examples, config: Config) -> NetJob:
    """The job of the student: the family's section with the step's `settings` over it. Raises ConfigError."""
    return NetJob(step.family, examples, _settings(step, config), config.seed, config.trainer)


def _settings(step: DistillStep, config: Config) -> NetSettings:
    section: NetSettings = getattr(config, step.family)
    declared = NETS[step.family]
    known = sorted((set(declared.sizes) | set(declared.choices) | {"threads"}) & set(type(section).model_fields))
    for key in step.settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"nearest: {near[0]}" if near else f"one of {', '.join(known)}"
            raise ConfigError("no size of the student", field=f"step.settings.{key}"[:100], hint=hint)
    return validated(section, step.settings)


def validated(section: NetSettings, changes: dict[str, object]) -> NetSettings:
    """A section with other values. Raises ConfigError naming the one it does not take."""
    from pydantic import ValidationError

    try:
        return type(section).model_validate(section.model_dump() | changes)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(("step", "settings", *map(str, problem["loc"])))
        raise ConfigError(str(problem["msg"]).removeprefix("Value error, "), field=field) from error


def distill(step: DistillStep, job: NetJob, lesson: Lesson, trainer: TrainerSettings, say: Say) -> Fit:
    """The student of one fold."""
    started = time.perf_counter()
    family = NETS[step.family]
    with reproducible(job.seed, job.settings.threads):
        net = family.from_architecture(family.declared(job.settings, job.examples.columns))
    mean, std = scaler(job.examples.features, lesson.fold.rows.train)
    net.set_scaler(torch.from_numpy(mean), torch.from_numpy(std))
    course = Course(net, job, lesson, step, trainer)
    learned = course.learn()
    rows, seconds = len(course.lesson.train.rows), time.perf_counter() - started
    say(
        f"distill fold {lesson.fold.number}: {rows:,} rows in {seconds:.1f} s, epoch {learned.best} of {step.epochs}, "
        f"validation loss {learned.loss:.5f}"
    )
    return Fit(net, learned.best, rows)

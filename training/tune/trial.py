"""One trial: a family with other settings, walked over every fold but the last, and what its model would cost to serve.

Each fold has a study of its own beside the search for giving up early: Optuna prunes by one number only, and losses of
different folds do not compare.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.measured import measure_bundle
from tickserve.config import Config
from tickserve.errors import InsufficientDataError
from training import baselines
from training.examples import DataMeta, Examples, prepare
from training.families import check_fit, job_of
from training.leakage import refuse_leaks
from training.metrics import Prediction
from training.train import bundle_of
from training.tune.space import Space, Value, applied, suggest
from training.walk import Judged, Run, judge_fold, report_of

if TYPE_CHECKING:
    from market.build import FeatureTable

RAISED = frozenset({"ic"})
Measured = dict[str, float]


@dataclass(frozen=True)
class Question:
    """What every trial of a study is asked: one family on the folds that a search may see."""

    family: str
    config: Config
    meta: DataMeta
    examples: Examples
    yardsticks: Mapping[int, dict[str, Prediction]]


def question(table: FeatureTable, meta: DataMeta, config: Config, family: str) -> Question:
    """Every fold but the last. Raises InsufficientDataError for one fold, GateRefusedError for a leak, ConfigError."""
    check_fit(family, meta)
    examples = prepare(table, meta, config)
    if len(examples.folds) < 2:
        raise InsufficientDataError(
            "a search needs a fold that it does not see",
            field="validation.folds",
            expected="at least 2",
            was=str(len(examples.folds)),
        )
    refuse_leaks(examples, meta.columns)
    seen = replace(examples, folds=examples.folds[:-1])
    yardsticks = {fold.number: baselines.predict_all(seen, fold, meta.columns) for fold in seen.folds}
    return Question(family, config, meta, seen, yardsticks)


class Objective:
    """What Optuna calls for a trial; `prunings` are the studies, one a fold, that decide when to give up."""

    def __init__(self, asked: Question, space: Space, prunings: list[Any]) -> None:
        self.asked, self.space, self.prunings = asked, space, prunings

    def __call__(self, trial: Any) -> tuple[float, ...]:
        """The objectives' values in the order of `tune.objectives`. Raises TrialPruned."""
        measured = self.measured(suggest(self.space, trial))
        for name, value in measured.items():
            trial.set_user_attr(name, value)
        return tuple(measured[name] for name in self.asked.config.tune.objectives)

    def measured(self, values: Mapping[str, Value]) -> Measured:
        """Information coefficient out of sample, and the cost of the last seen fold's model."""
        asked = self.asked
        config = applied(asked.config, values)
        run = Run(
            asked.examples, asked.meta, config, job_of(asked.family, asked.examples, config), asked.yardsticks, _quiet
        )
        judged = [self._fold(run, number) for number in range(len(asked.examples.folds))]
        report = report_of(run, judged, 0.0)
        with tempfile.TemporaryDirectory(prefix="tickserve-trial-") as folder:
            bundle, _, _ = bundle_of(run, judged[-1].fit, report, Path(folder), "trial")
            cost = measure_bundle(bundle.path, config.export, config.tune.latency_calls)
        return {
            "ic": report["pooled"]["model"]["ic"] or 0.0,
            "p99_us": cost.p99_us,
            "p50_us": cost.p50_us,
            "size_bytes": float(cost.size_bytes),
        }

    def _fold(self, run: Run, number: int) -> Judged:
        fold = run.examples.folds[number]
        if not self.prunings:
            return judge_fold(run, fold, run.job.fit(fold), 0.0)
        study = self.prunings[number]
        return _watched(run, fold, study, study.ask())


def _watched(run: Run, fold: Any, study: Any, trial: Any) -> Judged:
    """Fit and judge a fold, given up when its validation loss is worse than the median's at that step."""
    from optuna import TrialPruned
    from optuna.trial import TrialState

    lowest = float("inf")

    def watch(step: int, loss: float) -> None:
        nonlocal lowest
        lowest = min(lowest, loss)
        trial.report(loss, step)
        if trial.should_prune():
            raise TrialPruned(f"fold {fold.number}, step {step}: validation loss {loss:.5f}")

    run.job.watch = watch
    try:
        judged = judge_fold(run, fold, run.job.fit(fold), 0.0)
    except BaseException as error:
        study.tell(trial, state=TrialState.PRUNED if isinstance(error, TrialPruned) else TrialState.FAIL)
        raise
    study.tell(trial, lowest)
    return judged


def _quiet(text: str) -> None:
    """A trial says nothing: its result does."""

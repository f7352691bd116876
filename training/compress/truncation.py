"""Ensemble truncation: the first rounds of a forest, as many as the validation rows ask for, with leaves fitted again.

Boosting corrects in ever smaller steps, so the last rounds are the cheapest to lose. How many stay is read off the
validation rows, which early stopping used before; the test rows are not looked at. The leaves of what is left were
shrunk for a longer run and grown on samples of the rows: they are refitted to all training rows.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.gbdt import GbdtClassifier
from tickserve.errors import ConfigError
from training.compress.lesson import Say
from training.compress.recipe import TruncateStep
from training.examples import LabelledFold
from training.gbdt import GbdtJob
from training.gbdt.calibration import fit_link
from training.gbdt.matrix import Source, take
from training.gbdt.objective import Objective, objective_of
from training.job import Fit

MARGIN_TASKS = ("regression", "ranking")
# How finely the number of rounds is chosen.
PARTS = 16


def truncate(step: TruncateStep, job: GbdtJob, parent: Fit, fold: LabelledFold, say: Say) -> Fit:
    """The shorter forest of one fold.

    Raises ConfigError for more rounds than there are, and for `refresh` of a ranking, whose leaves have no target of
    their own.
    """
    started = time.perf_counter()
    booster = parent.model.booster
    there = int(booster.num_boosted_rounds())
    if step.refresh and job.settings.task == "ranking":
        raise ConfigError(
            "leaves of a ranking are not fitted again", field="step.refresh", expected="false", was="true"
        )
    if step.rounds >= there:
        raise ConfigError("no tree less", field="step.rounds", expected=f"fewer than {there}", was=str(step.rounds))
    losses = _losses(job, booster, fold, step.rounds)
    kept = step.rounds or _fewest(losses, step.max_loss)
    shorter = booster[:kept]
    shorter.set_attr(best_iteration=None, best_score=None)
    if step.refresh:
        shorter = _refreshed(job, shorter, fold)
    shorter.set_param({"device": "cpu", "nthread": job.settings.threads})
    model = _linked(job, shorter, fold)
    say(
        f"truncate fold {fold.number}: {kept} of {there} rounds, validation loss {losses[kept]:.5f} of "
        f"{losses[there]:.5f} before leaves were refitted, {time.perf_counter() - started:.1f} s"
    )
    return Fit(model, kept, len(fold.rows.train), parent.columns)


def _fewest(losses: Mapping[int, float], share: float) -> int:
    """The fewest rounds whose loss is within `share` of the whole forest's; losses of rankings are negative."""
    whole = losses[max(losses)]
    limit = whole + share * abs(whole)
    return next(rounds for rounds, loss in sorted(losses.items()) if loss <= limit)


def _losses(job: GbdtJob, booster: Any, fold: LabelledFold, wanted: int) -> dict[int, float]:
    """The validation loss by number of rounds: after each sixteenth of them, and after the `wanted` (0: none)."""
    import xgboost

    objective = objective_of(job.examples, fold.rows.train, fold.threshold, job.settings)
    source, rows = Source(job.examples, fold.rows.validation, objective), len(fold.rows.validation)
    # A plain matrix: one of bins answers by bins, and these rows' own are not those the trees were grown on.
    held_out = xgboost.DMatrix(
        source.taken(0, rows), **source.described(0, rows), missing=np.nan, nthread=job.settings.threads
    )
    there = int(booster.num_boosted_rounds())
    tried = {-(-there * part // PARTS) for part in range(1, PARTS + 1)} | ({wanted} if wanted else set())
    return {rounds: objective.loss(_value(booster[:rounds], held_out, objective)) for rounds in tried}


def _value(booster: Any, matrix: Any, objective: Objective) -> float:
    booster.set_param({**objective.parameters, "eval_metric": objective.metric})
    return float(str(booster.eval(matrix)).rpartition(":")[2])


def _refreshed(job: GbdtJob, booster: Any, fold: LabelledFold) -> Any:
    """The same splits with leaves fitted to all training rows, round after round."""
    import xgboost

    objective = objective_of(job.examples, fold.rows.train, fold.threshold, job.settings)
    parameters = {
        **objective.parameters,
        "process_type": "update",
        "updater": "refresh",
        "refresh_leaf": True,
        "learning_rate": job.settings.learning_rate,
        "nthread": job.settings.threads,
    }
    rows = fold.rows.train
    label = objective.target(rows).astype(np.float32)
    matrix = xgboost.DMatrix(
        take(job.examples.features, rows), label=label, missing=np.nan, nthread=job.settings.threads
    )
    rounds = int(booster.num_boosted_rounds())
    with warnings.catch_warnings():
        # It warns that trees are updated and not grown, which is the point.
        warnings.filterwarnings("ignore", category=UserWarning, message=r"(?s).*manually specified the `updater`")
        refreshed = xgboost.train(parameters, matrix, num_boost_round=rounds, xgb_model=booster)
    # What updates trees is not what scores them: read back, the booster is a plain one.
    plain = xgboost.Booster()
    plain.load_model(bytearray(refreshed.save_raw(raw_format="ubj")))
    return plain


def _linked(job: GbdtJob, booster: Any, fold: LabelledFold) -> GbdtClassifier:
    """The model, with its link fitted again where the task has one."""
    model = GbdtClassifier(booster, int(booster.num_features()), job.settings.threads)
    if job.settings.task in MARGIN_TASKS:
        margins = model.margin(take(job.examples.features, fold.rows.validation))
        model.link = fit_link(margins, job.examples.classes(fold.rows.validation, fold.threshold))
    return model

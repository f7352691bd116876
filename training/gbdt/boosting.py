"""One run of XGBoost: binned matrices, constraints, early stopping, and the trees of the best round."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tickserve.config import GbdtSettings
from tickserve.errors import ConfigError
from training.examples import IntArray
from training.gbdt.device import Placement
from training.gbdt.interrupts import between_rounds, deferred
from training.gbdt.matrix import Source, matrices
from training.gbdt.objective import Objective
from training.job import Watch

VALIDATION = "validation"


@dataclass(frozen=True)
class Boosting:
    """How trees are grown, apart from what they learn."""

    settings: GbdtSettings
    seed: int
    placement: Placement

    def stopped(self, train: Source, validation: Source, watch: Watch | None) -> Any:
        """A booster of the rounds up to the best one on the `validation` rows, and no later ones."""
        import xgboost
        from xgboost.callback import EarlyStopping

        settings, objective = self.settings, train.objective
        # XGBoost guesses from a metric's name whether it is lowered or raised; here the objective says it.
        stop = EarlyStopping(
            rounds=settings.early_stopping_rounds,
            metric_name=objective.metric,
            data_name=VALIDATION,
            maximize=objective.raised,
        )
        with deferred() as check, matrices(settings) as make, self.placement.context():
            learned = make(train, None)
            booster = xgboost.train(
                self._parameters(train),
                learned,
                num_boost_round=settings.rounds,
                evals=[(make(validation, learned), VALIDATION)],
                verbose_eval=False,
                # The watch first: a callback that stops keeps those after it from seeing that round.
                callbacks=[between_rounds(check), *([_watching(watch, objective)] if watch else []), stop],
            )
        # A converter takes every tree it finds: those after the best round must not be there.
        kept = booster[: int(booster.best_iteration) + 1]
        kept.set_attr(best_iteration=None, best_score=None)
        return self._at_home(kept)

    def unstopped(self, train: Source, rounds: int) -> Any:
        """A booster of `rounds` rounds."""
        import xgboost

        with deferred() as check, matrices(self.settings) as make, self.placement.context():
            learned, asked = make(train, None), [between_rounds(check)]
            booster = xgboost.train(self._parameters(train), learned, num_boost_round=rounds, callbacks=asked)
        return self._at_home(booster)

    def _at_home(self, booster: Any) -> Any:
        """Scored on the CPU, wherever it was trained: that is research's number."""
        booster.set_param({"device": "cpu", "nthread": self.settings.threads})
        return booster

    def _parameters(self, train: Source) -> dict[str, Any]:
        settings = self.settings
        return {
            **train.objective.parameters,
            "eval_metric": train.objective.metric,
            "tree_method": "hist",
            "device": self.placement.device,
            "max_depth": settings.max_depth,
            "learning_rate": settings.learning_rate,
            "subsample": settings.subsample,
            "sampling_method": settings.sampling_method,
            "max_bin": settings.max_bin,
            "nthread": settings.threads,
            "seed": self.seed,
            **constraints(settings.monotone, train.examples.columns, train.columns),
        }


def constraints(wanted: Mapping[str, int], names: tuple[str, ...], columns: IntArray | None) -> dict[str, str]:
    """XGBoost's parameter for the signs `wanted` by column; nothing where none is wanted.

    A column that the model does not see (`columns`) moves nothing. Raises ConfigError for one the data do not have.
    """
    if not wanted:
        return {}
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            hint = f"nearest: {near[0]}" if near else "these data do not name their columns"
            raise ConfigError("unknown column", field=f"gbdt.monotone.{name[:100]}", hint=hint)
    seen = names if columns is None else tuple(names[index] for index in columns)
    return {"monotone_constraints": "(" + ",".join(str(wanted.get(name, 0)) for name in seen) + ")"}


def _watching(watch: Watch, objective: Objective) -> Any:
    """XGBoost's callback that tells `watch` the validation loss of every round."""
    from xgboost.callback import TrainingCallback

    class Watching(TrainingCallback):
        def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            (values,) = evals_log[VALIDATION].values()
            watch(epoch + 1, objective.loss(values[-1]))
            return False

    return Watching()

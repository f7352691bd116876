"""The XGBoost job: three classes, histogram trees on a `QuantileDMatrix`, early stopping on the purged validation tail.

A `QuantileDMatrix` holds bin numbers instead of floats, so training needs a fraction of a plain matrix's memory.
Letters: n rows, F features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from models.gbdt import GbdtClassifier
from tickserve.config import GbdtSettings
from tickserve.manifest import Family, NanPolicy, TensorSpec, Tolerance
from training.examples import Examples, IntArray, LabelledFold, Rows
from training.job import Fit, Watch

MISSING = np.nan
TOP_COLUMNS = 10


class GbdtJob:
    """Trains `GbdtClassifier` on single feature rows."""

    family: Family = "gbdt"
    model_file = "model.ubj"
    nan_policy: NanPolicy = "native"
    tolerance = Tolerance(atol=1e-5, rtol=1e-5)

    def __init__(self, examples: Examples, settings: GbdtSettings, seed: int) -> None:
        self.examples, self.settings, self.seed = examples, settings, seed
        self.watch: Watch | None = None

    @property
    def tensor(self) -> TensorSpec:
        """`features` FP32 (F,)."""
        return TensorSpec(name="features", dtype="FP32", shape=(self.examples.features.shape[1],))

    def eligible(self, rows: IntArray) -> IntArray:
        """All: a tree looks at one row."""
        return rows

    def fit(self, fold: LabelledFold) -> Fit:
        """Boost until the validation loss has not fallen for `early_stopping_rounds`; keep the best round's trees."""
        import xgboost

        settings = self.settings
        train = self._matrix(fold.rows.train, fold, None)
        validation = self._matrix(fold.rows.validation, fold, train)
        booster = xgboost.train(
            self._parameters(),
            train,
            num_boost_round=settings.rounds,
            evals=[(validation, "validation")],
            early_stopping_rounds=settings.early_stopping_rounds,
            verbose_eval=False,
            callbacks=[_watching(self.watch)] if self.watch else None,
        )
        best = int(booster.best_iteration) + 1
        # A converter takes every tree it finds: those after the best round must not be there.
        kept = booster[:best]
        kept.set_attr(best_iteration=None, best_score=None)
        model = GbdtClassifier(kept, self.examples.features.shape[1], settings.threads)
        return Fit(model, best, len(fold.rows.train))

    def _parameters(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "objective": "multi:softprob",
            "num_class": 3,
            "eval_metric": "mlogloss",
            "tree_method": "hist",
            "device": "cpu",
            "max_depth": settings.max_depth,
            "learning_rate": settings.learning_rate,
            "subsample": settings.subsample,
            "max_bin": settings.max_bin,
            "nthread": settings.threads,
            "seed": self.seed,
        }

    def _matrix(self, rows: IntArray, fold: LabelledFold, reference: Any) -> Any:
        import xgboost

        return xgboost.QuantileDMatrix(
            self.inputs(rows),
            self.examples.classes(rows, fold.threshold),
            missing=MISSING,
            max_bin=self.settings.max_bin,
            ref=reference,
            nthread=self.settings.threads,
        )

    def inputs(self, rows: IntArray) -> Rows:
        """Feature rows [n, F]; a view where `rows` follow each other."""
        if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
            return self.examples.features[rows[0] : rows[-1] + 1]
        return self.examples.features[rows]

    def predict(self, fit: Fit, rows: IntArray) -> Rows:
        """Probabilities [n, 3] of table `rows`."""
        return self.score(fit, self.inputs(rows))

    def score(self, fit: Fit, inputs: Rows) -> Rows:
        """Probabilities [n, 3] of feature rows [n, F]."""
        model: GbdtClassifier = fit.model
        return model.predict(inputs)

    def save(self, fit: Fit, path: Path) -> None:
        """Write `.ubj`."""
        fit.model.save(path)

    def architecture(self, fit: Fit) -> dict[str, Any]:
        """Rounds and depth; the trees themselves are in the file."""
        return {
            "kind": "gbdt",
            "features": self.examples.features.shape[1],
            "rounds": fit.best,
            "max_depth": self.settings.max_depth,
        }

    def importance(self, fit: Fit, columns: tuple[str, ...]) -> list[dict[str, Any]]:
        """Columns by their share of the total gain of all splits."""
        gains = fit.model.booster.get_score(importance_type="total_gain")
        total = sum(gains.values()) or 1.0
        ranked = sorted(gains.items(), key=lambda item: (-item[1], item[0]))[:TOP_COLUMNS]
        return [{"column": columns[int(name[1:])], "gain_share": gain / total} for name, gain in ranked]


def _watching(watch: Watch) -> Any:
    """XGBoost's callback that tells `watch` the validation loss of every round."""
    from xgboost.callback import TrainingCallback

    class Watching(TrainingCallback):
        def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            (losses,) = evals_log["validation"].values()
            watch(epoch + 1, losses[-1])
            return False

    return Watching()

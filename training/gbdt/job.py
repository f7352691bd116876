"""The XGBoost job: a task's trees on a fold's rows and columns, early stopping on the purged validation tail.

Whatever the task, three probabilities come out: a margin goes through a link fitted on the validation rows. The job
holds nothing but what it was given, so that several can run beside each other. Letters: n rows, F features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.gbdt import GbdtClassifier
from tickserve.config import GbdtSettings
from tickserve.manifest import Family, NanPolicy, TensorSpec, Tolerance
from training.examples import Examples, IntArray, LabelledFold, Rows
from training.gbdt.boosting import Boosting
from training.gbdt.calibration import fit_link
from training.gbdt.device import place
from training.gbdt.matrix import Source, take
from training.gbdt.objective import objective_of
from training.gbdt.selection import select_columns
from training.job import Fit, Watch

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
        """Boost until the validation metric is no better for `early_stopping_rounds`; keep the best round's trees.

        Raises ConfigError for a column that is not there, ComponentError for a device that is not.
        """
        settings, train = self.settings, fold.rows.train
        objective = objective_of(self.examples, train, fold.threshold, settings)
        columns = self._columns(fold)
        boosting = Boosting(settings, self.seed, place(settings))
        learned, held_out = (Source(self.examples, rows, objective, columns) for rows in (train, fold.rows.validation))
        booster = boosting.stopped(learned, held_out, self.watch)
        model = GbdtClassifier(booster, int(booster.num_features()), settings.threads)
        if settings.task != "classification":
            margins = model.margin(take(self.examples.features, fold.rows.validation, columns))
            model.link = fit_link(margins, self.examples.classes(fold.rows.validation, fold.threshold))
        return Fit(model, int(booster.num_boosted_rounds()), len(train), columns)

    def _columns(self, fold: LabelledFold) -> IntArray | None:
        if not self.settings.top_features:
            return None
        return select_columns(self.examples, fold.rows.train, fold.threshold, self.settings, self.seed)

    def inputs(self, rows: IntArray) -> Rows:
        """Feature rows [n, F]; a view where `rows` follow each other."""
        return take(self.examples.features, rows)

    def predict(self, fit: Fit, rows: IntArray) -> Rows:
        """Probabilities [n, 3] of table `rows`."""
        return self.score(fit, take(self.examples.features, rows, fit.columns))

    def score(self, fit: Fit, inputs: Rows) -> Rows:
        """Probabilities [n, 3] of feature rows [n, F], F as many as the model takes."""
        model: GbdtClassifier = fit.model
        return model.predict(inputs)

    def save(self, fit: Fit, path: Path) -> None:
        """Write `.ubj`."""
        fit.model.save(path)

    def architecture(self, fit: Fit) -> dict[str, Any]:
        """Task, rounds and depth, where it was trained, and the link; the trees themselves are in the file."""
        model: GbdtClassifier = fit.model
        return {
            "kind": "gbdt",
            "task": self.settings.task,
            "features": model.features,
            "rounds": fit.best,
            "max_depth": self.settings.max_depth,
            **place(self.settings).to_json(),
        } | ({"link": model.link.to_json()} if model.link else {})

    def importance(self, fit: Fit, columns: tuple[str, ...]) -> list[dict[str, Any]]:
        """Columns by their share of the total gain of all splits."""
        seen = columns if fit.columns is None else tuple(columns[index] for index in fit.columns)
        gains = fit.model.booster.get_score(importance_type="total_gain")
        total = sum(gains.values()) or 1.0
        ranked = sorted(gains.items(), key=lambda item: (-item[1], item[0]))[:TOP_COLUMNS]
        return [{"column": seen[int(name[1:])], "gain_share": gain / total} for name, gain in ranked]

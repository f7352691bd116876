"""Which columns a fold's model sees: those whose splits gained most in a short forest on the fold's training rows.

The rows are handed in, so that a probe can ask whether any other row has a say. Letters: n rows, F columns.
"""

from __future__ import annotations

import numpy as np

from tickserve.config import GbdtSettings
from tickserve.errors import ConfigError
from training.examples import Examples, FloatArray, IntArray
from training.gbdt.boosting import Boosting
from training.gbdt.device import place
from training.gbdt.matrix import Source
from training.gbdt.objective import objective_of

ROUNDS = 50


def select_columns(examples: Examples, rows: IntArray, threshold: float, settings: GbdtSettings, seed: int) -> IntArray:
    """Positions, rising, of the `settings.top_features` columns of highest total gain over the table `rows` [n].

    The forest has `ROUNDS` rounds of the task's own objective. Columns of equal gain are taken in the table's order.
    Raises ConfigError when there are no more columns than are asked for.
    """
    features, wanted = examples.features.shape[1], settings.top_features
    if wanted >= features:
        hint = "0 keeps all"
        expected = f"fewer than the {features} columns"
        raise ConfigError(
            "nothing to leave out", field="gbdt.top_features", expected=expected, was=str(wanted), hint=hint
        )
    gains = column_gains(examples, rows, threshold, settings, seed)
    chosen: IntArray = np.sort(np.argsort(-gains, kind="stable")[:wanted]).astype(np.int64)
    return chosen


def column_gains(examples: Examples, rows: IntArray, threshold: float, settings: GbdtSettings, seed: int) -> FloatArray:
    """Total gain of each column's splits [F] in that forest; 0 where a column has none."""
    objective = objective_of(examples, rows, threshold, settings)
    forest = Boosting(settings, seed, place(settings)).unstopped(Source(examples, rows, objective), ROUNDS)
    gains = np.zeros(examples.features.shape[1])
    for name, gain in forest.get_score(importance_type="total_gain").items():
        gains[int(name[1:])] = gain
    return gains

"""A guard against features that know the answer: one that ranks the future almost perfectly is no feature.

No honest single column of market data comes near the limit; a column that holds the future return, its class, or the
future price does.
"""

from __future__ import annotations

import numpy as np

from tickserve.errors import GateRefusedError
from training.examples import Examples, FloatArray, IntArray, evenly
from training.metrics import rank_correlation

# |Spearman| with the forward return, or with its class.
MAX_RANK_CORRELATION = 0.95
PROBE_ROWS = 20_000
MIN_FINITE_ROWS = 50


def refuse_leaks(examples: Examples, columns: tuple[str, ...]) -> None:
    """Raise GateRefusedError naming the first feature column that ranks the labels of the training rows.

    The training rows of the published fold are looked at (they include those of every earlier fold).
    """
    rows = evenly(examples.published.rows.train, PROBE_ROWS)
    ret = examples.ret[rows]
    classes = examples.classes(rows, examples.published.threshold)
    for index, column in enumerate(columns):
        found = strongest(examples.features[rows, index].astype(np.float64), ret, classes)
        if found > MAX_RANK_CORRELATION:
            raise GateRefusedError(
                "the label leaks into a feature",
                field=column,
                expected=f"|Spearman| with the forward return of at most {MAX_RANK_CORRELATION}",
                was=f"{found:.3f}",
                hint="this column knows the future: look at how it is computed",
            )


def strongest(values: FloatArray, ret: FloatArray, classes: IntArray) -> float:
    """The larger |Spearman| of a column with the return and with the class; 0 where hardly anything is finite."""
    finite = np.isfinite(values)
    if finite.sum() < MIN_FINITE_ROWS:
        return 0.0
    found = (rank_correlation(values[finite], target[finite]) for target in (ret, classes.astype(np.float64)))
    return max(abs(value or 0.0) for value in found)

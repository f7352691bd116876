"""Jumps: steps of the price that are no trading move; splits, reused tickers and bad prints leave them in raw bars.

One constant says what a jump is; readers count by it, sessions end at it, and no label spans one. A real move of that
size in one step is treated alike: from prices alone the two cannot be told apart. Letters: N rows, in time order.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

# By more than this factor, up or down. Symmetric in the ratio, because a 2-for-1 split shows as -50 % give or take the
# day's move: a limit of 50 % either way would miss half of them.
JUMP_FACTOR: Final = 1.5


def priced(price: FloatArray) -> BoolArray:
    """Which of the prices [N] are positive numbers."""
    known: BoolArray = np.isfinite(price) & (price > 0)
    return known


def jumps(price: FloatArray, before: float = np.nan) -> BoolArray:
    """Rows (bool [N]) whose price jumped since the last row with a price.

    `before` is the last price in front of the rows; rows without a price never jump.
    """
    jumped = np.zeros(len(price), dtype=bool)
    rows = np.flatnonzero(priced(price))
    if len(rows):
        known = price[rows]
        ratio = known / np.concatenate([[before], known[:-1]])
        jumped[rows] = (ratio > JUMP_FACTOR) | (ratio < 1 / JUMP_FACTOR)  # False where `before` is unknown
    return jumped

"""Rings of rows, as the bar features keep them.

Every window lives in a slice of float64 words that starts as zeros, so that a reset is one fill. Rings wrap by
comparison. Letters: `s` a state slice, `n` a number of rows.
"""

# numpy types an element of a float64 array as Any; these functions return floats.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tickserve.features.jit import inlined

Words = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Singles = npt.NDArray[np.float32]


@inlined
def turn(s: Words, n: int) -> int:
    """Advance a ring of `n` rows and return the slot to write. s[0] is the next slot, s[1] how many are filled."""
    slot = int(s[0])
    s[0] = 0.0 if slot + 1 == n else slot + 1.0
    if s[1] < n:
        s[1] += 1.0
    return slot


@inlined
def lagged(value: float, s: Words, n: int) -> float:
    """The value `n` rows ago, or the oldest there is. s = [slot, filled, -, -, ring of n]."""
    full = s[1] == n
    slot = turn(s, n)
    old = s[4 + slot] if full else s[4]
    if s[1] == 1.0 and not full:
        old = value
    s[4 + slot] = value
    return old


@inlined
def rolled(value: float, s: Words, n: int, slot: int, total: int, ring: int) -> float:
    """The sum of the last `n` values, kept in s[total] over the ring at s[ring].

    Summed afresh whenever the ring wraps, so that rounding never builds up.
    """
    s[total] += value - s[ring + slot]
    s[ring + slot] = value
    if slot + 1 == n:
        fresh = 0.0
        for j in range(n):
            fresh += s[ring + j]
        s[total] = fresh
    return s[total]

"""Bounded memory of the past, as the update functions keep it: decays in elapsed time, rings of rows, time horizons.

Every window lives in a slice of float64 words that starts as zeros, so that a reset is one fill. Rings wrap by
comparison. Letters: `s` a state slice, `n` a number of rows.

Moving averages of unevenly spaced events follow Eckner (2014), "Algorithms for Unevenly Spaced Time Series: Moving
Averages and Other Rolling Operators": the weight of the past falls by exp(-dt / tau).
"""

# numpy types an element of a float64 array as Any; these functions return floats.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tickserve.features.catalog import HORIZON_CAPACITY, HORIZON_HEADER, HORIZON_SLOTS
from tickserve.features.jit import inlined

Words = npt.NDArray[np.float64]

# Decayed sums below this are zero: without it a quiet stream slides into slow subnormal numbers.
FLOOR = 1e-200


@inlined
def decay(dt: float, rate: float) -> float:
    """What remains of the past after `dt` seconds at `rate` = 1 / tau: exp(-dt / tau)."""
    if dt <= 0.0:
        return 1.0
    return math.exp(-dt * rate)


@inlined
def faded(value: float, factor: float) -> float:
    """`value * factor`, or 0 once it is below any meaning."""
    product = value * factor
    return product if abs(product) > FLOOR else 0.0


@inlined
def deviation(value: float, now: float, rate: float, s: Words) -> float:
    """`value` less its exponential moving average in elapsed time. NaN leaves the average as it was.

    s = [average, time of the last value, seen].
    """
    if not math.isfinite(value):
        return math.nan
    if s[2] == 0.0:
        s[0] = value
        s[2] = 1.0
    else:
        s[0] += (1.0 - decay(now - s[1], rate)) * (value - s[0])
    s[1] = now
    return value - s[0]


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


@inlined
def horizon_start(value: float, now: float, horizon: float, s: Words) -> float:
    """The value as it stood `horizon` seconds ago, or the first of the session until then.

    Samples are kept at least horizon / 64 seconds apart, so the memory is bounded at any event rate. The answer is the
    newest sample as old as the horizon: the newest such event, or one at most horizon / 64 before that event. By
    that spacing the ring cannot overflow; were it to, the oldest sample would go.
    s = [slot of the oldest, samples, time of the newest, -, times, values].
    """
    oldest = int(s[0])
    samples = int(s[1])
    if samples == 0 or now - s[2] >= horizon / HORIZON_SLOTS:
        if samples == HORIZON_CAPACITY:
            oldest = 0 if oldest + 1 == HORIZON_CAPACITY else oldest + 1
            samples -= 1
        slot = oldest + samples
        if slot >= HORIZON_CAPACITY:
            slot -= HORIZON_CAPACITY
        s[HORIZON_HEADER + slot] = now
        s[HORIZON_HEADER + HORIZON_CAPACITY + slot] = value
        s[2] = now
        samples += 1
    limit = now - horizon
    while samples > 1:
        following = 0 if oldest + 1 == HORIZON_CAPACITY else oldest + 1
        if s[HORIZON_HEADER + following] > limit:
            break
        oldest = following
        samples -= 1
    s[0] = oldest
    s[1] = samples
    return s[HORIZON_HEADER + HORIZON_CAPACITY + oldest]

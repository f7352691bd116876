"""The two compiled kernels over the one set of update functions: `columns` for a chunk, `step` for one event.

Neither knows the spec: they read a plan of kind numbers and offsets, so that any spec runs without compiling.
Letters: N events, C columns of a row, F features, G the features of one thread.

plan int64 [G, 5]: kind, offset of the parameters, of the state, its end (in `memory`), output column.
clock int64 [4]: time of the last event, start of the session, events seen in it, longest gap inside a session.
carry float64 [CARRY_WORDS]: what the derivation carries from event to event, then room for X_WORDS derived values.
"""

# numpy types an element of a float64 array as Any; these functions return floats.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tickserve.features.bar_updates import derive_bar, update_bars
from tickserve.features.book_updates import derive_book, update_book
from tickserve.features.catalog import FIRST_BAR_ID
from tickserve.features.jit import inlined, kernel, source_fingerprint
from tickserve.features.windows import Words

Longs = npt.NDArray[np.int64]
Singles = npt.NDArray[np.float32]

LAST_TS, START_TS, SEEN, GAP = range(4)
X_WORDS: Final = 16
CARRY_WORDS: Final = 24
# Events derived at a time: their derived values and rows stay in the second-level cache while features pass over.
BLOCK: Final = 1_024
LARGEST: Final = 3.4028234e38


@inlined
def advance(ts_ns: int, clock: Longs) -> float:
    """Move the clock to an event; seconds since the one before, 0 for the first of a session and for a step back."""
    since = ts_ns - clock[LAST_TS]
    if clock[SEEN] == 0 or since > clock[GAP]:
        clock[START_TS] = ts_ns
        clock[LAST_TS] = ts_ns
        clock[SEEN] = 1
        return 0.0
    clock[SEEN] += 1
    if since <= 0:
        return 0.0
    clock[LAST_TS] = ts_ns
    return since * 1e-9


@inlined
def derive(bars: bool, ts_ns: int, dt: float, clock: Longs, row: Words, carry: Words, x: Words) -> None:
    """The derived values of one event into `x`."""
    now = (clock[LAST_TS] - clock[START_TS]) * 1e-9
    first = clock[SEEN] == 1
    if bars:
        derive_bar(ts_ns, now, dt, first, row, carry, x)
    else:
        derive_book(ts_ns, now, dt, first, row, carry, x)


@inlined
def update(kind: int, first: bool, x: Words, row: Words, p: Words, s: Words) -> float:
    """One feature after one event; its state starts anew with a session, and what is not finite is one NaN."""
    if first:
        s[:] = 0.0
    value = update_bars(kind, x, p, s) if kind >= FIRST_BAR_ID else update_book(kind, x, row, p, s)
    return value if abs(value) <= LARGEST else math.nan


def _bound(fingerprint: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The kernels, with the engine's source digest captured so that it is part of numba's cache key."""

    @kernel(
        "void(Array(int64, 1, 'C', readonly=True), Array(float64, 2, 'C', readonly=True), int64[::1], float64[::1], "
        "int64[:,::1], float64[::1], float64[:,::1], int64[::1], int64[::1], float32[:,::1])"
    )
    def columns(
        ts_ns: Longs,
        values: Words,
        clock: Longs,
        carry: Words,
        plan: Longs,
        memory: Words,
        block: Words,
        opens: Longs,
        index: Longs,
        out: Singles,
    ) -> None:
        """Write G rows of `out` [F, N]; `index` [N], if not empty, takes each event's place in its session."""
        if fingerprint < 0 or len(plan) == 0:
            return
        bars = plan[0, 0] >= FIRST_BAR_ID
        for start in range(0, len(ts_ns), BLOCK):
            stop = min(start + BLOCK, len(ts_ns))
            for i in range(start, stop):
                dt = advance(ts_ns[i], clock)
                opens[i - start] = 1 if clock[SEEN] == 1 else 0
                derive(bars, ts_ns[i], dt, clock, values[i], carry, block[i - start])
                if len(index) > 0:
                    index[i] = clock[SEEN] - 1
            for f in range(len(plan)):
                kind = plan[f, 0]
                p = memory[plan[f, 1] : plan[f, 2]]
                s = memory[plan[f, 2] : plan[f, 3]]
                column = out[plan[f, 4]]
                for i in range(start, stop):
                    column[i] = update(kind, opens[i - start] == 1, block[i - start], values[i], p, s)

    @kernel("void(int64, float64[::1], int64[::1], float64[::1], int64[:,::1], float64[::1], float32[::1])")
    def step(ts_ns: int, row: Words, clock: Longs, carry: Words, plan: Longs, memory: Words, out: Singles) -> None:
        """All features after one event into `out`, float32 [F]."""
        if fingerprint < 0 or len(plan) == 0:
            return
        x = carry[CARRY_WORDS - X_WORDS :]
        dt = advance(ts_ns, clock)
        derive(plan[0, 0] >= FIRST_BAR_ID, ts_ns, dt, clock, row, carry, x)
        for f in range(len(plan)):
            p = memory[plan[f, 1] : plan[f, 2]]
            s = memory[plan[f, 2] : plan[f, 3]]
            out[plan[f, 4]] = update(plan[f, 0], clock[SEEN] == 1, x, row, p, s)

    return columns, step


columns, step = _bound(source_fingerprint())

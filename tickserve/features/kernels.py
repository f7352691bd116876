"""The compiled kernels: `advance` computes all features of a chunk, and one event is a chunk of one.

`step` is `advance` behind a door without arrays to build, so online and batch cannot differ: it is the same machine code.
No kernel knows the spec: they read a plan of kind numbers and offsets, so that any spec runs without compiling.
Letters: N events, C columns of a row, F features, G the features of one thread, T distinct time constants.

plan int64 [G, 5]: kind, offset of the parameters, of the state, its end (in `memory`), output column.
clock int64 [CLOCK_WORDS + T]: time of the last event, start of the session, events seen in it, longest gap inside a
session; for books the place in `past` to write next, the events kept before it, T; scratch; last `uses`.
words float64: what the derivation carries from event to event [CARRY_WORDS], for books then the rates [T] and the
tables of `book_stage.py` in the order of `words_of_books`, for bars the columns of their clock and each bar's derived values.
"""

# numpy types an element of a float64 array as Any; these functions return floats.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from tickserve.features.bar_updates import derive_bar, update_bars
from tickserve.features.book_stage import (
    DT, LEVEL_0, MOVES, NOW, PAST_COLUMNS, ROW, SPAN, SUMS, TILE, X_COLUMNS, open_session, stage_book,
)  # fmt: skip
from tickserve.features.book_updates import LARGEST, update_book
from tickserve.features.catalog import FIRST_BAR_ID
from tickserve.features.jit import inlined, kernel, source_fingerprint
from tickserve.features.windows import Longs, Singles, Words

LAST_TS, START_TS, SEEN, GAP, POS, HISTORY, TAUS, TIME, CLOCK_WORDS = range(9)
X_WORDS: Final = 16
CARRY_WORDS: Final = 16
SCRATCH_COLUMNS: Final = 2

_READ_LONGS: Final = "Array(int64, 1, 'C', readonly=True)"
_READ_ROWS: Final = "Array(float64, 2, 'C', readonly=True)"
_STATE: Final = "int64[::1], float64[::1], int64[:,::1], float64[::1]"


def words_of_books(taus: int, history: int, levels: int) -> int:
    """How many `words` there are for books."""
    columns = X_COLUMNS + max(taus, 1) + 4 * levels + SCRATCH_COLUMNS  # x, book, scratch
    tables = columns * ROW + PAST_COLUMNS * (history + SPAN) + taus * (TILE + 1) * (SUMS + MOVES)
    return CARRY_WORDS + taus + tables


def words_of_bars() -> int:
    """How many `words` there are for bars."""
    return CARRY_WORDS + 2 * ROW + TILE * X_WORDS


@inlined
def take(ts_ns: Longs, start: int, room: int, clock: Longs, x: Words, index: Longs) -> int:
    """Move the clock over at most `room` events of one session from `start`; how many it took.

    Writes seconds since the session's start (NOW) and since the event before (DT): 0 for the first of a session and
    for a step back. Where the events begin a session, `clock[SEEN]` is then what it took.
    """
    last, begun, seen, gap = clock[LAST_TS], clock[START_TS], clock[SEEN], clock[GAP]
    now, dts, n = x[NOW], x[DT], 0
    for i in range(start, start + room):
        ts = ts_ns[i]
        since = ts - last
        if seen == 0 or since > gap:
            if n > 0:
                break
            last, begun, seen, since = ts, ts, 0, 0
        since = max(since, 0)
        last += since
        now[n] = (last - begun) * 1e-9
        dts[n] = since * 1e-9
        if len(index) > 0:
            index[i] = seen
        seen += 1
        n += 1
    clock[LAST_TS], clock[START_TS], clock[SEEN] = last, begun, seen
    return n


@inlined
def forget(plan: Longs, memory: Words) -> None:
    """Zero the state of every feature of the plan."""
    for f in range(len(plan)):
        memory[plan[f, 2] : plan[f, 3]] = 0.0


@inlined
def keep(n: int, pos: int, history: int, past: Words, sums: Words, moves: Words) -> int:
    """Carry the tables over to the next tile; its place in `past`."""
    for t in range(len(sums)):
        for j in range(sums.shape[2]):
            sums[t, 0, j] = sums[t, n, j]
        for j in range(moves.shape[2]):
            moves[t, 0, j] = moves[t, n, j]
    if pos + n < past.shape[1]:
        return pos + n
    for column in past:
        for j in range(history):
            column[j] = column[pos + n - history + j]
    return history


@inlined
def advance_books(
    ts_ns: Longs, values: Words, clock: Longs, words: Words, plan: Longs, memory: Words, index: Longs, out: Singles
) -> None:
    """`advance` for order books: tile by tile, a tile never reaching over the start of a session."""
    taus, history, levels = clock[TAUS], clock[HISTORY], (values.shape[1] - LEVEL_0) // 4
    carry, a = words[:CARRY_WORDS], CARRY_WORDS
    rates, uses, a = words[a : a + taus], clock[CLOCK_WORDS:], a + taus
    rows = X_COLUMNS + max(taus, 1)
    x, a = words[a : a + rows * ROW].reshape((rows, ROW)), a + rows * ROW
    book, a = words[a : a + 4 * levels * ROW].reshape((4 * levels, ROW)), a + 4 * levels * ROW
    scratch, a = words[a : a + SCRATCH_COLUMNS * ROW].reshape((SCRATCH_COLUMNS, ROW)), a + SCRATCH_COLUMNS * ROW
    past, a = words[a : a + PAST_COLUMNS * (history + SPAN)], a + PAST_COLUMNS * (history + SPAN)
    past_of = past.reshape((PAST_COLUMNS, history + SPAN))
    depth = taus * (TILE + 1)
    sums, a = words[a : a + depth * SUMS].reshape((taus, TILE + 1, SUMS)), a + depth * SUMS
    moves = words[a : a + depth * MOVES].reshape((taus, TILE + 1, MOVES))
    start = 0
    while start < len(ts_ns):
        room = min(TILE, history + SPAN - clock[POS], len(ts_ns) - start)
        n = take(ts_ns, start, room, clock, x, index)
        seen = clock[SEEN] - n
        if seen == 0:
            clock[POS] = history
            forget(plan, memory)
            open_session(carry, x, past_of[:, :history], sums, moves)
        pos, stop = clock[POS], start + n
        stage_book(n, values[start:stop], pos, uses, rates, carry, x, book, past_of, sums, moves)
        times = ts_ns[start:stop]
        for f in range(len(plan)):
            p, s = memory[plan[f, 1] : plan[f, 2]], memory[plan[f, 2] : plan[f, 3]]
            y = out[plan[f, 4], start:stop]
            update_book(plan[f, 0], times, pos, seen, x, book, scratch, past_of, sums, moves, p, s, y)
        clock[POS] = keep(n, pos, history, past_of, sums, moves)
        start = stop


@inlined
def update_bar(kind: int, first: bool, x: Words, p: Words, s: Words) -> float:
    """One feature after one bar; its state starts anew with a session, and what is not finite is one NaN."""
    if first:
        s[:] = 0.0
    value = update_bars(kind, x, p, s)
    return value if abs(value) <= LARGEST else math.nan


@inlined
def advance_bars(
    ts_ns: Longs, values: Words, clock: Longs, words: Words, plan: Longs, memory: Words, index: Longs, out: Singles
) -> None:
    """`advance` for bars: a tile is derived, then every feature passes over it."""
    carry, clocks = words[:CARRY_WORDS], words[CARRY_WORDS : CARRY_WORDS + 2 * ROW].reshape((2, ROW))
    x = words[CARRY_WORDS + 2 * ROW :].reshape((TILE, X_WORDS))
    start = 0
    while start < len(ts_ns):
        n = take(ts_ns, start, min(TILE, len(ts_ns) - start), clock, clocks, index)
        opens = clock[SEEN] == n
        for i in range(n):
            now, dt = clocks[NOW, i], clocks[DT, i]
            derive_bar(ts_ns[start + i], now, dt, opens and i == 0, values[start + i], carry, x[i])
        for f in range(len(plan)):
            p, s = memory[plan[f, 1] : plan[f, 2]], memory[plan[f, 2] : plan[f, 3]]
            column = out[plan[f, 4], start : start + n]
            for i in range(n):
                column[i] = update_bar(plan[f, 0], opens and i == 0, x[i], p, s)
        start += n


def _bound(fingerprint: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The kernels, with the engine's source digest captured so that it is part of numba's cache key."""

    @kernel(f"void({_READ_LONGS}, {_READ_ROWS}, {_STATE}, int64[::1], float32[:,::1])")
    def advance(
        ts_ns: Longs, values: Words, clock: Longs, words: Words, plan: Longs, memory: Words, index: Longs, out: Singles
    ) -> None:
        """Write G rows of `out` [F, N]; `index` [N], if not empty, takes each event's place in its session."""
        if fingerprint < 0 or len(plan) == 0:
            return
        if plan[0, 0] >= FIRST_BAR_ID:
            advance_bars(ts_ns, values, clock, words, plan, memory, index, out)
        else:
            advance_books(ts_ns, values, clock, words, plan, memory, index, out)

    @kernel(f"void(int64, float64[::1], {_STATE}, float32[::1])")
    def step(ts_ns: int, row: Words, clock: Longs, words: Words, plan: Longs, memory: Words, out: Singles) -> None:
        """All features after one event into `out`, float32 [F]."""
        if fingerprint < 0:
            return
        clock[TIME] = ts_ns
        rows, columns = row.reshape((1, len(row))), out.reshape((len(out), 1))
        advance(clock[TIME : TIME + 1], rows, clock, words, plan, memory, clock[:0], columns)

    return advance, step


advance, step = _bound(source_fingerprint())

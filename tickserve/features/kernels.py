"""The compiled kernel: `advance` computes all features of a chunk of events, and online the chunk is one event.

So online and batch cannot differ by how they were compiled: they are the same machine code. The kernel does not know
the spec: it reads a plan of kind numbers and offsets, so that any spec runs without compiling.
Letters: N events, C columns of a row, F features, G the features of one thread, T distinct time constants.

plan int64 [G, 5]: kind, offset of the parameters, of the state, its end (in `memory`), output column.
clock int64 [CLOCK_WORDS + T]: time of the last event, start of the session, events seen in it, longest gap inside a
session; for books the place in `past` to write next, the events kept before it, T, then `uses`.
words float64: what the derivation carries from event to event [CARRY_WORDS], for books then the rates [T] and the
tables of `book_stage.py` in the order of `words_of_books`; for bars the clock's columns and each bar's derived values.
"""

# numpy types an element of a float64 array as Any; these functions return floats.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from tickserve.features.bar_updates import derive_bar, update_bars
from tickserve.features.book_stage import (
    DT,
    LEVEL_0,
    MOVES,
    NOW,
    PAST_COLUMNS,
    ROW,
    SPAN,
    SUMS,
    TILE,
    X_COLUMNS,
    open_session,
    stage_book,
)  # fmt: skip
from tickserve.features.book_updates import LARGEST, update_book
from tickserve.features.catalog import FIRST_BAR_ID
from tickserve.features.jit import inlined, kernel, source_fingerprint, table
from tickserve.features.windows import Longs, Singles, Words

LAST_TS, START_TS, SEEN, GAP, POS, HISTORY, TAUS, CLOCK_WORDS = range(8)
X_WORDS: Final = 16
CARRY_WORDS: Final = 16
SCRATCH_COLUMNS: Final = 2


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
    rows, depth = X_COLUMNS + max(taus, 1), TILE + 1
    x, a = table(words, a, (rows, ROW)), a + rows * ROW
    book, a = table(words, a, (4 * levels, ROW)), a + 4 * levels * ROW
    scratch, a = table(words, a, (SCRATCH_COLUMNS, ROW)), a + SCRATCH_COLUMNS * ROW
    past, a = table(words, a, (PAST_COLUMNS, history + SPAN)), a + PAST_COLUMNS * (history + SPAN)
    sums, a = table(words, a, (taus, depth, SUMS)), a + taus * depth * SUMS
    moves = table(words, a, (taus, depth, MOVES))
    start = 0
    while start < len(ts_ns):
        room = min(TILE, history + SPAN - clock[POS], len(ts_ns) - start)
        n = take(ts_ns, start, room, clock, x, index)
        seen = clock[SEEN] - n
        if seen == 0:
            clock[POS] = history
            forget(plan, memory)
            open_session(carry, x, past[:, :history], sums, moves)
        pos, stop = clock[POS], start + n
        stage_book(n, values[start:stop], pos, uses, rates, carry, x, book, past, sums, moves)
        times = ts_ns[start:stop]
        for f in range(len(plan)):
            p, s = memory[plan[f, 1] : plan[f, 2]], memory[plan[f, 2] : plan[f, 3]]
            y = out[plan[f, 4], start:stop]
            update_book(plan[f, 0], times, pos, seen, x, book, scratch, past, sums, moves, p, s, y)
        clock[POS] = keep(n, pos, history, past, sums, moves)
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
    carry, clocks = words[:CARRY_WORDS], table(words, CARRY_WORDS, (2, ROW))
    x = table(words, CARRY_WORDS + 2 * ROW, (TILE, X_WORDS))
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


def _bound(fingerprint: int) -> Callable[..., Any]:
    """The kernel, with the engine's source digest captured so that it is part of numba's cache key."""

    @kernel(
        "void(Array(int64, 1, 'C', readonly=True), Array(float64, 1, 'C', readonly=True), int64[::1], float64[::1], "
        "int64[:,::1], float64[::1], int64[::1], float32[::1])"
    )
    def advance(
        ts_ns: Longs, values: Words, clock: Longs, words: Words, plan: Longs, memory: Words, index: Longs, out: Singles
    ) -> None:
        """Write G rows of `out` [F, N] from `values` [N, C], both flat, so that a lone event is passed as it is.

        `index` [N], if not empty, takes each event's place in its session.
        """
        count = len(ts_ns)
        if fingerprint < 0 or len(plan) == 0 or count == 0:
            return
        rows, columns = table(values, 0, (count, len(values) // count)), table(out, 0, (len(out) // count, count))
        if plan[0, 0] >= FIRST_BAR_ID:
            advance_bars(ts_ns, rows, clock, words, plan, memory, index, columns)
        else:
            advance_books(ts_ns, rows, clock, words, plan, memory, index, columns)

    return advance


advance = _bound(source_fingerprint())

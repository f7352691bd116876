"""A seeded order-book simulator. **What it makes is not market data**, and every output that uses it says so.

It lets the pipeline run on a machine without market data and gives tests a source whose properties are known. Nothing
about a real market follows from a model's score on it: the simulator is built to hold something a model can learn.

The dynamics are zero-intelligence order flow (Smith, Farmer, Gillemot, Krishnamurthy 2003) on a ladder of ticks: limit
orders arrive at geometric distances from the best price, cancellations take orders away, market orders take the best
level and may walk up to three. Two things are added:

- arrivals cluster: the rate is a Hawkes process, base rate plus an excitement that every market order raises and that
  decays exponentially (Ogata 1981 thinning);
- flow leans: a hidden *pressure* (an Ornstein-Uhlenbeck process, seconds long) tilts which side limit orders join,
  which side cancels and which side market orders take. So imbalance, order flow, trade signs and recent moves mildly
  predict the next move of the mid. A weak pull back to the first price keeps long runs bounded.

Letters: N events, C columns, L levels (as in `tickserve.events`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from market.readers.source import Source
from tickserve.errors import UsageError
from tickserve.events import Events, book_columns
from tickserve.store import canonical_json, sha256_bytes, sha256_file

if TYPE_CHECKING:
    from numba import njit
else:
    from tickserve.features.jit import njit  # numba as the features use it: without SVML

# 2000-01-01T00:00:00Z: a date nobody takes for a recording.
START_NS = 946_684_800_000_000_000
START_TICK = 10_000
# Dividing gives the float nearest to the decimal price; multiplying by 0.01 does not.
TICKS_PER_UNIT = 100.0
LOTS_PER_UNIT = 10.0
BURN_IN_ROWS = 2_000
MAX_LEVELS = 20

BASE_RATE_HZ = 20.0
EXCITE_HZ = 30.0
EXCITE_DECAY_HZ = 12.0
PRESSURE_SECONDS = 2.0
MARKET_LEAN = 0.15
LIMIT_LEAN = 0.10
PULL_TICKS = 1_000.0
MARKET_SHARE = 0.15
TARGET_LOTS = 12.0
WIDE_SPREAD_TICKS = 8
SWEEP_LEVELS = 3

# The ladder is a ring of ticks; both sides' windows and the widest spread fit into it with room to spare.
RING = 1_024
BEST_BID, BEST_ASK, CLOCK_NS, PENDING_LOTS, PENDING_SIGN = range(5)
EXCITE, PRESSURE = range(2)

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@njit(cache=True)
def _new_lots(rng: np.random.Generator) -> int:
    return int(1 + rng.standard_exponential() * (TARGET_LOTS - 1.0))


@njit(cache=True)
def _own_best(state: Int64s, sign: int) -> int:
    return int(state[BEST_BID] if sign > 0 else state[BEST_ASK])


@njit(cache=True)
def _filled_levels(ladder: Int64s, state: Int64s, depth: int, sign: int) -> int:
    best, count = _own_best(state, sign), 0
    for step in range(depth):
        count += ladder[(best - sign * step) % RING] > 0
    return count


@njit(cache=True)
def _move_best(ladder: Int64s, state: Int64s, depth: int, sign: int, new: int, rng: np.random.Generator) -> None:
    """Set one side's best; cells that leave its window empty, cells that enter it fill with resting orders."""
    old = _own_best(state, sign)
    for step in range((new - old) * sign):
        ladder[(old - sign * (depth - 1) + sign * step) % RING] = 0
    for step in range((old - new) * sign):
        ladder[(old - sign * depth - sign * step) % RING] = _new_lots(rng)
    state[BEST_BID if sign > 0 else BEST_ASK] = new


@njit(cache=True)
def _retreat(ladder: Int64s, state: Int64s, depth: int, sign: int, rng: np.random.Generator) -> None:
    """Move one side's best away to its next filled tick, when the best is empty."""
    best = _own_best(state, sign)
    tick = best
    while ladder[tick % RING] == 0:
        tick -= sign
    if tick != best:
        _move_best(ladder, state, depth, sign, tick, rng)


@njit(cache=True)
def _limit(ladder: Int64s, state: Int64s, depth: int, sign: int, rng: np.random.Generator) -> None:
    """A limit order: inside the spread where there is room, else at a geometric distance behind the best."""
    best, spread = _own_best(state, sign), state[BEST_ASK] - state[BEST_BID]
    if spread > WIDE_SPREAD_TICKS or (spread > 1 and rng.random() < 0.25 + 0.1 * spread):
        tick = best + sign
        ladder[tick % RING] = _new_lots(rng)
        _move_best(ladder, state, depth, sign, tick, rng)
        return
    distance = min(int(rng.standard_exponential() * 2.0), depth - 1)
    ladder[(best - sign * distance) % RING] += 1 + int(rng.standard_exponential() * 3.0)


@njit(cache=True)
def _cancel(ladder: Int64s, state: Int64s, levels: int, depth: int, sign: int, rng: np.random.Generator) -> None:
    """Part of one tick's queue goes away; a side never falls below L filled ticks."""
    best = _own_best(state, sign)
    cell = (best - sign * min(int(rng.standard_exponential() * 2.0), depth - 1)) % RING
    lots = min(ladder[cell], 1 + int(rng.standard_exponential() * 0.3 * ladder[cell]))
    if lots == ladder[cell] and _filled_levels(ladder, state, depth, sign) <= levels + SWEEP_LEVELS:
        return
    ladder[cell] -= lots
    _retreat(ladder, state, depth, sign, rng)


@njit(cache=True)
def _market_order(ladder: Int64s, state: Int64s, levels: int, depth: int, sign: int, rng: np.random.Generator) -> None:
    """Set the lots that a market order (+1 buys) takes; at most three ticks deep, and never below L filled ticks."""
    best = _own_best(state, -sign)
    available, step, ticks = 0, 0, 0
    most = SWEEP_LEVELS if _filled_levels(ladder, state, depth, -sign) > levels + SWEEP_LEVELS else 0
    while ticks < most and step < depth:
        lots = ladder[(best + sign * step) % RING]
        available += lots
        ticks += lots > 0
        step += 1
    if most == 0:
        available = ladder[best % RING] - 1
    state[PENDING_LOTS] = min(available, 1 + int(rng.standard_exponential() * 5.0))
    state[PENDING_SIGN] = sign


@njit(cache=True)
def _take(ladder: Int64s, state: Int64s, depth: int, row: Floats, rng: np.random.Generator) -> None:
    """Trade the pending market order against the best tick, and write the trade into the row."""
    sign = state[PENDING_SIGN]
    best = _own_best(state, -sign)
    lots = min(state[PENDING_LOTS], ladder[best % RING])
    ladder[best % RING] -= lots
    state[PENDING_LOTS] -= lots
    row[0], row[1], row[2], row[3] = 1.0, best / TICKS_PER_UNIT, lots / LOTS_PER_UNIT, sign
    _retreat(ladder, state, depth, -sign, rng)


@njit(cache=True)
def _advance_clock(state: Int64s, hidden: Floats, rng: np.random.Generator) -> None:
    """Wait for the next arrival (Hawkes rate, by thinning) and let the pressure drift meanwhile."""
    waited, excite = 0.0, hidden[EXCITE]
    while True:
        ceiling = BASE_RATE_HZ + excite
        wait = rng.standard_exponential() / ceiling
        excite *= np.exp(-EXCITE_DECAY_HZ * wait)
        waited += wait
        if rng.random() * ceiling <= BASE_RATE_HZ + excite:
            break
    hidden[EXCITE] = excite
    keep = np.exp(-waited / PRESSURE_SECONDS)
    pull = -((state[BEST_BID] + state[BEST_ASK]) / 2 - START_TICK) / PULL_TICKS
    hidden[PRESSURE] = pull + keep * (hidden[PRESSURE] - pull) + np.sqrt(1 - keep * keep) * rng.standard_normal()
    state[CLOCK_NS] += 1 + int(waited * 1e9)


@njit(cache=True)
def _act(ladder: Int64s, state: Int64s, hidden: Floats, levels: int, depth: int, rng: np.random.Generator) -> None:
    """One arrival: a market order, a limit order or a cancellation, leaning with the pressure."""
    lean = np.tanh(hidden[PRESSURE])
    wide = state[BEST_ASK] - state[BEST_BID] > WIDE_SPREAD_TICKS
    if not wide and rng.random() < MARKET_SHARE:
        sign = 1 if rng.random() < 0.5 + MARKET_LEAN * lean else -1
        _market_order(ladder, state, levels, depth, sign, rng)
        if state[PENDING_LOTS] > 0:
            hidden[EXCITE] += EXCITE_HZ
            return
    sign = 1 if rng.random() < 0.5 + LIMIT_LEAN * lean else -1
    crowding = ladder[_own_best(state, sign) % RING] / TARGET_LOTS
    if wide or rng.random() < 1.0 / (1.0 + 0.8 * crowding):
        _limit(ladder, state, depth, sign, rng)
    else:
        _cancel(ladder, state, levels, depth, -sign, rng)


@njit(cache=True)
def _write_levels(ladder: Int64s, state: Int64s, levels: int, depth: int, row: Floats) -> None:
    for side in range(2):
        sign = 1 - 2 * side
        tick, level, step = _own_best(state, sign), 0, 0
        while level < levels and step < depth:
            lots = ladder[(tick - sign * step) % RING]
            if lots > 0:
                row[4 + 4 * level + 2 * side] = (tick - sign * step) / TICKS_PER_UNIT
                row[5 + 4 * level + 2 * side] = lots / LOTS_PER_UNIT
                level += 1
            step += 1


@njit(cache=True)
def _fill(
    ladder: Int64s,
    state: Int64s,
    hidden: Floats,
    levels: int,
    depth: int,
    rng: np.random.Generator,
    ts_ns: Int64s,
    values: Floats,
) -> None:
    """Fill `ts_ns` [N] and `values` [N, C]; one row per event, so that a run may be cut anywhere and carried on."""
    for index in range(len(ts_ns)):
        row = values[index]
        if state[PENDING_LOTS] == 0:
            _advance_clock(state, hidden, rng)
            _act(ladder, state, hidden, levels, depth, rng)
        if state[PENDING_LOTS] > 0:
            _take(ladder, state, depth, row, rng)
        ts_ns[index] = state[CLOCK_NS]
        _write_levels(ladder, state, levels, depth, row)


class _Book:
    """The simulated book: everything the next event depends on."""

    def __init__(self, seed: int, levels: int) -> None:
        self.levels, self.depth = levels, 3 * levels + 20
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.hidden = np.zeros(2)
        self.state = np.array([START_TICK, START_TICK + 1, START_NS, 0, 0], dtype=np.int64)
        self.ladder = np.zeros(RING, dtype=np.int64)
        ticks = np.arange(START_TICK + 1 - self.depth, START_TICK + 1 + self.depth)
        self.ladder[ticks % RING] = 1 + (self.rng.standard_exponential(len(ticks)) * TARGET_LOTS).astype(np.int64)
        self.next_events(BURN_IN_ROWS)

    def next_events(self, rows: int) -> Events:
        """The next `rows` events."""
        ts_ns = np.empty(rows, dtype=np.int64)
        values = np.zeros((rows, len(book_columns(self.levels))))
        _fill(self.ladder, self.state, self.hidden, self.levels, self.depth, self.rng, ts_ns, values)
        return Events("book", self.levels, ts_ns, values)


class SimulatedSource(Source):
    """`events` simulated book rows with L `levels`; the same seed always gives the same rows, in chunks of any size.

    Raises UsageError for a negative seed, no events, or levels outside 1..20.
    """

    def __init__(self, seed: int, events: int = 60_000, levels: int = 5) -> None:
        for field, value, least in (("seed", seed, 0), ("events", events, 1), ("levels", levels, 1)):
            if value < least:
                raise UsageError("simulator", field=field, expected=f"at least {least}", was=str(value))
        if levels > MAX_LEVELS:
            raise UsageError("simulator", field="levels", expected=f"at most {MAX_LEVELS}", was=str(levels))
        super().__init__(symbol="simulated", venue="simulator", kind="book", levels=levels, simulated=True)
        self.seed, self.events = seed, events

    def digests(self) -> dict[str, str]:
        """One digest over what decides every row: seed, number of events, levels, and the simulator's code."""
        what = {"seed": self.seed, "events": self.events, "levels": self.levels, "code": sha256_file(Path(__file__))}
        return {"simulator": sha256_bytes(canonical_json(what))}

    def _read(self, rows: int) -> Iterator[Events]:
        self.quality.note(f"SIMULATED: no market produced this; seed {self.seed}, {self.events} events")
        book = _Book(self.seed, self.levels)
        for start in range(0, self.events, rows):
            chunk = book.next_events(min(rows, self.events - start))
            self.quality.rows_read += len(chunk)
            yield chunk

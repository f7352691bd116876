"""The look-ahead probe: change everything from an event on, and nothing before it may move.

It works on any function from events to features, so that a hand-written column is held to the same rule as the
engine's. Each change of the future is made in both directions where a direction may hide it (prices up and down, time
standing still and leaping), so that a leak of one bit of the next event shows at any cut; several cuts find leaks that
only some events have. Letters: N events, F features, C columns of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from tickserve.errors import GateRefusedError, UsageError
from tickserve.events import BOOK_UPDATE, EVENT, TRADE, TRADE_PRICE, TRADE_SIGN, TRADE_SIZE, Events
from tickserve.features.spec import FeatureSpec

BatchFunction = Callable[[Events], npt.NDArray[np.float32]]
Times = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
# Cuts where none are given, spread evenly with a drawn place in each stretch.
CUTS: Final = 20
_FIRST_BID, _FIRST_ASK = 4, 6
_LEAP_NS: Final = 2 * 3_600 * 10**9


def probe(
    subject: FeatureSpec | BatchFunction, events: Events, cuts: int | Sequence[int] | None = None, *, seed: int = 7
) -> int:
    """Perturb `events` from each of `cuts` on, in several ways; features before the cut must keep their bits.

    `subject` is a spec, run by a fresh engine each time, or a function from N events to at least `cut` feature rows.
    `cuts` is an event's index, several, or None for 20 of them, drawn by `seed` over all N events. The future's rows
    are shuffled, prices and sizes scaled at random, up and down, kinds of events and signs of trades turned round,
    times redrawn, held still and put off, and the future is cut off. Returns the number of perturbations that passed.
    Raises GateRefusedError naming the column and the event that moved, and UsageError for a cut outside 1..N-1.
    """
    random = np.random.default_rng(seed)
    run, columns = _runner(subject)
    chosen = _cuts(cuts, len(events), random)
    before = run(events)
    passed = 0
    for cut in chosen:
        past = _past(before, cut)
        for what, perturbed in _perturbations(events, cut, random):
            _compare(past, _past(run(perturbed), cut), columns, what, cut)
            passed += 1
    return passed


def _cuts(given: int | Sequence[int] | None, count: int, random: np.random.Generator) -> list[int]:
    if given is None and count > 1:
        edges = np.linspace(1, count, min(CUTS, count - 1) + 1).astype(np.int64)
        return [int(cut) for cut in random.integers(edges[:-1], edges[1:])]
    cuts = [int(cut) for cut in np.atleast_1d(0 if given is None else given)]
    for cut in cuts or [0]:
        if not 0 < cut < count:
            raise UsageError("nothing before or after it", field="cut", expected=f"1 to {count - 1}", was=str(cut))
    return cuts


def _runner(subject: FeatureSpec | BatchFunction) -> tuple[BatchFunction, tuple[str, ...]]:
    if not isinstance(subject, FeatureSpec):
        return subject, ()
    from tickserve.features.engine import FeatureEngine  # numba: only when a spec is probed

    return lambda events: FeatureEngine(subject).batch(events), subject.columns


def _past(features: npt.NDArray[np.float32], cut: int) -> npt.NDArray[np.float32]:
    """The first `cut` rows, C-contiguous; fewer rows than that means that past features vanished."""
    past = np.ascontiguousarray(features[:cut])
    if len(past) < cut:
        raise GateRefusedError("look-ahead", field="features", expected=f"{cut} rows", was=f"{len(past)}")
    return past


def _perturbations(events: Events, cut: int, random: np.random.Generator) -> Iterator[tuple[str, Events]]:
    past_ts, past = events.ts_ns[:cut], events.values[:cut]
    for what, times, rows in _futures(events, cut, random):
        ts_ns, values = np.concatenate([past_ts, times]).astype(np.int64), np.concatenate([past, rows])
        yield what, Events(events.kind, events.levels, ts_ns, np.ascontiguousarray(values))


def _futures(events: Events, cut: int, random: np.random.Generator) -> Iterator[tuple[str, Times, Values]]:
    """What follows the cut instead, and in which way it differs: times [M] and rows [M, C]."""
    times, rows, now = events.ts_ns[cut:], events.values[cut:], int(events.ts_ns[cut - 1])
    count, book = len(times), events.kind == "book"
    scaled = _scaled(rows, random.uniform(0.5, 2.0, rows.shape), book)
    steps = np.diff(times, prepend=now)[random.permutation(count)] + random.integers(1, 10**9, count)
    redrawn = now + np.cumsum(steps)
    still = np.full(count, now)
    yield "rows shuffled", times, rows[random.permutation(count)]
    yield "prices and sizes scaled", times, scaled
    yield "prices and sizes up", times, _scaled(rows, 1.5, book)
    yield "prices and sizes down", times, _scaled(rows, 0.5, book)
    yield "times redrawn", redrawn, rows
    yield "prices, sizes and times", redrawn, scaled[random.permutation(count)]
    yield "no time passes", still, scaled
    yield "hours pass", times + _LEAP_NS, rows
    if book:
        yield "kinds turned", times, _kinds_turned(rows, random)
        yield "signs turned", times, _signs_turned(rows)
        yield "kinds turned, no time passes", still, _kinds_turned(scaled, random)
    yield "cut off", times[:0], rows[:0]


def _scaled(rows: Values, factors: Values | float, book: bool) -> Values:
    """Rows times factors; what is no amount (kind of event, sign of trade) stays."""
    scaled = rows * factors
    if book:
        scaled[:, [EVENT, TRADE_SIGN]] = rows[:, [EVENT, TRADE_SIGN]]
    return scaled


def _kinds_turned(rows: Values, random: np.random.Generator) -> Values:
    """Every trade a book update, every book update a trade inside the spread."""
    turned, update = rows.copy(), rows[:, EVENT] != TRADE
    turned[~update, EVENT : TRADE_SIGN + 1] = (BOOK_UPDATE, 0.0, 0.0, 0.0)
    turned[update, EVENT], turned[update, TRADE_SIZE] = TRADE, random.uniform(0.1, 10.0, int(update.sum()))
    turned[update, TRADE_PRICE] = 0.5 * (rows[update, _FIRST_BID] + rows[update, _FIRST_ASK])
    turned[update, TRADE_SIGN] = np.where(random.random(int(update.sum())) < 0.5, -1.0, 1.0)
    return turned


def _signs_turned(rows: Values) -> Values:
    """Every trade from the other side; those without a side become purchases."""
    turned = rows.copy()
    traded = rows[:, EVENT] == TRADE
    turned[traded, TRADE_SIGN] = np.where(rows[traded, TRADE_SIGN] > 0, -1.0, 1.0)
    return turned


def _compare(
    before: npt.NDArray[np.float32], after: npt.NDArray[np.float32], columns: tuple[str, ...], what: str, cut: int
) -> None:
    moved = before.view(np.uint8) != after.view(np.uint8)
    if not moved.any():
        return
    row, byte = (int(index) for index in np.argwhere(moved)[0])
    column = byte // before.itemsize
    name = columns[column] if columns else f"column {column}"
    raise GateRefusedError(
        f"look-ahead: {name} of event {row} moved when events from {cut} on changed ({what})",
        field="features",
        expected=repr(float(before[row, column])),
        was=repr(float(after[row, column])),
    )

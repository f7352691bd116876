"""The look-ahead probe: change everything from an event on, and nothing before it may move.

It works on any function from events to features, so that a hand-written column is held to the same rule as the
engine's. Letters: N events, F features, C columns of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from tickserve.errors import GateRefusedError, UsageError
from tickserve.events import EVENT, Events
from tickserve.features.spec import FeatureSpec

BatchFunction = Callable[[Events], npt.NDArray[np.float32]]


def probe(subject: FeatureSpec | BatchFunction, events: Events, cut: int, *, seed: int = 7) -> int:
    """Perturb `events` from index `cut` on, in several ways; features before `cut` must keep their bits.

    `subject` is a spec, run by a fresh engine each time, or a function from N events to at least `cut` feature rows.
    The future's rows are shuffled, its prices and sizes scaled, its times redrawn, and it is cut off. Returns the
    number of perturbations that passed. Raises GateRefusedError naming the column and the event that moved, and
    UsageError for a cut outside 1..N-1.
    """
    if not 0 < cut < len(events):
        raise UsageError("nothing before or after it", field="cut", expected=f"1 to {len(events) - 1}", was=str(cut))
    run, columns = _runner(subject)
    before = _past(run(events), cut)
    passed = 0
    for what, perturbed in _perturbations(events, cut, np.random.default_rng(seed)):
        after = _past(run(perturbed), cut)
        _compare(before, after, columns, what, cut)
        passed += 1
    return passed


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
    ts_ns, values = events.ts_ns, events.values
    count = len(events) - cut

    def with_future(times: npt.NDArray[np.int64], rows: npt.NDArray[np.float64]) -> Events:
        joined = np.concatenate([ts_ns[:cut], times]), np.concatenate([values[:cut], rows])
        return Events(events.kind, events.levels, joined[0].astype(np.int64), np.ascontiguousarray(joined[1]))

    shuffled = values[cut:][random.permutation(count)]
    yield "rows shuffled", with_future(ts_ns[cut:], shuffled)
    scaled = values[cut:] * random.uniform(0.5, 2.0, values[cut:].shape)
    if events.kind == "book":
        scaled[:, EVENT] = values[cut:, EVENT]
    yield "prices and sizes scaled", with_future(ts_ns[cut:], scaled)
    steps = np.diff(ts_ns[cut - 1 :])[random.permutation(count)] + random.integers(1, 10**9, count)
    times = ts_ns[cut - 1] + np.cumsum(steps)
    yield "times redrawn", with_future(times, values[cut:])
    yield "prices, sizes and times", with_future(times, scaled[random.permutation(count)])
    yield "cut off", with_future(ts_ns[cut:cut], values[cut:cut])


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

"""The feature engine: the same numbers in research and in production, because it is the same arithmetic.

`batch` runs over a chunk of events, with threads over features if it is long; `step` runs over a chunk of one event.
Both advance one state with one compiled function, so any mix of them gives the same float32 bits.
Letters: N events, C columns of a row, F features.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tickserve.errors import SchemaError
from tickserve.events import Events, columns_of
from tickserve.features import kernels
from tickserve.features.catalog import HORIZON_SLOTS, KINDS
from tickserve.features.spec import Feature, FeatureSpec

# Below this many events a thread costs more than it saves.
MIN_THREAD_EVENTS: Final = 4_096
# Kinds whose time constant is of a moving average; the others' are of decayed sums.
_AVERAGED: Final = frozenset({"spread_deviation", "depth_deviation", "mid_deviation"})

Singles = npt.NDArray[np.float32]
Words = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
_FLOAT32: Final = np.dtype(np.float32)
_FLOAT64: Final = np.dtype(np.float64)
_NO_INDEX: Final = np.zeros(0, np.int64)


class FeatureEngine:
    """State machines for a spec, started anew by every session.

    A time step backwards counts as no time passed. One engine belongs to one stream and one thread at a time;
    `threads` (default: the cores this process may use) share out the features of a long chunk.
    """

    def __init__(self, spec: FeatureSpec, *, threads: int | None = None) -> None:
        self.spec = spec
        self._columns = len(columns_of(spec.kind, spec.levels))
        self._plan, self._initial, self._taus = _compile(spec)
        self._groups = _share_out(spec, self._plan, threads or len(os.sched_getaffinity(0)))
        self._memory = self._initial.copy()
        self._lanes = [_Lane.of(spec, self._taus) for _ in self._groups]
        self._shape = (self._columns,)
        self._time: Longs = np.zeros(1, np.int64)
        first = self._lanes[0]
        self._state = (first.clock, first.words, self._plan, self._memory)
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next event is the first of a session."""
        self._lanes[0].clock[kernels.SEEN] = 0
        self._lanes[0].words[: kernels.CARRY_WORDS] = 0.0
        self._memory[:] = self._initial

    @property
    def events_seen(self) -> int:
        """Events since the session started."""
        return int(self._lanes[0].clock[kernels.SEEN])

    @property
    def warm(self) -> bool:
        """Whether the last event's features are past the session's warm-up."""
        return self.events_seen > self.spec.warmup_events

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """A copy of everything the next event's features depend on."""
        lane = self._lanes[0]
        return {"clock": lane.clock.copy(), "words": lane.words.copy(), "memory": self._memory.copy()}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on where the engine of `state` stood. Raises SchemaError for a state of another spec."""
        lane = self._lanes[0]
        mine = {"clock": lane.clock, "words": lane.words, "memory": self._memory}
        for name, array in mine.items():
            given = state.get(name)
            if given is None or given.shape != array.shape or given.dtype != array.dtype:
                was = "nothing" if given is None else f"{given.dtype} {given.shape}"
                raise SchemaError("not this engine's", field=name, expected=f"{array.dtype} {array.shape}", was=was)
        for name, array in mine.items():
            array[:] = state[name]

    def step(self, ts_ns: int, row: Words) -> Singles:
        """Features float32 [F] after one event; `row` is float64 [C], columns as `tickserve.events.columns_of`.

        Raises SchemaError for another length, rank, or floats that are not float64.
        """
        if row.__class__ is not np.ndarray or row.shape != self._shape or row.dtype is not _FLOAT64:
            row = self._checked(row, 1)
        out = np.empty(len(self._plan), _FLOAT32)
        self._time[0] = ts_ns
        try:
            kernels.advance(self._time, row, *self._state, _NO_INDEX, out)
        except TypeError:  # not contiguous, or not aligned
            kernels.advance(self._time, self._checked(row, 1), *self._state, _NO_INDEX, out)
        return out

    def batch(self, events: Events) -> Singles:
        """Features float32 [N, F] of a chunk that follows the last one, column-major (each column contiguous).

        Raises SchemaError when the events are not of the spec's kind and levels.
        """
        return self.batch_with_index(events)[0]

    def batch_with_index(self, events: Events) -> tuple[Singles, Longs]:
        """`batch`, and int64 [N]: each event's place in its session, 0 for the event that starts one."""
        self._check_kind(events)
        ts_ns = np.ascontiguousarray(events.ts_ns, dtype=np.int64)
        values = self._checked(events.values, 2)
        if ts_ns.shape != (len(values),):
            raise SchemaError("wrong shape", field="ts_ns", expected=f"({len(values)},)", was=str(ts_ns.shape))
        out = np.empty((len(self.spec.features), len(values)), np.float32)
        index = np.empty(len(values), np.int64)
        self._run(ts_ns, values, index, out)
        return out.T, index

    def _run(self, ts_ns: Longs, values: Words, index: Longs, out: Singles) -> None:
        # Every thread computes the shared columns for itself, from its own copy of the state they carry: cheaper than
        # handing them over. The first one's copy is the engine's own.
        groups = self._groups if len(ts_ns) >= MIN_THREAD_EVENTS else [self._plan]
        for lane in self._lanes[1 : len(groups)]:
            lane.follow(self._lanes[0])

        rows, flat = values.reshape(-1), out.reshape(-1)

        def work(g: int) -> None:
            lane = self._lanes[g]
            places = _NO_INDEX if g else index
            kernels.advance(ts_ns, rows, lane.clock, lane.words, groups[g], self._memory, places, flat)

        if len(groups) == 1:
            work(0)
            return
        with ThreadPoolExecutor(len(groups) - 1) as pool:
            others = [pool.submit(work, g) for g in range(1, len(groups))]
            work(0)
            for other in others:
                other.result()

    def _check_kind(self, events: Events) -> None:
        if (events.kind, events.levels * (events.kind == "book")) != (
            self.spec.kind,
            self.spec.levels * (self.spec.kind == "book"),
        ):
            raise SchemaError(
                "events do not fit the feature spec",
                field="events",
                expected=f"{self.spec.kind} with {self.spec.levels} levels",
                was=f"{events.kind} with {events.levels} levels",
            )

    def _checked(self, values: Any, rank: int) -> Words:
        array = np.asarray(values)
        if array.ndim != rank or array.shape[-1] != self._columns:
            expected = f"{rank}-dimensional with {self._columns} columns"
            raise SchemaError("wrong shape", field="values", expected=expected, was=str(array.shape))
        # A price that went through fewer bits is another price, and so are its features; whole numbers lose nothing.
        if array.dtype.kind not in "iu" and array.dtype.str[1:] != "f8":
            raise SchemaError("wrong dtype", field="values", expected="float64", was=str(array.dtype))
        if rank == 1:
            return np.array(array, np.float64)
        return np.ascontiguousarray(array, np.float64)


@dataclass(frozen=True)
class _Lane:
    """What one thread carries besides the features' own state: `clock` and `words` of `kernels.py`."""

    clock: Longs
    words: Words

    @classmethod
    def of(cls, spec: FeatureSpec, taus: Mapping[float, int]) -> _Lane:
        """A lane before any event; `taus` as `_compile` gives them."""
        history = max([int(value) for item in spec.features for name, value in item.params if name == "count"] + [1])
        clock = np.zeros(kernels.CLOCK_WORDS + len(taus), np.int64)
        clock[[kernels.GAP, kernels.HISTORY, kernels.TAUS]] = spec.session_gap_ns, history, len(taus)
        clock[kernels.CLOCK_WORDS :] = list(taus.values())
        book = spec.kind == "book"
        count = kernels.words_of_books(len(taus), history, spec.levels) if book else kernels.words_of_bars()
        words = np.zeros(count)
        words[kernels.CARRY_WORDS : kernels.CARRY_WORDS + len(taus)] = [1.0 / tau for tau in taus]
        return cls(clock, words)

    def follow(self, other: _Lane) -> None:
        """Take over another lane's state."""
        self.clock[:], self.words[:] = other.clock, other.words


def _parameters(feature: Feature, taus: Mapping[float, int]) -> list[float]:
    """As the kernels read them: a tau as its number and its rate, a horizon with its spacing of samples."""
    words: list[float] = []
    for name, value in feature.params:
        if name == "tau_s":
            words += [float(list(taus).index(value)), 1.0 / value]
        elif name == "horizon_s":
            words += [float(value), value / HORIZON_SLOTS]
        else:
            words.append(float(value))
    return words


def _compile(spec: FeatureSpec) -> tuple[Longs, Words, dict[float, int]]:
    """The spec as the kernels' plan int64 [F, 5], their memory's initial content, and what each tau is used for."""
    taus: dict[float, int] = {}
    for feature in spec.features:
        for name, value in feature.params:
            if name == "tau_s":
                taus[float(value)] = taus.get(float(value), 0) | (2 if feature.kind in _AVERAGED else 1)
    plan: list[tuple[int, ...]] = []
    words: list[float] = []
    for column, feature in enumerate(spec.features):
        kind, parameters = KINDS[feature.kind], _parameters(feature, taus)
        start = len(words)
        words += parameters + [0.0] * kind.state_words(dict(feature.params))
        plan.append((kind.id, start, start + len(parameters), len(words), column))
    return np.array(plan, np.int64), np.array(words, np.float64), taus


def _share_out(spec: FeatureSpec, plan: Longs, threads: int) -> list[Longs]:
    """The plan in at most `threads` groups of about equal cost, dearest features first."""
    count = max(1, min(threads, len(plan) // 4))
    costs = [KINDS[feature.kind].cost for feature in spec.features]
    groups: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for column in sorted(range(len(plan)), key=lambda column: -costs[column]):
        lightest = loads.index(min(loads))
        groups[lightest].append(column)
        loads[lightest] += costs[column]
    return [np.ascontiguousarray(plan[sorted(group)]) for group in groups]

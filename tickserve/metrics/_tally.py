"""What was observed, added up: counters and histograms by model. Bounded by how many models and versions there are.

Nothing here is safe for threads: who adds and who reads hold the exporter's lock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tickserve.errors import DeadlineExceededError, RequestError
from tickserve.signal import Signal

US = 1e-6
LOW_S, HIGH_S = 1e-5, 10.0  # of a call and its stages
YOUNG_S, OLD_S, AGES_PER_DECADE = 1e-4, 1e3, 3  # of the newest event
SCORES = tuple(round(-1 + step / 10, 1) for step in range(21))
ROUNDING = 1e-6  # a score in float32 may lie so much above the bound it stands for
DRIFT = "drift"  # the fallback of a call that monitoring held flat: nothing was sent, and nothing failed
ERROR = "ERROR"  # the status of a call that ended with an error and no signal, as in the journal
UNPINNED = "(not pinned)"  # in place of a name that any caller may make up
OTHER = "(other)"
MAX_MODELS, MAX_VERSIONS, MAX_STAGES = 256, 256, 16
STATUSES = ("OK", "STALE", "DEADLINE", "REJECTED_INPUT", "UNAVAILABLE", "FALLBACK", ERROR)
WIRE = "wire"
# The client's own stages by the names they are exported under: the answer does not say what part of the wait was the
# server's, so all of it is the wire's.
STAGES = {"check": "check", "send_wait": WIRE, "decode": "decode"}
MANY_ROWS = 16


class Observation(NamedTuple):
    """What is kept of a decision until it is counted: no tensor and no traceback is held alive."""

    model: str
    version: int | None
    bundle_digest: str | None
    stage_us: Mapping[str, float]
    signal: Signal | None
    error: type[RequestError] | None
    attempts: int


def log_buckets(low: float, high: float, per_decade: int) -> tuple[float, ...]:
    """Upper bounds from `low` to `high`, `per_decade` to each power of ten, to three digits.

    >>> log_buckets(1, 100, 3)
    (1.0, 2.15, 4.64, 10.0, 21.5, 46.4, 100.0)
    """
    count = round(np.log10(high / low) * per_decade)
    return tuple(float(f"{low * 10 ** (step / per_decade):.3g}") for step in range(count + 1))


class Histogram:
    """Counts of values at or below each bound (above the last: one more), and their sum."""

    __slots__ = ("_limits", "bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float], slack: float = 0.0) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0
        self._limits = [bound + slack for bound in bounds]  # a value so little above a bound is at it

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self._limits, value)] += 1
        self.total += value

    def add_many(self, values: npt.NDArray[np.float32]) -> None:
        """Count all of `values` [N]."""
        places = np.searchsorted(self._limits, values.astype(np.float64))
        for place, count in enumerate(np.bincount(places, minlength=len(self.counts)).tolist()):
            self.counts[place] += count
        self.total += float(values.sum(dtype=np.float64))

    def cumulative(self) -> list[tuple[str, float]]:
        """As Prometheus has it: `le` and how many are at or below it, the last one `+Inf`."""
        names = [*(f"{bound!r}" for bound in self.bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self.counts)), strict=True))


class ModelTally:
    """Of one model. Keys of a counter are the values of its labels behind `model`."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.calls: Counter[tuple[str, str]] = Counter()  # by version and status
        self.errors: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.decisions: Counter[str] = Counter()
        self.flags: Counter[str] = Counter()
        self.deadline_misses = self.retries = 0
        self.call = Histogram(bounds)
        self.stages: dict[str, Histogram] = {}
        self.age = Histogram(AGES)
        self.score = Histogram(SCORES, ROUNDING)
        self.info: dict[tuple[str, str], None] = {}  # version and bundle digest that answered, in order
        self._versions: dict[int | None, str] = {}
        self._begun: set[str] = set()

    def add(self, seen: Observation) -> None:
        """Count one decision."""
        signal, stages = seen.signal, seen.stage_us
        version = self._version(seen)
        if version not in self._begun:
            self._begin(version)
        self.calls[version, ERROR if signal is None else signal.status] += 1
        if signal is not None and signal.status == "OK":
            self.info.setdefault((version, signal.bundle_digest))
        self.call.add(stages["total"] * US)
        for name, exported in STAGES.items():
            if name in stages:
                self.stage(exported).add(stages[name] * US)
        if seen.attempts > 1:
            self.retries += seen.attempts - 1
        if seen.error is not None:
            self.errors[seen.error.__name__] += 1
            self.deadline_misses += issubclass(seen.error, DeadlineExceededError)
        if signal is not None:
            self._signal(signal, failed=seen.error is not None)

    def stage(self, name: str) -> Histogram:
        """The histogram of a stage, made where it is not there yet; there are at most `MAX_STAGES`, and `OTHER`."""
        found = self.stages.get(name)
        if found is None:
            name = name if len(self.stages) < MAX_STAGES else OTHER
            found = self.stages.get(name)
        if found is None:
            found = self.stages[name] = Histogram(self._bounds)
        return found

    def _begin(self, version: str) -> None:
        """Every status and error at 0: an increase from nothing at all is none that Prometheus sees."""
        if not self._begun:
            self.errors.update(dict.fromkeys(ERRORS, 0))
        # Calls that nobody answered have the version that was asked for, mostly none.
        for each in {version, ""} - self._begun:
            self._begun.add(each)
            self.calls.update({(each, status): 0 for status in STATUSES})

    def _signal(self, signal: Signal, *, failed: bool) -> None:
        if signal.event_age_us is not None:
            self.age.add(max(0.0, signal.event_age_us * US))
        if signal.fallback is not None:
            self.fallbacks[signal.fallback if failed else DRIFT] += 1
        for flag in {flag.partition(":")[0] for flag in signal.flags} if signal.flags else ():
            self.flags[flag] += 1
        if signal.status != "OK" or signal.score is None:
            return
        for decision in signal.decision or ():
            self.decisions[decision] += 1
        if len(signal.score) > MANY_ROWS:
            self.score.add_many(signal.score)
        else:
            for score in signal.score.tolist():
                self.score.add(score)

    def _version(self, seen: Observation) -> str:
        """The version that answered, else the one asked for, which a caller may have made up: there is a bound."""
        answered = None if seen.signal is None else seen.signal.version
        version = seen.version if answered is None else answered
        name = self._versions.get(version)
        if name is None:
            if len(self._versions) >= MAX_VERSIONS:
                return OTHER
            name = self._versions[version] = "" if version is None else str(version)
        return name


def _names(kind: type[RequestError]) -> tuple[str, ...]:
    return (kind.__name__, *(name for each in kind.__subclasses__() for name in _names(each)))


AGES = log_buckets(YOUNG_S, OLD_S, AGES_PER_DECADE)
ERRORS = _names(RequestError)

"""The recorded arrival process: when requests came, how many rows each had, and in which lane. Letters: N requests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tickserve.errors import CorruptFileError, InsufficientDataError
from tickserve.model_config import BULK_LANE, SINGLE_LANE

NS = 1_000_000_000
MIN_REQUESTS = 2
MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Arrivals:
    """N requests in time order: `times_ns` int64 [N] from 0, `rows` int64 [N] (1 and more), `lane` int64 [N] (1, 2)."""

    times_ns: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    lane: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.times_ns)

    @property
    def seconds(self) -> float:
        """From the first request to the last."""
        return float(self.times_ns[-1] - self.times_ns[0]) / NS

    @property
    def per_second(self) -> float:
        """Mean requests per second; infinite when all came at once."""
        return len(self) / self.seconds if self.seconds else float("inf")


def of_times(times_ns: npt.NDArray[np.int64]) -> Arrivals:
    """One row of the single lane at each of `times_ns` (int64 [N], any order). Raises InsufficientDataError."""
    if len(times_ns) < MIN_REQUESTS:
        raise InsufficientDataError(
            "too few arrivals", field="arrivals", expected=f"at least {MIN_REQUESTS}", was=str(len(times_ns))
        )
    ordered = np.sort(times_ns.astype(np.int64))
    ones = np.ones(len(ordered), np.int64)
    return Arrivals(ordered - ordered[0], ones, ones * SINGLE_LANE)


def of_requests(times_ns: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> Arrivals:
    """Requests of `rows` rows (int64 [N]) at `times_ns`, in the single lane. Raises InsufficientDataError."""
    return replace(of_times(times_ns), rows=rows.astype(np.int64)[np.argsort(times_ns, kind="stable")])


def decisions(events: Arrivals, every_us: int) -> Arrivals:
    """One request at the first of the events in each stretch of `every_us` microseconds; 0 keeps every event.

    An engine decides once on a burst: a feed delivers hundreds of events in one packet, and the state after the last of
    them is what is scored.
    """
    if not every_us:
        return events
    slots = events.times_ns // (every_us * 1_000)
    first = np.flatnonzero(np.diff(slots, prepend=-1))
    return of_times(events.times_ns[first])


def read_arrivals(path: Path) -> Arrivals:
    """A plain file of arrival times, one whole number of nanoseconds per line. Raises CorruptFileError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CorruptFileError("too large for a list of times", field=path.name, expected="at most 1 GiB")
        lines = path.read_text("ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII text"
        raise CorruptFileError(f"cannot read arrival times: {reason}", field=path.name) from error
    try:
        return of_times(np.array([int(line) for line in lines], np.int64))
    except (ValueError, OverflowError) as error:
        bad = next((line for line in lines if not line.lstrip("-").isdecimal()), "a number past 64 bits")
        raise CorruptFileError("not a time", field=path.name, expected="whole nanoseconds", was=bad[:40]) from error


def busiest(arrivals: Arrivals, seconds: float, most: int) -> Arrivals:
    """The stretch of `seconds` with the most requests, cut around its middle to `most` of them: the recorded peak."""
    times = arrivals.times_ns
    stops = np.searchsorted(times, times + int(seconds * NS), "left")
    first = int(np.argmax(stops - np.arange(len(times))))
    last = int(stops[first])
    spare = max(0, last - first - most)
    first, last = first + spare // 2, last - (spare - spare // 2)
    cut = slice(first, max(last, first + MIN_REQUESTS))
    return Arrivals(times[cut] - times[first], arrivals.rows[cut], arrivals.lane[cut])


def with_bulk(arrivals: Arrivals, rows: int, per_second: float) -> Arrivals:
    """`arrivals` and, evenly spaced over the same time, bulk requests of `rows` rows in the second lane."""
    count = max(1, int(arrivals.seconds * per_second))
    bulk = np.linspace(0, arrivals.times_ns[-1], count, dtype=np.int64)
    times = np.concatenate([arrivals.times_ns, bulk])
    order = np.argsort(times, kind="stable")
    sizes = np.concatenate([arrivals.rows, np.full(count, rows, np.int64)])
    lanes = np.concatenate([arrivals.lane, np.full(count, BULK_LANE, np.int64)])
    return Arrivals(times[order], sizes[order], lanes[order])

"""The contract every reader keeps: canonical events in time order, in bounded chunks, and a count of what was met.

N events, C columns. A reader implements `_read`; `chunks` adds what must hold for all: order, counting, never empty.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from market.quality import Quality
from tickserve.errors import DataError, EmptyDataError, UsageError
from tickserve.events import Events, Kind, columns_of
from tickserve.store import sha256_file

MAX_STEP_BACK_NS = 1_000_000_000


def safe_name(text: str) -> str:
    """`text` in lower case with everything outside [a-z0-9._-] replaced by a dash; never empty, never a dot path."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip(".-") or "unknown"


class Source(ABC):
    """One symbol's market data. `chunks` may be called again: it starts over, and `quality` with it.

    `symbol` and `venue` are safe names ([a-z0-9._-]); `levels` is the book levels of each row (0 for bars);
    `simulated` marks data that no market produced.
    """

    def __init__(
        self, *, symbol: str, venue: str, kind: Kind, levels: int, files: Sequence[Path] = (), simulated: bool = False
    ) -> None:
        self.symbol, self.venue, self.kind, self.simulated = safe_name(symbol), safe_name(venue), kind, simulated
        self.levels = levels if kind == "book" else 0
        self.files: tuple[Path, ...] = tuple(files)
        self.quality = Quality()
        # Files left out when a folder was opened; counted anew in every pass.
        self.ignored_files = 0

    @abstractmethod
    def _read(self, rows: int) -> Iterator[Events]:
        """Events in time order, at most `rows` in a chunk; counts what it drops or changes in `self.quality`."""

    def digests(self) -> dict[str, str]:
        """`sha256:<hex>` of every input file, by file name (never by path)."""
        return {path.name: sha256_file(path) for path in self.files}

    def chunks(self, rows: int = 131_072) -> Iterator[Events]:
        """Stream the events, at most `rows` at a time, times never decreasing.

        Raises the DataError branch for input that cannot be used, EmptyDataError when no event came of it, and
        UsageError for `rows` below 1.
        """
        if rows < 1:
            raise UsageError("chunk size", field="rows", expected="at least 1", was=str(rows))
        self.quality = Quality()
        self.quality.count("ignored_files", self.ignored_files)
        for events in self._read(rows):
            if len(events):
                self._check_order(events)
                self.quality.observe(events)
                yield events
        if not self.quality.events:
            raise EmptyDataError(f"{self.symbol}: no usable event in {self.quality.rows_read} rows read")
        self.quality.complete = True

    def _check_order(self, events: Events) -> None:
        last = self.quality.last_ts_ns
        if (last is not None and events.ts_ns[0] < last) or np.any(np.diff(events.ts_ns) < 0):
            raise DataError(
                f"{self.symbol}: rows are not in time order",
                field="time",
                hint="files must not overlap in time; sort the rows, or pass one file",
            )


class ChunkBuffer:
    """Collects single rows into chunks of at most `rows` events. `add` returns a chunk each time one is full."""

    def __init__(self, kind: Kind, levels: int, rows: int) -> None:
        self.kind, self.levels, self.rows = kind, levels, rows
        self._count = 0
        self._allocate()

    def _allocate(self) -> None:
        self._ts: npt.NDArray[np.int64] = np.empty(self.rows, np.int64)
        self._values: npt.NDArray[np.float64] = np.empty((self.rows, len(columns_of(self.kind, self.levels))))

    def add(self, ts_ns: int, row: Sequence[float]) -> Events | None:
        """Append one row of C floats."""
        index = self._count
        self._ts[index] = ts_ns
        self._values[index] = row
        self._count = index + 1
        return self.take() if self._count == self.rows else None

    def take(self) -> Events:
        """What is buffered (possibly nothing), and start a new chunk."""
        events = Events(self.kind, self.levels, self._ts[: self._count], self._values[: self._count])
        self._count = 0
        self._allocate()
        return events


def split(events: Events, rows: int) -> Iterator[Events]:
    """`events` in pieces of at most `rows`."""
    for start in range(0, len(events), rows):
        piece = slice(start, start + rows)
        yield Events(events.kind, events.levels, events.ts_ns[piece], events.values[piece])


def forward_times(ts_ns: npt.NDArray[np.int64], quality: Quality, name: str) -> npt.NDArray[np.int64]:
    """Times that never step back: small steps back (up to a second) take the latest time and are counted.

    File order is the order in which the rows became known, so it wins over the clock. A longer step back means that
    the file is not in that order: DataError, because a stream cannot be sorted.
    """
    highest = np.maximum.accumulate(ts_ns)
    late = highest - ts_ns
    if len(late) and late.max() > MAX_STEP_BACK_NS:
        row = int(np.argmax(late > MAX_STEP_BACK_NS))
        raise DataError(
            f"{name}: row {row + 1} lies {late[row] / 1e9:.3f} s before a row in front of it",
            field="time",
            expected="rows in time order",
            was="unsorted",
        )
    quality.count("time_backwards", int(np.count_nonzero(late)))
    return highest

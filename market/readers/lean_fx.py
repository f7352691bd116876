"""LEAN FX quotes: one bid and one ask per row, file times at a fixed UTC-05, no sizes.

Sizes are 0, which means "not stated". FXCM's quotes are often locked or crossed: locked rows are kept, crossed rows are
not emitted, both are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl

from market.readers.containers import line_batches, open_stream
from market.readers.lean_ticks import MS, day_of
from market.readers.source import Source, forward_times, split
from market.readers.tables import Column, parse_csv
from tickserve.errors import EmptyDataError
from tickserve.events import Events

FILE_ZONE_HOURS = 5
BATCH_LINES = 131_072
# Oanda's files carry fractions of a millisecond.
COLUMNS: dict[str, Column] = {"time": pl.Float64, "bid": pl.Float64, "ask": pl.Float64}


class LeanFxSource(Source):
    """One currency pair's quote files in day order; `levels` is 1."""

    def __init__(self, *, files: Sequence[Path], symbol: str, venue: str) -> None:
        ordered = sorted(files, key=lambda path: path.name)
        super().__init__(symbol=symbol, venue=venue, kind="book", levels=1, files=ordered)

    def _read(self, rows: int) -> Iterator[Events]:
        self.quality.note("the file states no sizes: sizes are 0")
        for path in self.files:
            day = day_of(path)
            midnight = int(datetime(day.year, day.month, day.day, FILE_ZONE_HOURS, tzinfo=UTC).timestamp()) * 10**9
            first_row, last_ns = 1, np.int64(0)
            with open_stream(path) as stream:
                for batch in line_batches(stream, BATCH_LINES):
                    frame = parse_csv(batch, COLUMNS, path.name, first_row)
                    times = np.rint(frame["time"].to_numpy() * MS).astype(np.int64)
                    times = forward_times(np.append(last_ns, times), self.quality, path.name)[1:]
                    first_row, last_ns = first_row + len(frame), times[-1]
                    yield from split(self._events(frame, midnight + times), rows)
            if first_row == 1:
                raise EmptyDataError(f"{path.name}: no rows")

    def _events(self, frame: pl.DataFrame, ts_ns: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Events:
        self.quality.rows_read += len(frame)
        bid, ask = frame["bid"].to_numpy(), frame["ask"].to_numpy()
        priced = (bid > 0) & (ask > 0) & np.isfinite(bid) & np.isfinite(ask)
        crossed = priced & (bid > ask)
        self.quality.count("non_positive_price", int((~priced).sum()))
        self.quality.count("crossed", int(crossed.sum()))
        self.quality.count("locked", int((priced & (bid == ask)).sum()))
        keep = priced & ~crossed
        values = np.zeros((int(keep.sum()), 8))
        values[:, 4], values[:, 6] = bid[keep], ask[keep]
        return Events("book", 1, ts_ns[keep], values)

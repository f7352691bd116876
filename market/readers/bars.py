"""Bars in Parquet, CSV and LEAN zips to canonical bars, stamped with the end of the bar.

Files stamp a bar with its open; it is known one bar length later. The length is the most common step of the first rows,
so a daily bar ends 24 hours after its midnight. Nothing is filled or adjusted: gaps, repeated times, zero volume and
jumps (splits, reused tickers, bad prints) are counted and left for the consumer to see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from market.jumps import jumps
from market.quality import Quality
from market.readers.containers import line_batches, open_stream
from market.readers.parquet import open_parquet, record_batches
from market.readers.source import Source, split
from market.readers.tables import Column, check_columns, parse_csv, parse_header
from tickserve.errors import DataError, EmptyDataError, InsufficientDataError, SchemaError
from tickserve.events import BAR_COLUMNS, CLOSE, HIGH, LOW, OPEN, VOLUME, Events

# Rows parsed at a time; the bar length is inferred from the first piece.
BATCH_ROWS = 131_072
PRICES = ("open", "high", "low", "close")
PARQUET_COLUMNS = ("timestamp_ms", *BAR_COLUMNS)
CSV_COLUMNS = ("timestamp", *PRICES)
# A header names no unit; btc-perp's volume is in quote currency, as its source says.
CSV_VOLUME = (
    "volume is taken as the CSV gives it, which does not state its unit (nautilus btc-perp: quote currency, not base); "
    "features that divide or weigh by volume are in that unit"
)
LEAN_COLUMNS: dict[str, Column] = {"timestamp": pl.String, **dict.fromkeys(BAR_COLUMNS, pl.Float64)}
LEAN_PRICE_SCALE = 10_000.0
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RawBars:
    """N bars as a file states them: opening times in UTC nanoseconds [N] and open, high, low, close, volume [N, 5]."""

    open_ns: Ints
    values: Floats


BarReader = Callable[[Path, Quality], Iterator[RawBars]]


class BarSource(Source):
    """Bars of one symbol; several files must follow each other in time."""

    def __init__(self, *, files: Sequence[Path], symbol: str, venue: str, read: BarReader) -> None:
        super().__init__(symbol=symbol, venue=venue, kind="bars", levels=0, files=sorted(files, key=lambda p: p.name))
        self._read_file = read

    def _read(self, rows: int) -> Iterator[Events]:
        cleaner = _Cleaner(self.symbol, self.quality)
        starts = {path: _first_open(self._read_file, path) for path in self.files}
        for path in sorted(self.files, key=lambda path: starts[path]):
            for raw in self._read_file(path, self.quality):
                self.quality.rows_read += len(raw.open_ns)
                yield from split(cleaner.clean(raw), rows)


def _first_open(read: BarReader, path: Path) -> int:
    first = next(read(path, Quality()), None)
    if first is None or not len(first.open_ns):
        raise EmptyDataError(f"{path.name}: no rows")
    return int(first.open_ns[0])


class _Cleaner:
    """Checks order, drops what cannot be a bar, counts the rest; carries the last bar from piece to piece."""

    def __init__(self, symbol: str, quality: Quality) -> None:
        self._symbol, self._quality = symbol, quality
        self._step = 0
        self._last: tuple[int, float] | None = None

    def clean(self, raw: RawBars) -> Events:
        times, values = raw.open_ns, raw.values
        whole = np.isfinite(values).all(axis=1)
        self._quality.count("missing_values", int((~whole).sum()))
        priced = whole & (values[:, :VOLUME] > 0).all(axis=1)
        self._quality.count("non_positive_price", int((whole & ~priced).sum()))
        times, values = times[priced], values[priced]
        steps = self._steps(times)
        self._quality.count("duplicate_times", int((steps == 0).sum()))
        times, values, steps = times[steps != 0], values[steps != 0], steps[steps != 0]
        if not len(times):
            return Events("bars", 0, times, values)
        if not self._step:
            self._step = bar_length_ns(steps, self._symbol)
        self._count_quirks(values, steps)
        self._last = (int(times[-1]), float(values[-1, CLOSE]))
        return Events("bars", 0, times + self._step, np.ascontiguousarray(values))

    def _steps(self, times: Ints) -> Ints:
        """Time since the bar before [N]; the very first is -1, which stands for unknown."""
        if not len(times):
            return times
        before = self._last[0] if self._last else int(times[0])
        steps = np.diff(times, prepend=before)
        if steps.min() < 0:
            row = int(np.argmin(steps))
            raise DataError(
                f"{self._symbol}: a bar lies {-steps[row] / 1e9:.0f} s before the bar in front of it",
                field="time",
                expected="bars in time order, files that do not overlap",
                was="unsorted",
            )
        if self._last is None:
            steps[0] = -1
        return steps

    def _count_quirks(self, values: Floats, steps: Ints) -> None:
        count = self._quality.count
        count("gaps", int((steps > self._step).sum()))
        count("zero_volume", int((values[:, VOLUME] <= 0).sum()) if "no_volume" not in self._quality.counters else 0)
        high, low = values[:, [OPEN, CLOSE]].max(axis=1), values[:, [OPEN, CLOSE]].min(axis=1)
        count("high_low_violations", int(((values[:, HIGH] < high) | (values[:, LOW] > low)).sum()))
        close = values[:, CLOSE]
        count("jumps", int(jumps(close, self._last[1] if self._last else np.nan).sum()))


def bar_length_ns(steps: Ints, name: str) -> int:
    """The most common positive step. Raises InsufficientDataError where fewer than two bars leave it unknown."""
    positive = steps[steps > 0]
    if not len(positive):
        raise InsufficientDataError(f"{name}: bar length unknown", expected="at least two bars", was=str(len(steps)))
    lengths, counts = np.unique(positive, return_counts=True)
    return int(lengths[np.argmax(counts)])


def read_parquet_bars(path: Path, quality: Quality) -> Iterator[RawBars]:
    """Parquet with `timestamp_ms` (UTC) and the bar columns, found by name, in any order."""
    file = open_parquet(path)
    check_columns(file.schema_arrow.names, PARQUET_COLUMNS, path.name)
    quality.count("extra_columns", len(file.schema_arrow.names) - len(PARQUET_COLUMNS))
    integers = {"timestamp_ms": "integer"}
    for batch in record_batches(file, PARQUET_COLUMNS, path, BATCH_ROWS, integers):
        yield RawBars(
            batch["timestamp_ms"].astype(np.int64) * 1_000_000, np.stack([batch[name] for name in BAR_COLUMNS], axis=1)
        )


def read_csv_bars(path: Path, quality: Quality) -> Iterator[RawBars]:
    """CSV with a header: timestamp text (with a zone, or UTC), open, high, low, close, and volume if there is one."""
    with open_stream(path) as stream:
        columns = parse_header(stream.readline(), CSV_COLUMNS, path.name)
        kinds: dict[str, Column] = {name: pl.Float64 if name in BAR_COLUMNS else pl.String for name in columns}
        quality.count("extra_columns", len([name for name in columns if name not in ("timestamp", *BAR_COLUMNS)]))
        first_row = 2
        for batch in line_batches(stream, BATCH_ROWS):
            frame = parse_csv(batch, kinds, path.name, first_row)
            first_row += len(frame)
            if "volume" not in columns:
                quality.count("no_volume", len(frame))
                frame = frame.with_columns(volume=pl.lit(0.0))
            else:
                quality.note(CSV_VOLUME)
            yield RawBars(utc_ns(frame["timestamp"], path.name, quality), frame.select(BAR_COLUMNS).to_numpy())
        if first_row == 2:
            raise EmptyDataError(f"{path.name}: a header and no rows")


def read_lean_bars(path: Path, _: Quality) -> Iterator[RawBars]:
    """Headerless LEAN CSV: `YYYYMMDD HH:MM` New York, prices x 10,000, volume in shares."""
    first_row = 1
    with open_stream(path) as stream:
        for batch in line_batches(stream, BATCH_ROWS):
            frame = parse_csv(batch, LEAN_COLUMNS, path.name, first_row)
            first_row += len(frame)
            times = frame["timestamp"].str.to_datetime("%Y%m%d %H:%M", time_unit="ns", strict=False)
            _refuse_nulls(times, frame["timestamp"], path.name, "YYYYMMDD HH:MM")
            zoned = times.dt.replace_time_zone("America/New_York", ambiguous="earliest", non_existent="null")
            _refuse_nulls(zoned, frame["timestamp"], path.name, "a time that exists in New York")
            values = frame.select(BAR_COLUMNS).to_numpy(writable=True)
            values[:, :VOLUME] /= LEAN_PRICE_SCALE
            yield RawBars(zoned.dt.epoch("ns").to_numpy(), values)


def utc_ns(text: pl.Series, name: str, quality: Quality) -> Ints:
    """ISO-like times as UTC nanoseconds [N]; text without a zone is taken as UTC, and noted.

    Raises SchemaError for other text and for a column that mixes times with and without a zone.
    """
    text = text.str.replace("T", " ", literal=True).str.replace("Z$", "+00:00")
    zoned = text.str.contains(r"[+-]\d\d:?\d\d$").fill_null(False)
    if zoned.any() and not zoned.all():
        raise SchemaError(f"{name}: mixed zones", field="timestamp", expected="a zone in all rows or in none")
    pattern = "%Y-%m-%d %H:%M:%S%.f"
    if zoned.all():
        times = text.str.to_datetime(pattern + "%z", time_unit="ns", strict=False)
    else:
        quality.note("times without a zone are taken as UTC")
        times = text.str.to_datetime(pattern, time_unit="ns", strict=False)
    _refuse_nulls(times, text, name, "YYYY-MM-DD HH:MM:SS")
    return times.dt.epoch("ns").to_numpy()


def _refuse_nulls(times: pl.Series, text: pl.Series, name: str, expected: str) -> None:
    if times.null_count():
        was = text.filter(times.is_null())[0]
        raise SchemaError(f"{name}", field="timestamp", expected=expected, was=repr(was))

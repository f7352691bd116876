"""LEAN US equity ticks: quote and trade zips of one symbol to best bid/offer rows with the trades between them.

A file holds milliseconds since midnight New York and prices in USD x 10,000. Its quotes are one-sided: each row is the
new national best bid or the new national best ask, the letter is the exchange that sets it, and the other side is
absent. The two sides therefore hold their last value whatever the exchange. (Kept per exchange instead, a venue's old
quote outlives the moment it was best and nearly every best bid/offer comes out crossed: a test shows it.)

Rules, each counted once per row: quotes are taken at the end of their millisecond, then that millisecond's trades; only
09:30-16:00 New York is emitted, earlier quotes still build the book; suspicious rows are excluded; a crossed best is
not emitted, a locked one is; trades carry the last best bid/offer that stood. A trade's sign compares it with the mid
before its millisecond (above: buyer +1, below: seller -1), and at the mid with the last different trade price.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import polars as pl

from market.quality import Quality
from market.readers.containers import read_all
from market.readers.source import Source, forward_times, split
from market.readers.tables import Column, parse_csv
from tickserve.errors import DataError
from tickserve.events import BOOK_UPDATE, TRADE, Events

PRICE_SCALE = 10_000.0
MS: Final = 1_000_000
OPEN_MS, CLOSE_MS = (9 * 60 + 30) * 60_000, 16 * 60 * 60_000
QUOTE_COLUMNS: dict[str, Column] = {
    "time": pl.Int64, "bid": pl.Int64, "bid_size": pl.Int64, "ask": pl.Int64, "ask_size": pl.Int64,
    "exchange": pl.String, "condition": pl.String, "suspicious": pl.Int64,
}  # fmt: skip
TRADE_COLUMNS: dict[str, Column] = {
    "time": pl.Int64, "price": pl.Int64, "size": pl.Int64,
    "exchange": pl.String, "condition": pl.String, "suspicious": pl.Int64,
}  # fmt: skip
NOTES: Final = (
    "regular session only: 09:30:00 to 16:00:00 New York",
    "each quote is read as its side's new national best: per exchange, they outlive their moment and most bests cross",
    "a best price's size is the size quoted by the exchange that sets it, not the sum over exchanges",
    "no trade is excluded by its sale condition",
)
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Best:
    """Best bid/offer at the end of each of N milliseconds: times [N] and prices x 10,000 and shares [N, 4].

    Columns are bid, bid size, ask, ask size; only rows with both sides that are not crossed.
    """

    ms: Ints
    quotes: Ints


def day_of(path: Path) -> date:
    """The day in a name like `20131007_quote.zip`. Raises DataError for another name."""
    try:
        return datetime.strptime(path.name[:8], "%Y%m%d").date()
    except ValueError as error:
        raise DataError(f"{path.name}", field="file name", expected="YYYYMMDD_quote.zip or _trade.zip") from error


def new_york_midnight_ns(day: date) -> int:
    """Midnight of `day` in New York as UTC nanoseconds, with daylight saving time."""
    midnight = pl.Series([datetime(day.year, day.month, day.day)], dtype=pl.Datetime("ns"))
    return int(midnight.dt.replace_time_zone("America/New_York").dt.epoch("ns")[0])


class LeanTickSource(Source):
    """One symbol's quote and trade files, a day in memory at a time; `levels` is 1."""

    def __init__(self, *, files: Sequence[Path], symbol: str, venue: str = "us-equity") -> None:
        ordered = sorted(files, key=lambda path: path.name)
        super().__init__(symbol=symbol, venue=venue, kind="book", levels=1, files=ordered)
        self._days: dict[date, dict[str, Path]] = {}
        for path in ordered:
            self._days.setdefault(day_of(path), {})["quote" if "_quote" in path.name else "trade"] = path
        for day, found in self._days.items():
            if "quote" not in found:
                raise DataError(
                    f"{self.symbol}: trades without quotes on {day}",
                    expected=f"{day:%Y%m%d}_quote.zip beside {found['trade'].name}: a book needs quotes",
                )

    def _read(self, rows: int) -> Iterator[Events]:
        for note in NOTES:
            self.quality.note(note)
        for day, found in sorted(self._days.items()):
            if "trade" not in found:
                self.quality.note(f"no trade file for {day}")
            yield from split(read_day(found["quote"], found.get("trade"), day, self.quality), rows)


def read_day(quote_file: Path, trade_file: Path | None, day: date, quality: Quality) -> Events:
    """Book and trade rows of one day's regular session. Raises the DataError branch for broken files."""
    best = best_quotes(_load(quote_file, QUOTE_COLUMNS, quality), quality)
    inside = _in_session(best.ms)
    ms = [best.ms[inside]]
    values = [_rows(best.quotes[inside])]
    if trade_file is not None:
        trades = _session_trades(_load(trade_file, TRADE_COLUMNS, quality), quality)
        trade_ms, trade_rows = trade_events(trades, best, quality)
        ms.append(trade_ms)
        values.append(trade_rows)
    all_ms, all_values = np.concatenate(ms), np.concatenate(values)
    order = np.lexsort((all_values[:, 0], all_ms))  # stable: a millisecond's quote, then its trades in file order
    midnight = new_york_midnight_ns(day)
    return Events("book", 1, midnight + all_ms[order] * MS, np.ascontiguousarray(all_values[order]))


def _load(path: Path, columns: dict[str, Column], quality: Quality) -> pl.DataFrame:
    frame = parse_csv(read_all(path), columns, path.name)
    quality.rows_read += len(frame)
    times = forward_times(frame["time"].to_numpy() * MS, quality, path.name) // MS
    suspicious = frame["suspicious"].to_numpy() != 0
    quality.count("suspicious", int(suspicious.sum()))
    return frame.with_columns(pl.Series("time", times)).filter(pl.Series(~suspicious))


def _keep(frame: pl.DataFrame, bad: Mask, quirk: str, quality: Quality) -> pl.DataFrame:
    quality.count(quirk, int(bad.sum()))
    return frame.filter(pl.Series(~bad)) if bad.any() else frame


def best_quotes(frame: pl.DataFrame, quality: Quality) -> Best:
    """The best bid/offer at the end of every millisecond in which it changed."""
    sides = ("bid", "bid_size", "ask", "ask_size")
    quotes = frame.select(sides).to_numpy()
    frame = _keep(frame, (quotes < 0).any(axis=1), "bad_quotes", quality)
    quotes = frame.select(sides).to_numpy()
    frame = _keep(frame, (quotes[:, 0] == 0) & (quotes[:, 2] == 0), "empty_quotes", quality)
    quotes, ms = frame.select(sides).to_numpy(), frame["time"].to_numpy()
    if not len(ms):
        return Best(np.empty(0, np.int64), np.empty((0, 4), np.int64))
    ends = np.append(np.flatnonzero(np.diff(ms)), len(ms) - 1)
    quality.count("outside_session", int((~_in_session(ms)).sum()))
    quality.count("same_ms_quotes", int(_in_session(ms).sum() - _in_session(ms[ends]).sum()))
    standing, known, sized = np.empty((len(ends), 4), np.int64), np.ones(len(ends), np.bool_), np.ones(len(ends), bool)
    for side in (0, 2):
        last = np.maximum.accumulate(np.where(quotes[:, side] > 0, np.arange(len(ms)), -1))[ends]
        standing[:, side : side + 2] = quotes[last, side : side + 2]
        known &= last >= 0
        sized &= standing[:, side + 1] > 0
    usable = _usable(ms[ends], standing, known, sized, quality)
    return _changes(ms[ends][usable], standing[usable], quality)


def _usable(ms: Ints, standing: Ints, known: Mask, sized: Mask, quality: Quality) -> Mask:
    """Moments with a bid and an ask that are not crossed; those of the session that are not are counted, each once."""
    inside, crossed = _in_session(ms), standing[:, 0] > standing[:, 2]
    quality.count("before_book", int((inside & ~known).sum()))
    quality.count("withdrawn_quotes", int((inside & known & ~sized).sum()))
    quality.count("crossed", int((inside & known & sized & crossed).sum()))
    quality.count("locked", int((inside & known & sized & (standing[:, 0] == standing[:, 2])).sum()))
    return known & sized & ~crossed


def _changes(ms: Ints, standing: Ints, quality: Quality) -> Best:
    """Only what differs from the moment before; the session's first is emitted even where it repeats the last one."""
    changed = np.append(True, (np.diff(standing, axis=0) != 0).any(axis=1))[: len(ms)]
    changed |= np.append(True, (ms[1:] >= OPEN_MS) & (ms[:-1] < OPEN_MS))[: len(ms)]
    quality.count("unchanged", int((_in_session(ms) & ~changed).sum()))
    return Best(ms[changed], standing[changed])


def _in_session(ms: Ints) -> Mask:
    inside: Mask = (ms >= OPEN_MS) & (ms < CLOSE_MS)
    return inside


def _rows(quotes: Ints) -> Floats:
    values = np.zeros((len(quotes), 8))
    values[:, 0] = BOOK_UPDATE
    values[:, 4:] = quotes
    values[:, [4, 6]] /= PRICE_SCALE
    return values


def _session_trades(frame: pl.DataFrame, quality: Quality) -> pl.DataFrame:
    frame = _keep(frame, ((frame["price"] <= 0) | (frame["size"] <= 0)).to_numpy(), "zero_trades", quality)
    ms = frame["time"].to_numpy()
    return _keep(frame, ~_in_session(ms), "outside_session", quality)


def trade_events(trades: pl.DataFrame, best: Best, quality: Quality) -> tuple[Ints, Floats]:
    """Times [K] and rows [K, 8] of the trades that have a best bid/offer to stand on."""
    ms, price = trades["time"].to_numpy(), trades["price"].to_numpy()
    sign = trade_signs(ms, price, best)
    at = np.searchsorted(best.ms, ms, side="right") - 1
    usable = at >= 0
    quality.count("before_book", int((~usable).sum()))
    values = _rows(best.quotes[at[usable]])
    values[:, 0], values[:, 1] = TRADE, price[usable] / PRICE_SCALE
    values[:, 2], values[:, 3] = trades["size"].to_numpy()[usable], sign[usable]
    return ms[usable], values


def trade_signs(ms: Ints, price: Ints, best: Best) -> Floats:
    """+1 buyer, -1 seller, 0 unknown [K]: the quote rule on the mid before the millisecond, then the tick rule.

    After Lee and Ready (1991), "Inferring trade direction from intraday data", without a reporting lag.
    """
    before = np.searchsorted(best.ms, ms, side="left") - 1
    quoted = before >= 0
    twice_mid = np.where(quoted, (best.quotes[:, 0] + best.quotes[:, 2])[before] if len(best.ms) else 0, 2 * price)
    by_quote = np.sign(2 * price - twice_mid)
    step = np.sign(np.diff(price, prepend=price[:1]))
    last_move = np.maximum.accumulate(np.where(step != 0, np.arange(len(step)), 0))
    by_tick = step[last_move] if len(step) else step
    return np.where(by_quote != 0, by_quote, by_tick).astype(np.float64)

"""What a reader saw and what it did about it: rows read, events emitted, and one counter for every quirk met.

Readers never drop or change a row without counting it here, so a report can say what a data set really is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from market.jumps import JUMP_FACTOR
from tickserve.events import EVENT, TRADE, Events

# What became of a row that gave no event: exactly one of these counts it, so that rows add up (`Quality.unaccounted`).
NO_EVENT: dict[str, str] = {
    "zero_trades": "trades with a zero, negative or non-finite price or size; skipped",
    "bad_quotes": "quotes with a negative or non-finite price or size (Binance: or a zero one); skipped",
    "crossed": "best bid above best ask (or at it, where a venue cannot lock); not emitted",
    "other_messages": "messages of streams that carry neither book nor trades (mark price); skipped",
    "stale_snapshots": "full book snapshots older than the book already built; ignored",
    "stale_tickers": "bookTicker messages older than the book; ignored",
    "stale_depth": "depth updates older than the book; dropped as the venue's rule says",
    "depth_ahead_of_ticker": "depth updates without a snapshot whose best price no bookTicker has confirmed; the row "
    "waits for the next bookTicker",
    "before_book": "quotes, trades and book messages before both sides of a valid book are known, or during a gap; no "
    "row emitted (depth updates among them are kept for the snapshot)",
    "unchanged": "book messages and quotes that change nothing in the visible levels; no row emitted",
    "outside_session": "quotes and trades outside 09:30-16:00 New York; quotes still build the book, none is emitted",
    "suspicious": "rows the vendor flags as suspicious; excluded",
    "withdrawn_quotes": "quotes after which a side's best has zero size: that side is absent until its next quote; no "
    "row emitted",
    "empty_quotes": "quotes with neither bid nor ask; skipped",
    "same_ms_quotes": "quotes merged into the best bid/offer at the end of their millisecond",
    "duplicate_times": "bars that repeat the time of the bar before; the first is kept",
    "missing_values": "bars with an empty or non-finite value; skipped",
    "non_positive_price": "rows with a zero or negative price; skipped",
}
# What was met besides: files, levels inside a message, and rows that gave an event all the same.
MET: dict[str, str] = {
    "ignored_files": "files in the folder that are not market data by their name; not read",
    "time_backwards": "rows timed before the row in front of them (by at most a second); given that row's time",
    "bad_levels": "levels inside a book message with a negative or non-finite price or size; left out of the book",
    "locked": "best bid equal to best ask; kept",
    "snapshots": "full book snapshots applied",
    "no_snapshot": "files without a snapshot that do not continue the file before: best prices come from bookTicker, "
    "deeper levels are those seen in updates so far, unknown ones absent",
    "sequence_gaps": "missing book updates; the book is not used until the next snapshot",
    "trade_id_gaps": "trade ids skipped by the venue's numbering",
    "gaps": "steps between bars longer than the bar (no trade, a closed market or an outage); nothing is filled",
    "zero_volume": "bars with zero or negative volume; kept",
    "no_volume": "bars of a file without a volume column; volume is 0",
    "extra_columns": "columns of the file that are not read",
    "high_low_violations": "bars whose high or low does not contain open and close; kept",
    "jumps": f"bars whose close moves by more than a factor of {JUMP_FACTOR} in one step (splits, reused tickers, bad "
    "prints, crashes); kept, but no label spans one and the rows of a warm-up after it are not learned from",
}
# Every counter a reader may use, with the rule it stands for.
QUIRKS: dict[str, str] = NO_EVENT | MET


def _iso(ts_ns: int) -> str:
    seconds, nanos = divmod(ts_ns, 1_000_000_000)
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{nanos:09d}Z"


@dataclass
class Quality:
    """Counters of one pass over a source; final once its chunks are exhausted (`complete`).

    `rows_read` counts rows or messages of the input, `events` what was emitted (`trades` + `book_updates`, or bars);
    `spread` is kept over book rows as (count, sum, min, max) of the spread in basis points of the mid.
    """

    rows_read: int = 0
    events: int = 0
    trades: int = 0
    book_updates: int = 0
    first_ts_ns: int | None = None
    last_ts_ns: int | None = None
    complete: bool = False
    counters: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _spread: tuple[int, float, float, float] = (0, 0.0, np.inf, -np.inf)

    def count(self, quirk: str, by: int = 1) -> None:
        """Add `by` to a counter of `QUIRKS` (KeyError for another name, so that none goes undescribed)."""
        if quirk not in QUIRKS:
            raise KeyError(quirk)
        if by:
            self.counters[quirk] = self.counters.get(quirk, 0) + int(by)

    @property
    def unaccounted(self) -> int:
        """Rows read that are neither an event nor counted as the reason for none: 0 once `complete`."""
        return self.rows_read - self.events - sum(self.counters.get(name, 0) for name in NO_EVENT)

    def note(self, text: str) -> None:
        """Keep a stated rule for the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    def observe(self, events: Events) -> None:
        """Account for one emitted chunk."""
        if not len(events):
            return
        self.events += len(events)
        if self.first_ts_ns is None:
            self.first_ts_ns = int(events.ts_ns[0])
        self.last_ts_ns = int(events.ts_ns[-1])
        if events.kind == "book":
            trades = int(np.count_nonzero(events.values[:, EVENT] == TRADE))
            self.trades += trades
            self.book_updates += len(events) - trades
            self._observe_spread(events)

    def _observe_spread(self, events: Events) -> None:
        bid, ask = events.values[:, 4], events.values[:, 6]
        spread = (ask - bid) / (0.5 * (ask + bid)) * 1e4
        spread = spread[np.isfinite(spread)]
        if len(spread):
            n, total, low, high = self._spread
            low, high = min(low, float(spread.min())), max(high, float(spread.max()))
            self._spread = (n + len(spread), total + float(spread.sum()), low, high)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready summary: counts, first and last time (ISO, UTC), seconds, spread, and each quirk's meaning."""
        first, last, (seen, total, low, high) = self.first_ts_ns, self.last_ts_ns, self._spread
        return {
            "complete": self.complete,
            "rows_read": self.rows_read,
            "events": self.events,
            "unaccounted": self.unaccounted,
            "trades": self.trades,
            "book_updates": self.book_updates,
            "first": None if first is None else _iso(first),
            "last": None if last is None else _iso(last),
            "duration_s": 0.0 if first is None or last is None else (last - first) / 1e9,
            "spread_bps": {"mean": total / seen, "min": low, "max": high} if seen else None,
            "quirks": {name: {"count": n, "meaning": QUIRKS[name]} for name, n in sorted(self.counters.items())},
            "notes": list(self.notes),
        }

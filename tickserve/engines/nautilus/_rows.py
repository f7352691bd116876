"""NautilusTrader's market data to the rows of `tickserve.events`, as the readers of the training data make them.

A row is known at `ts_init`: when the data reached this process. Prices and sizes are taken from their fixed-point
integers, because nautilus' own `float(price)` rounds twice and misses the nearest float now and then.
Letters: C columns, L levels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from nautilus_trader.core.nautilus_pyo3 import FIXED_PRECISION
from nautilus_trader.model.book import OrderBook
from nautilus_trader.model.data import Bar, OrderBookDeltas, OrderBookDepth10, QuoteTick, TradeTick
from nautilus_trader.model.enums import AggressorSide, BookType, RecordFlag
from nautilus_trader.model.identifiers import InstrumentId

from tickserve.errors import InputRejectedError, UsageError
from tickserve.events import BOOK_UPDATE, TRADE, columns_of

# Python divides integers to the nearest float, so raw / SCALE is the float of the decimal text.
SCALE: Final = 10**FIXED_PRECISION
DEPTH = 10
# As the readers: order of arrival wins over a clock that steps back by up to a second.
MAX_STEP_BACK_NS = 1_000_000_000
HOUR_NS = 3_600 * 10**9
NAN = float("nan")
SIGNS = {AggressorSide.BUYER: 1.0, AggressorSide.SELLER: -1.0}
Level = tuple[float, float]


class Event(NamedTuple):
    """What `Stream.feed` takes: nanoseconds and float64 [C], columns as `tickserve.events.columns_of`."""

    ts_ns: int
    row: npt.NDArray[np.float64]


@dataclass(frozen=True)
class BookRules:
    """Which books make a row: what the reader of the training data decided. A crossed book makes none.

    `locked`: bid equal to ask does. `repeats`: a book that did not change does. `unsized`: sizes of 0 are not stated,
    else they are an absent level. `reopens_ns`: a book after a pause this long does, whether it changed or not.
    """

    locked: bool = False
    repeats: bool = False
    unsized: bool = False
    reopens_ns: int | None = None


# By the reader of the training data.
RULES: Final = {
    "binance": BookRules(),
    "lean-equity": BookRules(locked=True, reopens_ns=HOUR_NS),
    "lean-fx": BookRules(locked=True, repeats=True, unsized=True),
}


class _Arrivals:
    """What book and bar rows share: the instrument, the clock that never steps back, and what made no row."""

    def __init__(self, instrument_id: InstrumentId) -> None:
        self.instrument_id = instrument_id
        self.counts: Counter[str] = Counter()
        self._now = 0

    def _advance(self, data: Any, instrument_id: InstrumentId) -> int:
        """The time of arrival. Raises InputRejectedError: another instrument's, or more than a second back."""
        if instrument_id != self.instrument_id:
            raise InputRejectedError(
                "data of another instrument",
                field="instrument_id",
                expected=str(self.instrument_id),
                was=str(instrument_id),
            )
        ts_ns = int(data.ts_init)
        if ts_ns < self._now:
            if self._now - ts_ns > MAX_STEP_BACK_NS:
                raise InputRejectedError(
                    f"{type(data).__name__} out of order: time runs backwards by {(self._now - ts_ns) / 1e9:.3f} s",
                    field="ts_init",
                    expected=f"{self._now} or later",
                    was=str(ts_ns),
                )
            self.counts["time_backwards"] += 1
            return self._now
        self._now = ts_ns
        return ts_ns


class BookRows(_Arrivals):
    """Quotes or books of one instrument, and its trades, to rows of L levels.

    Each method takes one message and gives its row, or None where the readers would give none; `counts` says why. A
    trade carries the last book that made a row. Raises InputRejectedError for what cannot be taken at all (another
    instrument, time that runs backwards) and stays as it was; UsageError for levels that such data do not have.
    """

    def __init__(self, instrument_id: InstrumentId, levels: int, rules: BookRules) -> None:
        super().__init__(instrument_id)
        self.levels, self.rules = levels, rules
        self._width = len(columns_of("book", levels))
        self._view: list[float] = []
        self._viewed_ns = 0
        self._book: OrderBook | None = None
        self._makers: dict[type, Callable[[Any], Event | None]] = {
            QuoteTick: self.quote,
            OrderBookDepth10: self.depth,
            OrderBookDeltas: self.deltas,
            TradeTick: self.trade,
        }

    def take(self, data: Any) -> Event | None:
        """Any of the messages below. Raises InputRejectedError for another."""
        make = self._makers.get(type(data))
        if make is None:
            raise InputRejectedError(
                "not of a book", field="data", expected="a quote, book or trade", was=type(data).__name__
            )
        return make(data)

    def quote(self, tick: QuoteTick) -> Event | None:
        """The best bid and ask; for models of one level."""
        if self.levels > 1:
            raise UsageError("quotes have one level", field="levels", expected="1", was=str(self.levels))
        ts_ns = self._advance(tick, tick.instrument_id)
        bid = (tick.bid_price.raw / SCALE, tick.bid_size.raw / SCALE)
        ask = (tick.ask_price.raw / SCALE, tick.ask_size.raw / SCALE)
        return self._update(ts_ns, self._stated([bid]), self._stated([ask]))

    def depth(self, depth: OrderBookDepth10) -> Event | None:
        """A book of ten levels a side; null orders and orders without a size are absent levels."""
        if self.levels > DEPTH:
            raise UsageError("the data have ten levels", field="levels", expected="10 at most", was=str(self.levels))
        ts_ns = self._advance(depth, depth.instrument_id)
        bids = [(order.price.raw / SCALE, order.size.raw / SCALE) for order in depth.bids]
        asks = [(order.price.raw / SCALE, order.size.raw / SCALE) for order in depth.asks]
        return self._book_update(ts_ns, self._stated(bids), self._stated(asks))

    def deltas(self, deltas: OrderBookDeltas) -> Event | None:
        """Changes of a book by price level. A row comes with the last delta of a message (flag F_LAST), none before."""
        ts_ns = self._advance(deltas, deltas.instrument_id)
        if self._book is None:
            self._book = OrderBook(self.instrument_id, BookType.L2_MBP)
        self._book.apply_deltas(deltas)
        if not deltas.deltas[-1].flags & RecordFlag.F_LAST:
            return self._none("mid_message")
        return self._book_update(ts_ns, self._top(self._book.bids()), self._top(self._book.asks()))

    def trade(self, tick: TradeTick) -> Event | None:
        """A trade on the standing book; its sign is the aggressor's side, 0 where the venue does not say."""
        ts_ns = self._advance(tick, tick.instrument_id)
        price, size = tick.price.raw / SCALE, tick.size.raw / SCALE
        if not (price > 0 and size > 0):
            return self._none("zero_trades")
        if not self._view:
            return self._none("before_book")
        return Event(ts_ns, np.array([TRADE, price, size, SIGNS.get(tick.aggressor_side, 0.0), *self._view]))

    def _stated(self, levels: list[Level]) -> list[Level]:
        unsized = self.rules.unsized
        return [(price, size) for price, size in levels if price > 0 and (size > 0 or unsized)]

    def _top(self, levels: Sequence[Any]) -> list[Level]:
        best = levels[: self.levels]
        return [(each.price.raw / SCALE, sum(order.size.raw for order in each.orders()) / SCALE) for each in best]

    def _book_update(self, ts_ns: int, bids: list[Level], asks: list[Level]) -> Event | None:
        if not bids and not asks:
            self._view = []  # cleared: the feed starts anew, and no trade stands on what was before
        return self._update(ts_ns, bids, asks)

    def _update(self, ts_ns: int, bids: list[Level], asks: list[Level]) -> Event | None:
        if not bids or not asks:
            return self._none("no_book")
        bid, ask = bids[0][0], asks[0][0]
        if bid > ask or (bid == ask and not self.rules.locked):
            return self._none("crossed")
        view = self._padded(bids, asks)
        paused, self._viewed_ns = ts_ns - self._viewed_ns, ts_ns
        if not self.rules.repeats and view == self._view and not self._reopens(paused):
            return self._none("unchanged")
        self._view = view
        return Event(ts_ns, np.array([BOOK_UPDATE, 0.0, 0.0, 0.0, *view]))

    def _padded(self, bids: list[Level], asks: list[Level]) -> list[float]:
        view = [0.0] * (self._width - 4)
        view[0::2] = [NAN] * (2 * self.levels)  # one object: lists compare by identity first, so equal views are equal
        for start, side in ((0, bids), (2, asks)):
            for level, (price, size) in enumerate(side[: self.levels]):
                view[4 * level + start : 4 * level + start + 2] = price, size
        return view

    def _reopens(self, paused_ns: int) -> bool:
        return self.rules.reopens_ns is not None and paused_ns >= self.rules.reopens_ns

    def _none(self, reason: str) -> Event | None:
        self.counts[reason] += 1
        return None


class BarRows(_Arrivals):
    """Bars of one instrument to rows. The time is `ts_init`: it has to be the end of the bar, or later.

    A loader that stamps `ts_event` with the opening has to give `ts_init_delta` the bar's length. A bar again (a
    revision too) or one with a price that is not positive makes no row; an earlier one is refused.
    """

    def __init__(self, instrument_id: InstrumentId) -> None:
        super().__init__(instrument_id)
        self._last = -1

    def take(self, data: Any) -> Event | None:
        """A bar: open, high, low, close, volume. Raises InputRejectedError for another message."""
        if not isinstance(data, Bar):
            raise InputRejectedError("not of bars", field="data", expected="Bar", was=type(data).__name__)
        return self._bar(data)

    def _bar(self, bar: Bar) -> Event | None:
        if bar.ts_init < self._last:
            raise InputRejectedError(
                "a bar earlier than the one before",
                field="ts_init",
                expected=f"{self._last} or later",
                was=str(bar.ts_init),
            )
        ts_ns = self._advance(bar, bar.bar_type.instrument_id)
        if ts_ns == self._last or bar.is_revision:
            self.counts["duplicate_times"] += 1
            return None
        values = [each.raw / SCALE for each in (bar.open, bar.high, bar.low, bar.close, bar.volume)]
        if min(values[:4]) <= 0:
            self.counts["non_positive_price"] += 1
            return None
        self._last = ts_ns
        return Event(ts_ns, np.array(values))

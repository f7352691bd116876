"""Binance websocket recordings: snapshot, depth updates, bookTicker and trades to book rows.

The book follows the venue's rule: depth updates wait for the REST snapshot, older ones are dropped, every later one
must continue the one before (`pu`, or `U` for spot); a missing one voids the book until the next snapshot. bookTicker
is fresher than depth, so it sets the best level where its update id is newer: levels better than it are gone, and
whatever changed since will be in a later depth update, so nothing is lost by removing them.

A file without a snapshot that continues nothing builds its levels from updates alone. Then only bookTicker knows the
best price, and a row waits until bookTicker agrees with it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from market.readers.containers import open_stream
from market.readers.l2book import BookSide
from market.readers.source import MAX_STEP_BACK_NS, ChunkBuffer, Source
from tickserve.errors import CorruptFileError, DataError, SchemaError
from tickserve.events import BOOK_UPDATE, TRADE, Events

# A snapshot arrives within a second of the stream; a file without one in its first lines is taken to have none.
SNAPSHOT_SEARCH_LINES = 5_000
# Depth updates kept while no book is valid; a snapshot that needs older ones cannot be joined and waits for the next.
MAX_PENDING = 20_000
# Nanoseconds of the years 2000 to 2100.
EARLIEST_NS, LATEST_NS = 946_684_800_000_000_000, 4_102_444_800_000_000_000
_INF = float("inf")
# bookTickers remembered since the last depth update.
MAX_NEWER = 10_000
Message = dict[str, Any]
Ticker = tuple[int, float, float, float, float]


class L2Feed:
    """The book of one instrument, message by message.

    A handler returns "" where the book is valid and may have changed, else the quirk that says why no row comes of the
    message, so that each message has one outcome; `count` is for what is met besides.
    """

    def __init__(self, count: Callable[[str], None]) -> None:
        self.bids, self.asks = BookSide(1.0), BookSide(-1.0)
        self.valid = False
        self.update_id = -1
        self.from_updates_only = False
        self.snapshot_expected = True
        self._count = count
        self._pending: deque[Message] = deque(maxlen=MAX_PENDING)
        self._ticker: Ticker | None = None
        # Those newer than the last depth update: an older depth update that comes late is laid under them.
        self._newer: deque[Ticker] = deque(maxlen=MAX_NEWER)

    def start_file(self, has_snapshot: bool) -> None:
        """A new file begins: without a valid book and without a snapshot, build from updates alone."""
        self.snapshot_expected = has_snapshot
        if not has_snapshot and not self.valid:
            self._count("no_snapshot")

    def snapshot(self, message: Message) -> str:
        """Load a REST snapshot, then the pending updates it does not hold yet, then a fresher bookTicker."""
        last = int(message["lastUpdateId"])
        if self.valid and last < self.update_id:
            return "stale_snapshots"
        self._count("snapshots")
        self.bids.clear()
        self.asks.clear()
        self._apply(message["bids"], message["asks"])
        self.update_id, self.valid, self.from_updates_only = last, True, False
        pending = list(self._pending)
        self._pending.clear()
        for update in pending:
            self.depth(update)
        if self.valid:
            self._refresh_best()
        return "" if self.valid else "before_book"

    def depth(self, update: Message) -> str:
        """Apply a depth update, or keep it while no snapshot has come."""
        first, last = int(update["U"]), int(update["u"])
        previous = int(update.get("pu", first - 1))
        if not self.valid:
            if self.snapshot_expected:
                self._pending.append(update)
                return "before_book"
            self._restart_from_updates()
        elif last <= self.update_id:
            return "stale_depth"
        elif self.update_id < 0:
            # bookTicker came first; what it said before this update may be gone by now.
            self._restart_from_updates()
        elif previous > self.update_id and not self._survives_gap(update):
            return "before_book"
        self._apply(update["b"], update["a"])
        self.update_id = last
        self._refresh_best()
        return "" if not self.from_updates_only or self._confirmed() else "depth_ahead_of_ticker"

    def _survives_gap(self, update: Message) -> bool:
        self._count("sequence_gaps")
        if self.snapshot_expected:
            self.valid = False
            self._pending.append(update)
            return False
        self._restart_from_updates()
        return True

    def _restart_from_updates(self) -> None:
        self.bids.clear()
        self.asks.clear()
        self.valid = self.from_updates_only = True

    def ticker(self, update: Message) -> str:
        """Take the best bid and ask where they are newer than the book."""
        bid, bid_size = float(update["b"]), float(update["B"])
        ask, ask_size = float(update["a"]), float(update["A"])
        if not (0.0 < bid < _INF and 0.0 < ask < _INF and 0.0 < bid_size < _INF and 0.0 < ask_size < _INF):
            return "bad_quotes"
        if bid >= ask:
            return "crossed"
        update_id = int(update["u"])
        if self._ticker is not None and update_id < self._ticker[0]:
            return "stale_tickers"
        self._ticker = (update_id, bid, bid_size, ask, ask_size)
        if not self.valid and not self.snapshot_expected:
            self._restart_from_updates()
        if self.valid and update_id <= self.update_id:
            return "stale_tickers"
        self._newer.append(self._ticker)
        if self.valid:
            self.bids.set_best(bid, bid_size)
            self.asks.set_best(ask, ask_size)
        return "" if self.valid else "before_book"

    def _refresh_best(self) -> None:
        """Lay the bookTickers newer than the last depth update over it, in order."""
        newer = self._newer
        while newer and newer[0][0] <= self.update_id:
            newer.popleft()
        for _, bid, bid_size, ask, ask_size in newer:
            self.bids.set_best(bid, bid_size)
            self.asks.set_best(ask, ask_size)

    def _confirmed(self) -> bool:
        """Whether bookTicker names the best prices that the updates alone arrive at."""
        return self._ticker is not None and (self.bids.best, self.asks.best) == (self._ticker[1], self._ticker[3])

    def _apply(self, bids: list[list[str]], asks: list[list[str]]) -> None:
        for side, levels in ((self.bids, bids), (self.asks, asks)):
            for price_text, size_text in levels:
                price, size = float(price_text), float(size_text)
                if 0.0 < price < _INF and 0.0 <= size < _INF:
                    side.set(price, size)
                else:
                    self._count("bad_levels")


class BinanceSource(Source):
    """One instrument's recordings, in the order of their first receive time; times are receive times."""

    def __init__(self, *, files: Sequence[Path], symbol: str, venue: str, levels: int) -> None:
        ordered = sorted(files, key=lambda path: (first_receive_ns(path), path.name))
        super().__init__(symbol=symbol, venue=venue, kind="book", levels=levels, files=ordered)

    def _read(self, rows: int) -> Iterator[Events]:
        return _Replay(self, rows).run()


class _Replay:
    """One pass over the files: parses lines, drives the feed, and collects rows."""

    def __init__(self, source: BinanceSource, rows: int) -> None:
        self._source, self._quality, self._levels = source, source.quality, source.levels
        self._feed = L2Feed(source.quality.count)
        self._buffer = ChunkBuffer("book", source.levels, rows)
        self._view: list[float] = []
        self._now = 0
        self._last_trade = -1
        self._handlers = {"depth": self._book(self._feed.depth), "bookTicker": self._book(self._feed.ticker)}
        self._handlers["trade"] = self._trade
        self._streams: dict[str, Callable[[Message], Events | None]] = {}

    def run(self) -> Iterator[Events]:
        for path in self._source.files:
            with open_stream(path) as stream:
                head = list(itertools.islice(stream, SNAPSHOT_SEARCH_LINES))
                self._feed.start_file(any(b'"lastUpdateId"' in line for line in head))
                for number, line in enumerate(itertools.chain(head, stream), 1):
                    chunk = self._line(line, path, number)
                    if chunk is not None:
                        yield chunk
        yield self._buffer.take()

    def _line(self, line: bytes, path: Path, number: int) -> Events | None:
        if not line.strip():
            return None
        self._quality.rows_read += 1
        time_text, _, body = line.partition(b" ")
        self._advance(receive_ns(time_text, path, number), path, number)
        try:
            message = orjson.loads(body)
            stream = message.get("stream")
            if stream is None:
                return self._book(self._feed.snapshot)(message)
            handler = self._streams.get(stream) or self._handler(stream)
            return handler(message["data"])
        except orjson.JSONDecodeError as error:
            raise CorruptFileError(f"{path.name}: line {number} is not whole JSON: {error}") from error
        except KeyError as error:
            raise SchemaError(f"{path.name}: line {number} has no such key", field=str(error.args[0])) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise SchemaError(f"{path.name}: line {number}: {error}") from error

    def _advance(self, ts_ns: int, path: Path, number: int) -> None:
        if ts_ns < self._now:
            if self._now - ts_ns > MAX_STEP_BACK_NS:
                raise DataError(
                    f"{path.name}: line {number} lies {(self._now - ts_ns) / 1e9:.3f} s before a line in front of it",
                    field="time",
                    expected="lines in receive order, files that do not overlap",
                    was="unsorted",
                )
            self._quality.count("time_backwards")
        else:
            self._now = ts_ns

    def _handler(self, stream: str) -> Callable[[Message], Events | None]:
        symbol, _, rest = stream.partition("@")
        if symbol != self._source.symbol:
            raise SchemaError("stream of another instrument", expected=f"{self._source.symbol}@...", was=repr(stream))
        handler = self._handlers.get(rest.partition("@")[0], self._other)
        self._streams[stream] = handler
        return handler

    def _other(self, _: Message) -> None:
        self._quality.count("other_messages")

    def _book(self, handle: Callable[[Message], str]) -> Callable[[Message], Events | None]:
        def take(message: Message) -> Events | None:
            no_row = handle(message)
            if not self._feed.valid:
                self._view = []
            if no_row:
                self._quality.count(no_row)
                return None
            return self._emit_book()

        return take

    def _emit_book(self) -> Events | None:
        feed, levels = self._feed, self._levels
        bid_prices, bid_sizes = feed.bids.top(levels)
        ask_prices, ask_sizes = feed.asks.top(levels)
        if not bid_prices[0] < ask_prices[0]:
            self._quality.count("crossed" if bid_prices[0] >= ask_prices[0] else "before_book")
            return None
        view = [0.0] * (4 * levels)
        view[0::4], view[1::4], view[2::4], view[3::4] = bid_prices, bid_sizes, ask_prices, ask_sizes
        # Absent levels hold one and the same NaN object, and lists compare by identity first: equal views are equal.
        if view == self._view:
            self._quality.count("unchanged")
            return None
        self._view = view
        return self._buffer.add(self._now, [BOOK_UPDATE, 0.0, 0.0, 0.0, *view])

    def _trade(self, trade: Message) -> Events | None:
        price, size, trade_id = float(trade["p"]), float(trade["q"]), int(trade["t"])
        sign = -1.0 if trade["m"] else 1.0
        if self._last_trade >= 0 and trade_id != self._last_trade + 1:
            self._quality.count("trade_id_gaps")
        self._last_trade = trade_id
        if not (0.0 < price < _INF and 0.0 < size < _INF):
            self._quality.count("zero_trades")
        elif not self._view:
            self._quality.count("before_book")
        else:
            return self._buffer.add(self._now, [TRADE, price, size, sign, *self._view])
        return None


def receive_ns(text: bytes, path: Path, number: int) -> int:
    """Receive time of a line in nanoseconds; files named `.us.` carry microseconds.

    Raises SchemaError for text that is no integer, or one that is not a time of 2000-2100 in the unit of the name.
    """
    unit, scale = ("microseconds", 1_000) if ".us." in path.name else ("nanoseconds", 1)
    try:
        ts_ns = int(text) * scale
    except ValueError:
        ts_ns = -1
    if not EARLIEST_NS <= ts_ns < LATEST_NS:
        shown = text[:40].decode("utf-8", "replace")
        raise SchemaError(
            f"{path.name}: line {number}", field="receive time", expected=f"{unit} since 1970", was=repr(shown)
        )
    return ts_ns


def first_receive_ns(path: Path) -> int:
    """Receive time of the first line. Raises as `receive_ns` and `open_stream`."""
    with open_stream(path) as stream:
        return receive_ns(next(iter(stream), b"").partition(b" ")[0], path, 1)

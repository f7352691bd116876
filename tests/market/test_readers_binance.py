"""Binance recordings: the rebuilt book against a slow independent one, the catalogue's counts, and every break."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from market.quality import NO_EVENT
from market.readers import Source, open_source
from market.readers.binance import receive_ns
from market.readers.l2book import BookSide
from tickserve.errors import CorruptFileError, DataError, SchemaError, TickserveError
from tickserve.events import EVENT, TRADE, TRADE_SIGN, Events

# Rows and trades of the catalogue, and the trades before the snapshot, which have no book to stand on.
CATALOGUE = {
    "usdm_btcusdt_20240808.jsonl.gz": (93_954, 21_313, 5),
    "spot_btcusdt_20240808.jsonl.gz": (41_249, 9_757, 1),
}


def everything(source: Source, rows: int = 131_072) -> Events:
    """All chunks as one."""
    chunks = list(source.chunks(rows))
    assert all(len(chunk) <= rows for chunk in chunks)
    return Events(
        source.kind,
        source.levels,
        np.concatenate([chunk.ts_ns for chunk in chunks]),
        np.concatenate([chunk.values for chunk in chunks]),
    )


def first_lines(path: Path, count: int) -> list[bytes]:
    with gzip.open(path) as stream:
        return list(itertools.islice(stream, count))


def write_lines(path: Path, lines: Iterable[bytes]) -> Path:
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.writelines(lines)
    return path


class SlowBook:
    """Plain dictionaries, full sorts, and bookTicker laid over an otherwise untouched book at every look."""

    def __init__(self) -> None:
        self.bids: dict[float, float] = {}
        self.asks: dict[float, float] = {}
        self.waiting: list[dict[str, Any]] = []
        self.tickers: list[dict[str, Any]] = []
        self.id = -1

    def merge(self, update: dict[str, Any]) -> None:
        if update["u"] <= self.id:
            return
        self.id = update["u"]
        for book, side in ((self.bids, "b"), (self.asks, "a")):
            for price, size in update[side]:
                book[float(price)] = float(size)
                if float(size) == 0:
                    del book[float(price)]

    def take(self, message: dict[str, Any]) -> None:
        if "lastUpdateId" in message:
            self.merge({"u": message["lastUpdateId"], "b": message["bids"], "a": message["asks"]})
            for update in self.waiting:
                self.merge(update)
        elif "@depth" in message["stream"] and self.id < 0:
            self.waiting.append(message["data"])
        elif "@depth" in message["stream"]:
            self.merge(message["data"])
            self.tickers = [tick for tick in self.tickers if tick["u"] > self.id]
        elif "@bookTicker" in message["stream"]:
            self.tickers.append(message["data"])

    def look(self, levels: int) -> list[float]:
        bids, asks = dict(self.bids), dict(self.asks)
        for tick in self.tickers:
            if tick["u"] > self.id:
                bid, ask = float(tick["b"]), float(tick["a"])
                bids = {p: s for p, s in bids.items() if p < bid} | {bid: float(tick["B"])}
                asks = {p: s for p, s in asks.items() if p > ask} | {ask: float(tick["A"])}
        best_bids, best_asks = sorted(bids.items(), reverse=True)[:levels], sorted(asks.items())[:levels]
        return [x for bid, ask in zip(best_bids, best_asks, strict=True) for x in (*bid, *ask)]


def slow_rows(lines: list[bytes], scale: int, levels: int) -> list[tuple[int, list[float]]]:
    """The rows the reader must emit."""
    book, view, rows = SlowBook(), [], []
    for line in lines:
        time_text, body = line.split(b" ", 1)
        message, ts_ns = json.loads(body), int(time_text) * scale
        if message.get("stream", "").endswith("@trade"):
            data = message["data"]
            if view:
                sign = -1.0 if data["m"] else 1.0
                rows.append((ts_ns, [1.0, float(data["p"]), float(data["q"]), sign, *view]))
            continue
        book.take(message)
        if book.id >= 0 and (now := book.look(levels)) != view:
            view = now
            rows.append((ts_ns, [0.0, 0.0, 0.0, 0.0, *view]))
    return rows


@pytest.mark.parametrize(
    "name",
    ["usdm_btcusdt_20240808.jsonl.gz", "cm_btcusd_perp_20240808.jsonl.gz", "spot_ethusdt_20240808.jsonl.gz",
     "usdm_btcusdt_20230404.us.jsonl.gz"],
)  # fmt: skip
def test_the_book_equals_a_slow_independent_one(market_data: Path, tmp_path: Path, name: str) -> None:
    lines = first_lines(market_data / "binance_l2_stream" / name, 1_500)
    expected = slow_rows(lines, 1_000 if ".us." in name else 1, 5)
    events = everything(open_source([write_lines(tmp_path / name, lines)], levels=5), rows=97)
    assert len(events) == len(expected) > 500
    assert events.ts_ns.tolist() == [ts for ts, _ in expected]
    assert events.values.tolist() == [row for _, row in expected]


@pytest.mark.parametrize("name", CATALOGUE)
def test_rows_trades_order_and_sanity_match_the_catalogue(market_data: Path, name: str) -> None:
    source = open_source([market_data / "binance_l2_stream" / name], levels=5)
    events, quality = everything(source), source.quality
    rows, trades, before = CATALOGUE[name]
    assert quality.complete
    assert quality.rows_read == rows
    assert quality.trades == trades - before
    assert quality.counters["snapshots"] == 1
    assert not {"sequence_gaps", "trade_id_gaps", "crossed", "bad_levels", "zero_trades"} & quality.counters.keys()
    assert np.all(np.diff(events.ts_ns) >= 0)
    check_books(events)


def check_books(events: Events) -> None:
    """Never crossed, levels strictly ordered, trade columns set exactly on trades."""
    bid, ask = events.values[:, 4::4], events.values[:, 6::4]
    assert np.all(bid[:, 0] < ask[:, 0])
    assert not np.any(np.diff(bid, axis=1) >= 0)
    assert not np.any(np.diff(ask, axis=1) <= 0)
    trade = events.values[:, EVENT] == TRADE
    assert np.all(events.values[trade, 1:3] > 0)
    assert np.all(np.abs(events.values[trade, TRADE_SIGN]) == 1)
    assert not events.values[~trade, :4].any()


def test_the_book_continues_across_midnight(market_data: Path) -> None:
    folder = market_data / "binance_l2_stream"
    files = [folder / "usdm_btcusdt_20230405.us.jsonl.gz", folder / "usdm_btcusdt_20230404.us.jsonl.gz"]
    source = open_source(files, levels=5)
    events = everything(source)
    assert [path.name for path in source.files] == [files[1].name, files[0].name]
    assert source.quality.rows_read == 13_384 + 60_381
    assert not {"sequence_gaps", "no_snapshot", "crossed"} & source.quality.counters.keys()
    assert not np.isnan(events.values).any()
    check_books(events)


def test_a_file_without_a_snapshot_has_exact_best_prices(market_data: Path) -> None:
    folder = market_data / "binance_l2_stream"
    alone = open_source([folder / "usdm_btcusdt_20230405.us.jsonl.gz"], levels=5)
    events = everything(alone)
    assert alone.quality.counters["no_snapshot"] == 1
    check_books(events)
    both = everything(open_source([folder / "usdm_btcusdt_20230404.us.jsonl.gz", alone.files[0]], levels=5))
    expected = last_per_time(both)
    seen = last_per_time(events)
    shared = sorted(seen.keys() & expected.keys())
    assert len(shared) > 40_000
    # Where the book is known whole, the one built from updates alone shows the same best bid and ask.
    assert all(seen[ts] == expected[ts] for ts in shared)


def last_per_time(events: Events) -> dict[int, list[float]]:
    return dict(zip(events.ts_ns.tolist(), events.values[:, [4, 6]].tolist(), strict=True))


def depth(first: int, last: int, previous: int, bids: list[list[str]], asks: list[list[str]]) -> dict[str, Any]:
    data = {"e": "depthUpdate", "U": first, "u": last, "pu": previous, "b": bids, "a": asks}
    return {"stream": "x@depth@0ms", "data": data}


def ticker(update: int, bid: str, ask: str, size: str = "1") -> dict[str, Any]:
    return {"stream": "x@bookTicker", "data": {"u": update, "b": bid, "B": size, "a": ask, "A": size}}


def trade(number: int, price: str, size: str, maker: bool = True) -> dict[str, Any]:
    return {"stream": "x@trade", "data": {"t": number, "p": price, "q": size, "m": maker}}


def snapshot(last: int, bids: list[list[str]], asks: list[list[str]]) -> dict[str, Any]:
    return {"lastUpdateId": last, "bids": bids, "asks": asks}


BOOK = snapshot(10, [["99", "1"], ["98", "2"]], [["101", "1"], ["102", "2"]])
T0 = 1_700_000_000_000_000_000


def recording(path: Path, *messages: dict[str, Any], step: int = 1) -> Path:
    return write_lines(path, [f"{T0 + i * step} {json.dumps(m)}\n".encode() for i, m in enumerate(messages)])


@pytest.fixture
def replay(tmp_path: Path) -> Callable[..., tuple[Events, Source]]:
    def run(*messages: dict[str, Any]) -> tuple[Events, Source]:
        source = open_source([recording(tmp_path / "x.jsonl.gz", *messages)], levels=2)
        return everything(source), source

    return run


def test_a_gap_voids_the_book_until_the_next_snapshot(replay: Callable[..., tuple[Events, Source]]) -> None:
    lost = depth(15, 16, 14, [["99", "7"]], [])
    events, source = replay(
        BOOK, depth(11, 12, 10, [["99", "5"]], []), lost, trade(1, "99", "1"), ticker(17, "50", "200"),
        snapshot(20, [["90", "1"]], [["110", "1"]]), depth(21, 22, 20, [["91", "4"]], []),
    )  # fmt: skip
    assert source.quality.counters["sequence_gaps"] == 1
    assert source.quality.counters["before_book"] == 3
    assert events.values[:, [4, 5]].tolist() == [[99, 1], [99, 5], [90, 1], [91, 4]]


def test_spot_updates_continue_by_their_first_id(replay: Callable[..., tuple[Events, Source]]) -> None:
    update = depth(11, 12, 0, [["99", "5"]], [])
    del update["data"]["pu"]
    late = depth(14, 15, 0, [["99", "6"]], [])
    del late["data"]["pu"]
    _, source = replay(BOOK, update, late)
    assert source.quality.counters["sequence_gaps"] == 1


def test_updates_before_the_snapshot_are_joined_to_it(replay: Callable[..., tuple[Events, Source]]) -> None:
    events, source = replay(
        depth(5, 8, 4, [["99", "77"]], []),
        depth(9, 12, 8, [["98", "0"], ["97", "3"]], []),
        ticker(13, "99", "100"),
        BOOK,
    )
    assert source.quality.counters == {"before_book": 3, "snapshots": 1}  # kept, and joined or dropped by the snapshot
    assert events.values[:, 4:].tolist() == [[99, 1, 100, 1, 97, 3, 101, 1]]


def test_every_message_has_one_outcome(replay: Callable[..., tuple[Events, Source]]) -> None:
    """Also the odd ones, and those that meet two quirks at once: counted once each, so that the rows add up."""
    bad = ticker(3, "0", "101")
    events, source = replay(
        depth(1, 2, 0, [["99", "1"]], []), bad, ticker(4, "102", "101"), ticker(6, "99", "101"), ticker(5, "99", "101"),
        trade(1, "99", "1"), trade(2, "99", "0"), BOOK, snapshot(3, [], []), depth(8, 9, 7, [], []),
        ticker(9, "99", "101"), depth(11, 12, 10, [["-1", "1"], ["nan", "1"]], []),
        depth(13, 14, 12, [["105", "1"]], []), depth(15, 16, 14, [["105", "0"]], []), trade(3, "99", "1"),
        {"stream": "x@markPrice", "data": {}}, depth(20, 21, 19, [], []), ticker(19, "99", "101"), bad,
    )  # fmt: skip
    quality = source.quality
    assert quality.unaccounted == 0
    assert len(events) == 2
    assert {name: count for name, count in quality.counters.items() if name in NO_EVENT} == {
        "before_book": 5, "bad_quotes": 2, "crossed": 2, "stale_tickers": 2, "zero_trades": 1, "stale_snapshots": 1,
        "stale_depth": 1, "unchanged": 2, "other_messages": 1,
    }  # fmt: skip


def test_a_fresher_ticker_removes_the_levels_it_proves_gone(replay: Callable[..., tuple[Events, Source]]) -> None:
    events, source = replay(BOOK, ticker(11, "98.5", "99"), ticker(9, "99", "101"), ticker(12, "101", "99"))
    assert events.values[-1, 4:].tolist() == [98.5, 1, 99, 1, 98, 2, 101, 1]
    assert source.quality.counters["stale_tickers"] == 1
    assert source.quality.counters["crossed"] == 1


def test_a_late_depth_update_goes_under_every_fresher_ticker(replay: Callable[..., tuple[Events, Source]]) -> None:
    events, _ = replay(
        BOOK, ticker(13, "98", "102", "5"), ticker(14, "97", "101", "6"),
        depth(11, 12, 10, [["99", "9"]], [["102", "9"]]),  # older than both: 99 was gone by 13, and 102 held 5
    )  # fmt: skip
    expected = [97, 6, 101, 6, np.nan, 0, 102, 5]
    assert np.array_equal(events.values[-1, 4:], expected, equal_nan=True)


def test_trades_without_price_or_size_are_skipped(replay: Callable[..., tuple[Events, Source]]) -> None:
    events, source = replay(
        BOOK, trade(1, "99", "0"), trade(2, "0", "1"), trade(3, "nan", "1"), trade(5, "99", "2", False)
    )
    assert source.quality.counters["zero_trades"] == 3
    assert source.quality.counters["trade_id_gaps"] == 1
    assert events.values[1].tolist() == [1, 99, 2, 1, 99, 1, 101, 1, 98, 2, 102, 2]


def test_levels_not_seen_yet_are_absent(replay: Callable[..., tuple[Events, Source]]) -> None:
    events, source = replay(
        ticker(1, "99", "101"),
        depth(2, 3, 1, [["98", "2"]], []),  # what came before it is forgotten: the best waits for bookTicker
        ticker(4, "99", "101", "3"),
        depth(5, 6, 3, [["99", "0"]], []),  # 98 may not be the true best: wait
        ticker(7, "98.5", "101"),
    )
    nan = float("nan")
    expected = [[99, 1, 101, 1, nan, 0, nan, 0], [99, 3, 101, 3, 98, 2, nan, 0], [98.5, 1, 101, 1, 98, 2, nan, 0]]
    assert np.array_equal(events.values[:, 4:], expected, equal_nan=True)
    assert source.quality.counters["no_snapshot"] == 1
    assert source.quality.counters["depth_ahead_of_ticker"] == 2


def test_bad_levels_never_enter_the_book(replay: Callable[..., tuple[Events, Source]]) -> None:
    bad = [["-99.5", "1"], ["99.5", "-1"], ["nan", "1"], ["inf", "1"], ["99.7", "nan"]]
    events, source = replay(BOOK, depth(11, 12, 10, bad, []), depth(13, 13, 12, [["99", "3"]], []))
    assert source.quality.counters["bad_levels"] == 5
    assert events.values[:, 4].tolist() == [99, 99]


def test_a_crossed_book_is_not_emitted(replay: Callable[..., tuple[Events, Source]]) -> None:
    events, source = replay(BOOK, depth(11, 12, 10, [["105", "1"]], []), depth(13, 14, 12, [["105", "0"]], []))
    assert source.quality.counters["crossed"] == 1
    assert len(events) == 1


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        (
            b'1700000000000000001 {"stream":"x@trade","data":{"t":1,"p":"99"',
            CorruptFileError,
            "line 2 is not whole JSON",
        ),
        (b'1700000000000000001 {"stream":"x@trade","data":{"t":1,"q":"1","m":true}}', SchemaError, "p: .*line 2"),
        (
            b'1700000000000000001 {"stream":"x@trade","data":{"t":1,"p":"ninety","q":"1","m":true}}',
            SchemaError,
            "ninety",
        ),
        (b'1700000000000000001 {"stream":"y@trade","data":{"t":1,"p":"1","q":"1","m":true}}', SchemaError, "y@trade"),
        (b"1700000000000000001 [1, 2]", SchemaError, "line 2"),
        (b"1700000000000000001 17", SchemaError, "line 2"),
        (b'1700000000000001 {"stream":"x@trade","data":{}}', SchemaError, "nanoseconds"),
        (b'yesterday {"stream":"x@trade","data":{}}', SchemaError, "receive time"),
        (b'1699999000000000000 {"stream":"x@trade","data":{}}', DataError, "unsorted"),
    ],
)
def test_a_broken_line_is_refused_by_number(
    tmp_path: Path, line: bytes, error: type[TickserveError], message: str
) -> None:
    stream = b'1700000000000000000 {"stream":"x@bookTicker","data":{"u":1,"b":"1","B":"1","a":"2","A":"1"}}\n'
    source = open_source([write_lines(tmp_path / "x.jsonl.gz", [stream, line])])
    with pytest.raises(error, match=message):
        list(source.chunks(10))
    assert not source.quality.complete


def test_small_steps_back_in_time_are_clamped_and_counted(tmp_path: Path) -> None:
    lines = [
        f"{T0 + shift} {json.dumps(message)}\n".encode()
        for shift, message in [(1_000, BOOK), (400, trade(1, "99", "1")), (2_000, trade(2, "99", "1"))]
    ]
    source = open_source([write_lines(tmp_path / "x.jsonl.gz", lines)])
    assert (everything(source).ts_ns - T0).tolist() == [1_000, 1_000, 2_000]
    assert source.quality.counters["time_backwards"] == 1


def test_microsecond_files_are_told_by_name_and_checked_by_size() -> None:
    assert receive_ns(b"1680652700423575", Path("a.us.jsonl.gz"), 1) == 1_680_652_700_423_575_000
    with pytest.raises(SchemaError, match="microseconds"):
        receive_ns(b"1680652700423575000", Path("a.us.jsonl.gz"), 1)
    with pytest.raises(SchemaError, match="nanoseconds"):
        receive_ns(b"1680652700423575", Path("a.jsonl.gz"), 1)


ODD_VALUES = st.none() | st.text(max_size=4) | st.integers() | st.lists(st.integers(), max_size=2)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=80), key=st.sampled_from([*"ubaBAtpqm"]), value=ODD_VALUES)
def test_no_line_escapes_the_error_tree(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, key: str, value: object
) -> None:
    message = ticker(11, "99", "100") if key in "ubaBA" else trade(1, "99", "1")
    message["data"][key] = value
    lines = [
        f"{T0} {json.dumps(BOOK)}\n",
        f"{T0 + 1} {json.dumps(trade(0, '99', '1'))}\n",
        f"{T0 + 2} {json.dumps(message)}\n",
    ]
    path = write_lines(tmp_path_factory.mktemp("fuzz") / "x.jsonl.gz", [*(x.encode() for x in lines), data])
    try:
        events = everything(open_source([path], levels=2))
    except DataError:
        return
    check_books(events)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), max_size=80), st.sampled_from([1.0, -1.0]))
def test_a_side_equals_a_sorted_dictionary(updates: list[tuple[int, int]], sign: float) -> None:
    side, plain = BookSide(sign), {}
    for price, size in updates:
        side.set(price / 10, float(size))
        plain[price / 10] = float(size)
    best = sorted(((p, s) for p, s in plain.items() if s), reverse=sign > 0)[:4]
    prices, sizes = side.top(4)
    assert prices[: len(best)] == [p for p, _ in best]
    assert sizes == [s for _, s in best] + [0.0] * (4 - len(best))
    assert all(np.isnan(price) for price in prices[len(best) :])

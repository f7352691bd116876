"""LEAN ticks and FX quotes: the best bid/offer against a slow walk, the catalogue's counts, sessions, signs, zones."""

from __future__ import annotations

import csv
import io
import zipfile
from datetime import UTC, date, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from market.quality import Quality
from market.readers import Source, open_source
from market.readers.lean_ticks import CLOSE_MS, OPEN_MS, new_york_midnight_ns, read_day
from tickserve.errors import CorruptFileError, DataError, SchemaError, UsageError
from tickserve.events import EVENT, TRADE, Events

DAY = date(2013, 10, 7)


def everything(source: Source, rows: int = 131_072) -> Events:
    chunks = list(source.chunks(rows))
    assert all(len(chunk) <= rows for chunk in chunks)
    ts_ns = np.concatenate([chunk.ts_ns for chunk in chunks])
    return Events("book", source.levels, ts_ns, np.concatenate([chunk.values for chunk in chunks]))


def text_of(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        return archive.read(archive.namelist()[0]).decode()


def zipped(path: Path, text: str, member: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, text)
    return path


def quotes(folder: Path, *rows: str) -> Path:
    return zipped(folder / "20131007_quote.zip", "\n".join(rows), "20131007_xyz_Quote_Tick.csv")


def trades(folder: Path, *rows: str) -> Path:
    return zipped(folder / "20131007_trade.zip", "\n".join(rows), "20131007_xyz_Trade_Tick.csv")


def slow_book_rows(text: str, rows: int) -> list[tuple[int, list[float]]]:
    """Best bid/offer rows by walking the file: the last bid row and the last ask row, at each millisecond's end."""
    lines = list(csv.reader(io.StringIO(text)))[:rows]
    best: dict[str, tuple[int, int]] = {}
    seen: list[tuple[int, list[float]]] = []
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        ms, bid, bid_size, ask, ask_size = (int(field) for field in line[:5])
        if bid:
            best["bid"] = bid, bid_size
        if ask:
            best["ask"] = ask, ask_size
        if (following is None or int(following[0]) != ms) and len(best) == 2 and best["bid"][0] <= best["ask"][0]:
            row = [best["bid"][0] / 10_000, best["bid"][1], best["ask"][0] / 10_000, best["ask"][1]]
            opens = ms >= OPEN_MS and (not seen or seen[-1][0] < OPEN_MS)
            if not seen or seen[-1][1] != row or opens:
                seen.append((ms, row))
    return [(ms, row) for ms, row in seen if OPEN_MS <= ms < CLOSE_MS]


def test_the_best_bid_and_offer_equal_a_slow_walk(market_data: Path, tmp_path: Path) -> None:
    text = text_of(market_data / "us_equity_tick" / "aig" / "20131007_quote.zip")
    head = "".join(text.splitlines(keepends=True)[:150_000])
    path = zipped(tmp_path / "20131007_quote.zip", head, "20131007_aig_Quote_Tick.csv")
    events = everything(open_source([path]), rows=1_000)
    expected = slow_book_rows(head, 150_000)
    assert len(events) == len(expected) > 30_000
    midnight = int(datetime(2013, 10, 7, tzinfo=ZoneInfo("America/New_York")).timestamp()) * 10**9
    assert events.ts_ns.tolist() == [midnight + ms * 1_000_000 for ms, _ in expected]
    assert events.values[:, 4:].tolist() == [row for _, row in expected]


def test_kept_per_exchange_the_quotes_would_be_crossed(market_data: Path) -> None:
    """Why the two sides are read as national: per exchange, nearly every best is crossed; as read, hardly any is."""
    quality = Quality()
    path = market_data / "us_equity_tick" / "aig" / "20131007_quote.zip"
    emitted = len(read_day(path, None, DAY, quality))
    assert quality.counters["crossed"] < 0.001 * emitted
    bids: dict[str, int] = {}
    asks: dict[str, int] = {}
    crossed = total = 0
    for line in text_of(path).splitlines()[:100_000]:
        _, bid, _, ask, _, exchange, _, _ = line.split(",")
        (bids if bid != "0" else asks)[exchange] = int(bid) or int(ask)
        if bids and asks:
            total += 1
            crossed += max(bids.values()) > min(asks.values())
    assert crossed > 0.9 * total


def test_a_day_matches_the_catalogue(market_data: Path) -> None:
    folder = market_data / "us_equity_tick" / "bac"
    source = open_source([folder / "20131007_quote.zip", folder / "20131007_trade.zip"])
    events = everything(source)
    assert (source.symbol, source.venue, source.levels) == ("bac", "us-equity", 1)
    assert source.quality.rows_read == 476_855 + 88_172
    start = np.array([OPEN_MS, CLOSE_MS]) * 1_000_000 + new_york_midnight_ns(DAY)
    assert events.ts_ns[0] >= start[0]
    assert events.ts_ns[-1] < start[1]
    assert np.all(events.values[:, 4] <= events.values[:, 6])
    traded = events.values[:, EVENT] == TRADE
    assert 0 < traded.sum() < 88_172
    assert np.array_equal(events.values[traded, 1], np.rint(events.values[traded, 1] * 10_000) / 10_000)
    # Trades outside the best of their moment exist, yet nearly all lie inside a cent of it.
    price, bid, ask = events.values[traded, 1], events.values[traded, 4], events.values[traded, 6]
    assert np.mean((price >= bid - 0.0101) & (price <= ask + 0.0101)) > 0.99


def test_three_days_of_a_folder_stream_in_order(market_data: Path) -> None:
    source = open_source([market_data / "us_equity_tick" / "bac"])
    last = 0
    for chunk in source.chunks(50_000):
        assert len(chunk) <= 50_000
        assert chunk.ts_ns[0] >= last
        last = int(chunk.ts_ns[-1])
    assert source.quality.to_json()["first"].startswith("2013-10-07T13:30")
    assert source.quality.rows_read == 476_855 + 576_096 + 644_880 + 88_172 + 125_872 + 122_832


def test_trades_alone_are_refused(market_data: Path) -> None:
    with pytest.raises(DataError, match="a book needs quotes"):
        open_source([market_data / "us_equity_tick" / "spy"])


def test_several_symbols_ask_for_one(market_data: Path) -> None:
    with pytest.raises(UsageError, match=r"aig.*bac.*spy.*--symbol"):
        open_source([market_data / "us_equity_tick"])
    assert open_source([market_data / "us_equity_tick"], symbol="BAC").symbol == "bac"
    with pytest.raises(UsageError, match=r"one of us-equity/aig, us-equity/bac, us-equity/spy, was 'msft'"):
        open_source([market_data / "us_equity_tick"], symbol="msft")


def test_quirks_are_counted_by_rule(tmp_path: Path) -> None:
    quotes(
        tmp_path,
        "34200000,100000,100,0,0,N,1,0",
        "34200000,0,0,100200,300,Q,1,0",
        "34200005,100300,100,0,0,N,1,0",  # crossed
        "34200006,100200,100,0,0,N,1,0",  # locked
        "34200007,0,0,1,1,Q,1,1",  # suspicious
        "34200008,0,0,0,0,Q,1,0",  # empty
        "34200009,100000,0,0,0,Q,1,0",  # withdrawn
        "34200010,100000,200,0,0,Q,1,0",
        "34200011,-5,200,0,0,Q,1,0",
        "57600000,100100,200,0,0,Q,1,0",  # after the close
    )
    trades(tmp_path, "34199999,100000,5,N,0,0", "34200010,100200,0,N,0,0", "34200011,100200,7,N,0,0")
    source = open_source([tmp_path])
    events = everything(source)
    assert events.values.tolist() == [
        [0, 0, 0, 0, 10.0, 100, 10.02, 300],
        [0, 0, 0, 0, 10.02, 100, 10.02, 300],
        [0, 0, 0, 0, 10.0, 200, 10.02, 300],
        [1, 10.02, 7, 1, 10.0, 200, 10.02, 300],
    ]
    assert source.quality.counters == {
        "bad_quotes": 1, "crossed": 1, "empty_quotes": 1, "locked": 1, "outside_session": 2, "same_ms_quotes": 1,
        "suspicious": 1, "withdrawn_quotes": 1, "zero_trades": 1,
    }  # fmt: skip


def test_what_comes_before_both_sides_are_known_is_counted(tmp_path: Path) -> None:
    """Each row is counted once: merged and early rows too, and rows outside the session under that name alone."""
    quotes(
        tmp_path,
        "34199000,0,0,100200,300,N,1,0",  # before the open: builds the book
        "34199000,0,0,100200,300,N,1,0",
        "34199500,100300,5,0,0,N,1,0",  # crossed, but outside
        "34199600,0,0,100200,0,N,1,0",  # withdrawn, but outside
        "34200000,100000,100,0,0,N,1,0",  # the ask is withdrawn
        "34200001,0,0,100200,300,N,1,0",
    )
    trades(tmp_path, "34199999,100000,5,N,0,0", "34200000,100100,5,N,0,0", "34200002,100100,5,N,0,0")
    source = open_source([tmp_path])
    assert len(everything(source)) == 2
    assert source.quality.counters == {"outside_session": 5, "withdrawn_quotes": 1, "before_book": 1}
    assert source.quality.unaccounted == 0

    late = tmp_path / "late"
    late.mkdir()
    quotes(
        late,
        "34200000,100000,100,0,0,N,1,0",
        "34200001,100000,200,0,0,N,1,0",
        "34200002,100100,300,0,0,N,1,0",
        "34200005,0,0,100200,300,N,1,0",
    )
    source = open_source([late])
    assert len(everything(source)) == 1
    assert source.quality.counters == {"before_book": 3}
    assert source.quality.unaccounted == 0


def test_the_notes_say_how_quotes_and_trades_are_read(tmp_path: Path) -> None:
    quotes(tmp_path, "34200000,100000,100,0,0,N,1,0", "34200000,0,0,100200,300,Q,1,0")
    source = open_source([tmp_path])
    everything(source)
    notes = "\n".join(source.quality.notes)
    for said in ("new national best", "size quoted by the exchange that sets it", "sale condition"):
        assert said in notes


def test_a_trade_is_signed_by_the_book_before_its_millisecond(tmp_path: Path) -> None:
    quotes(
        tmp_path,
        "34200000,100000,100,0,0,N,1,0",
        "34200000,0,0,100200,300,N,1,0",
        "34200010,0,0,100400,300,N,1,0",  # the trade at 100200 took the offer; the new mid equals its price
    )
    trades(
        tmp_path,
        "34200000,100100,1,N,0,0",  # no book before its millisecond, no trade before it: unknown
        "34200005,100000,1,N,0,0",
        "34200006,100300,1,N,0,0",
        "34200010,100200,1,N,0,0",  # above the mid that stood; by the mid after, or the tick rule, a seller
        "34200020,100200,1,N,0,0",  # at the mid now: the last different price was above
        "34200030,100100,1,N,0,0",
    )
    events = everything(open_source([tmp_path]))
    traded = events.values[:, EVENT] == TRADE
    assert events.values[traded, 3].tolist() == [0, -1, 1, 1, -1, -1]
    # The quote of a millisecond stands before its trades.
    assert events.values[:, EVENT].tolist() == [0, 1, 1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("day", [date(2013, 10, 7), date(2013, 12, 2), date(2021, 3, 15), date(1998, 1, 2)])
def test_new_york_midnight_knows_daylight_saving(day: date) -> None:
    expected = datetime(day.year, day.month, day.day, tzinfo=ZoneInfo("America/New_York"))
    assert new_york_midnight_ns(day) == int(expected.timestamp()) * 10**9


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("34200001,abc,100,0,0,N,1,0", r"row 3, column 'bid': expected an integer, was 'abc'"),
        ("34200001,100000,100,0,0,N,1", r"row 3: expected 8 fields .*, was 7"),
        ("34200001,100000,100,0,0,N,1,0,9", r"row 3: expected 8 fields .*, was 9"),
        ("34200001,,100,0,0,N,1,0", r"row 3, column 'bid': expected an integer, was ''"),
        ("34200001,1.5,100,0,0,N,1,0", r"row 3, column 'bid'"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, row: str, message: str) -> None:
    good = ["34200000,100000,100,0,0,N,1,0", "34200000,0,0,100200,300,N,1,0"]
    with pytest.raises(SchemaError, match=message):
        everything(open_source([quotes(tmp_path, *good, row)]))


def test_unsorted_quotes_are_refused(tmp_path: Path) -> None:
    path = quotes(tmp_path, "34205000,100000,100,0,0,N,1,0", "34200000,0,0,100200,300,N,1,0")
    with pytest.raises(DataError, match=r"row 2 lies 5\.000 s before"):
        everything(open_source([path]))


def test_crlf_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    rows = ["34200000,100000,100,0,0,N,1,0", "34200000,0,0,100200,300,N,1,0", "34200001,100100,100,0,0,N,1,0"]
    (tmp_path / "plain").mkdir()
    plain = everything(open_source([quotes(tmp_path / "plain", *rows)]))
    text = "\ufeff" + "\r\n".join(rows) + "\r\n"
    windows = everything(open_source([zipped(tmp_path / "20131007_quote.zip", text, "20131007_xyz_Quote_Tick.csv")]))
    assert np.array_equal(plain.values, windows.values)
    assert np.array_equal(plain.ts_ns, windows.ts_ns)


def test_a_damaged_zip_is_refused(market_data: Path, tmp_path: Path) -> None:
    data = (market_data / "us_equity_tick" / "bac" / "20131007_quote.zip").read_bytes()
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 0xFF
    for name, content in (("cut", data[: len(data) // 2]), ("flipped", bytes(damaged))):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "20131007_quote.zip"
        path.write_bytes(content)
        with pytest.raises(CorruptFileError, match=r"20131007_quote\.zip"):
            everything(open_source([path]))


# Rows, crossed and locked of the catalogue, whose "crossed" are bid > ask.
FX = {
    "20140501_quote.zip": (51_053, 3_991, 5_409),
    "20140502_quote.zip": (96_406, 12_061, 13_004),
    "20140504_quote.zip": (8_025, 174, 259),
}


def test_fx_quotes_match_the_catalogue(market_data: Path) -> None:
    source = open_source([market_data / "fx_tick" / "fxcm_eurusd" / name for name in FX])
    events = everything(source)
    rows, crossed, locked = (sum(column) for column in zip(*FX.values(), strict=True))
    assert (source.symbol, source.venue) == ("eurusd", "fxcm")
    assert (source.quality.rows_read, source.quality.counters["crossed"]) == (rows, crossed)
    assert source.quality.counters["locked"] == locked
    assert len(events) == rows - crossed
    assert np.all(events.values[:, 4] <= events.values[:, 6])
    assert not events.values[:, [5, 7]].any()  # no size is stated, none is invented
    first = datetime(2014, 5, 1, 5, 0, 1, tzinfo=UTC)  # file midnight is 05:00 UTC, summer and winter
    assert events.ts_ns[0] == int(first.timestamp()) * 10**9 + 787_000_000


def test_fx_prices_are_the_decimals_of_the_file(market_data: Path) -> None:
    path = market_data / "fx_tick" / "fxcm_eurusd" / "20140504_quote.zip"
    expected = [
        [float(bid), float(ask)] for _, bid, ask in csv.reader(io.StringIO(text_of(path))) if float(bid) <= float(ask)
    ]
    assert everything(open_source([path])).values[:, [4, 6]].tolist() == expected

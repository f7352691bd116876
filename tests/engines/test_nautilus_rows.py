"""NautilusTrader's data as rows: the readers' own, bit for bit, also where nautilus parsed the file."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from nautilus_trader.model.data import (
    NULL_ORDER,
    Bar,
    BarType,
    BookOrder,
    OrderBookDelta,
    OrderBookDeltas,
    OrderBookDepth10,
    QuoteTick,
    TradeTick,
)
from nautilus_trader.model.enums import AggressorSide, BookAction, OrderSide, RecordFlag
from nautilus_trader.model.identifiers import TradeId
from nautilus_trader.model.objects import Price, Quantity
from nautilus_trader.persistence.wranglers import BarDataWrangler, QuoteTickDataWrangler

from market.build import build_features
from market.readers import open_source
from tests.engines.conftest import BARS, BINANCE, EQUITY, FX, FX_BARS, instrument, instrument_for, recorded
from tickserve.config import FeatureSettings
from tickserve.engines.nautilus import RULES, BarRows, BookRows, BookRules, Event, decimals, nautilus_data
from tickserve.errors import DataError, InputRejectedError, UsageError
from tickserve.events import Events
from tickserve.features.spec import default_spec
from tickserve.stream._definition import Definition
from tickserve.stream._rows import RowMaker

MS, SECOND = 10**6, 10**9
START = 1_700_000_000 * SECOND
MINUTES = "TEST.VENUE-1-MINUTE-LAST-EXTERNAL"
ONE = instrument(2, 0)


def taken(rows: BookRows | BarRows, data: list[Any]) -> list[Event]:
    return [event for each in data if (event := rows.take(each)) is not None]


def assert_same(events: list[Event], expected: Events) -> None:
    assert [event.ts_ns for event in events] == expected.ts_ns.tolist()
    assert np.stack([event.row for event in events]).tobytes() == expected.values.tobytes()


def through_nautilus(events: Events, rules: str) -> tuple[list[Event], BookRows | BarRows]:
    made = instrument_for(events)
    rows: BookRows | BarRows
    if events.kind == "bars":
        rows, data = BarRows(made.id), nautilus_data(events, made, BarType.from_str(MINUTES))
    else:
        rows, data = BookRows(made.id, events.levels, RULES[rules]), nautilus_data(events, made)
    return taken(rows, data), rows


RECORDINGS = [((BINANCE,), "binance"), ((FX,), "lean-fx"), (EQUITY, "lean-equity"), ((BARS,), "")]
NAMES = ["depth", "quotes", "quotes-and-trades", "bars"]


@pytest.mark.parametrize(("names", "rules"), RECORDINGS, ids=NAMES)
def test_recorded_events_come_back_bit_for_bit(market_data: Path, names: tuple[str, ...], rules: str) -> None:
    events = recorded(market_data, *names, most=20_000)
    assert len(events) > 4_000
    made, rows = through_nautilus(events, rules)
    assert_same(made, events)
    assert not rows.counts


@pytest.mark.parametrize(
    ("names", "rules"), [each for each in RECORDINGS if each[0] != EQUITY], ids=lambda each: str(each)[:9]
)
def test_online_features_are_the_training_matrix(
    market_data: Path, tmp_path: Path, names: tuple[str, ...], rules: str
) -> None:
    source = open_source([market_data / name for name in names], levels=5)
    spec = default_spec(source.kind, source.levels)
    table = build_features(source, spec, FeatureSettings(max_rows=4_000, store=str(tmp_path))).load()
    jump = 1.5 if spec.kind == "bars" else None
    made, _ = through_nautilus(recorded(market_data, *names), rules)

    def features(swap: bool) -> bytes:
        maker = RowMaker(Definition(spec, table.stride, jump, input="features", window=None, state=()))
        order = np.arange(len(made[0].row))
        if swap:
            order[[0, 1, 4, 5] if spec.kind == "book" else [0, 1]] = [1, 0, 5, 4] if spec.kind == "book" else [1, 0]
        kept = [row for event in made if (row := maker.step(event.ts_ns, event.row[order])).kept]
        return np.stack([row.features for row in kept]).tobytes()

    expected = np.where(np.isinf(table.features), np.float32(np.nan), table.features).tobytes()
    assert len(table) > 1_000
    assert features(swap=False) == expected
    assert features(swap=True) != expected  # columns in another order are noticed


def test_quotes_that_nautilus_parsed_are_the_readers(market_data: Path) -> None:
    """The file as it is, crossed quotes and all, through nautilus' own wrangler."""
    with zipfile.ZipFile(market_data / FX) as archive:
        frame = pd.read_csv(io.BytesIO(archive.read(archive.namelist()[0])), names=["ms", "bid_price", "ask_price"])
    midnight = pd.Timestamp("2014-05-04 05:00", tz="UTC")
    frame.index = pd.DatetimeIndex(midnight + pd.to_timedelta(frame.pop("ms"), unit="ms"), name="timestamp")
    frame["bid_size"] = frame["ask_size"] = 0.0
    pair = instrument(5, 0)
    rows = BookRows(pair.id, 1, RULES["lean-fx"])
    made = taken(rows, QuoteTickDataWrangler(pair).process(frame))
    assert_same(made, recorded(market_data, FX))
    assert rows.counts == {"crossed": len(frame) - len(made)}
    assert rows.counts["crossed"] == 174
    assert len(taken(BookRows(pair.id, 1, RULES["binance"]), QuoteTickDataWrangler(pair).process(frame))) == 0


def test_bars_that_nautilus_parsed_are_the_readers(market_data: Path) -> None:
    with gzip.open(market_data / FX_BARS) as file:
        frame = pd.read_csv(file, index_col="timestamp", parse_dates=True).assign(volume=0.0)
    events = recorded(market_data, FX_BARS)
    made = instrument_for(events)
    bars = BarDataWrangler(BarType.from_str(MINUTES), made).process(frame, ts_init_delta=60 * SECOND)
    assert bars[0].ts_event == bars[0].ts_init - 60 * SECOND
    assert_same(taken(BarRows(made.id), bars), events)


def depth_deltas(message: dict[str, Any], ts_ns: int, last: bool = True) -> OrderBookDeltas:
    sides = (
        (OrderSide.BUY, message.get("b", message.get("bids"))),
        (OrderSide.SELL, message.get("a", message.get("asks"))),
    )
    made = [OrderBookDelta.clear(CRYPTO.id, 0, ts_ns, ts_ns)] if "lastUpdateId" in message else []
    for side, levels in sides:
        for price, size in levels:
            order = BookOrder(side, Price(float(price), 1), Quantity(float(size), 3), 0)
            action = BookAction.UPDATE if float(size) else BookAction.DELETE
            made.append(OrderBookDelta(CRYPTO.id, action, order, 0, 0, ts_ns, ts_ns))
    if last:
        end = made.pop()
        made.append(OrderBookDelta(CRYPTO.id, end.action, end.order, RecordFlag.F_LAST, 0, ts_ns, ts_ns))
    return OrderBookDeltas(CRYPTO.id, made)


CRYPTO = instrument(1, 3)


def test_a_book_that_nautilus_kept_is_the_readers(market_data: Path, tmp_path: Path) -> None:
    """Snapshot and depth updates through nautilus' order book; trades between them."""
    with gzip.open(market_data / BINANCE) as file:
        lines = file.readlines()
    lines = [line for line in lines if b"@depth" in line or b"@trade" in line or b"lastUpdateId" in line]
    path = tmp_path / Path(BINANCE).name
    path.write_bytes(gzip.compress(b"".join(lines)))
    rows, pending, made, last_id = BookRows(CRYPTO.id, 5, RULES["binance"]), [], [], -1
    for line in lines:
        time, _, body = line.partition(b" ")
        ts_ns, message = int(time) * 1_000, json.loads(body)
        data = message.get("data", message)
        if "lastUpdateId" in data:
            last_id = data["lastUpdateId"]
            batch = [depth_deltas(data, ts_ns, last=False)]
            batch += [depth_deltas(each, ts_ns, last=False) for each in pending if each["u"] > last_id]
            batch.append(depth_deltas({"b": data["bids"][:0], "a": [["1", "0"]]}, ts_ns))
        elif data["e"] == "trade":
            sign = AggressorSide.SELLER if data["m"] else AggressorSide.BUYER
            price, size = Price.from_str(data["p"]), Quantity.from_str(data["q"])
            if not float(data["q"]):
                continue
            batch = [TradeTick(CRYPTO.id, price, size, sign, TradeId(str(data["t"])), ts_ns, ts_ns)]
        elif last_id < 0:
            pending.append(data)
            continue
        else:
            batch = [depth_deltas(data, ts_ns)]
        made += taken(rows, batch)
    expected = recorded(tmp_path, path.name)
    assert (expected.values[:, 0] == 0).sum() > 2_000
    assert (expected.values[:, 0] == 1).sum() > 1_000
    assert_same(made, expected)


def test_prices_are_the_floats_of_their_text() -> None:
    """What nautilus' own conversion is not: it rounds twice."""
    texts = [f"{number / 100:.2f}" for number in range(1, 9_999_999, 999)]
    rows = BookRows(ONE.id, 1, BookRules(repeats=True))
    made = taken(rows, [quote(step, text, str(int(float(text)) + 1) + ".01") for step, text in enumerate(texts)])
    assert [event.row[4] for event in made] == [float(text) for text in texts]
    assert [float(Price.from_str(text)) for text in texts] != [float(text) for text in texts]


def quote(
    step: int, bid: str = "100.00", ask: str = "100.01", sizes: tuple[int, int] = (1, 1), back: int = 0
) -> QuoteTick:
    ts_ns = START + step * MS - back
    numbers = Price.from_str(bid), Price.from_str(ask), *(Quantity.from_int(size) for size in sizes)
    return QuoteTick(ONE.id, *numbers, ts_ns, ts_ns)


def trade(step: int, side: AggressorSide = AggressorSide.BUYER) -> TradeTick:
    ts_ns = START + step * MS
    return TradeTick(ONE.id, Price.from_str("100.01"), Quantity.from_int(3), side, TradeId("1"), ts_ns, ts_ns)


def bar(minute: int, close: str = "10.0", revision: bool = False) -> Bar:
    prices = [Price.from_str(each) for each in ("10.0", "11.0", "9.0" if close != "0.0" else "0.0", close)]
    ts_ns = START + minute * 60 * SECOND
    return Bar(BarType.from_str(MINUTES), *prices, Quantity.from_int(0), ts_ns, ts_ns, is_revision=revision)


def test_what_the_readers_drop_is_dropped_and_counted() -> None:
    rows = BookRows(ONE.id, 1, RULES["binance"])
    data = [trade(0), quote(1), quote(2), quote(3, "100.02"), quote(4, "100.01"), quote(5, sizes=(0, 1)), trade(6)]
    data.append(quote(7, ask="100.02"))
    made = taken(rows, data)
    assert rows.counts == {"before_book": 1, "unchanged": 1, "crossed": 2, "no_book": 1}
    assert [event.ts_ns - START for event in made] == [1 * MS, 6 * MS, 7 * MS]
    np.testing.assert_array_equal(made[1].row, [1, 100.01, 3, 1, 100, 1, 100.01, 1])


@pytest.mark.parametrize(
    ("side", "sign"), [(AggressorSide.BUYER, 1), (AggressorSide.SELLER, -1), (AggressorSide.NO_AGGRESSOR, 0)]
)
def test_a_trades_sign_is_the_aggressors(side: AggressorSide, sign: float) -> None:
    assert taken(BookRows(ONE.id, 1, RULES["binance"]), [quote(0), trade(1, side)])[1].row[3] == sign


def test_each_venues_rules() -> None:
    data = [
        quote(0),
        quote(1),
        quote(2, "100.01"),
        quote(3, sizes=(0, 0)),
        quote(7_200_000, "100.00", "100.02"),
        quote(2 * 7_200_000, "100.00", "100.02"),
    ]
    kept = {
        name: [(event.ts_ns - START) // MS for event in taken(BookRows(ONE.id, 1, rules), data)]
        for name, rules in RULES.items()
    }
    assert kept["binance"] == [0, 7_200_000]
    assert kept["lean-equity"] == [0, 2, 7_200_000, 14_400_000]
    assert kept["lean-fx"] == [0, 1, 2, 3, 7_200_000, 14_400_000]


def test_absent_levels_are_nan_without_size() -> None:
    def order(side: OrderSide, price: float, size: int) -> BookOrder:
        return BookOrder(side, Price(price, 2), Quantity.from_int(size), 0)

    def depth(step: int, bids: list[BookOrder], asks: list[BookOrder]) -> OrderBookDepth10:
        sides = [each + [NULL_ORDER] * (3 - len(each)) for each in (bids, asks)]
        return OrderBookDepth10(ONE.id, *sides, [1] * 3, [1] * 3, 0, 0, START + step, START + step)

    bids, asks = (
        [order(OrderSide.BUY, 10, 1), order(OrderSide.BUY, 9, 0), order(OrderSide.BUY, 8, 2)],
        [order(OrderSide.SELL, 11, 1)],
    )
    rows = BookRows(ONE.id, 3, RULES["binance"])
    (event,) = taken(rows, [depth(0, bids, asks), depth(1, bids, asks)])
    np.testing.assert_array_equal(event.row[4:], [10, 1, 11, 1, 8, 2, np.nan, 0, np.nan, 0, np.nan, 0])
    assert rows.counts == {"unchanged": 1}
    assert taken(rows, [depth(2, [], asks), trade(1)]), "one side gone: trades stand on the last whole book"
    assert not taken(rows, [depth(3 * MS, [], []), trade(4)]), "a book that was cleared holds no trade"
    assert rows.counts == {"unchanged": 1, "no_book": 2, "before_book": 1}


def test_a_message_cut_in_two_is_one_row() -> None:
    rows = BookRows(CRYPTO.id, 1, RULES["binance"])
    halves = [{"b": [["10.0", "1"]], "a": [["10.1", "1"]]}, {"b": [["10.0", "2"]], "a": []}]
    first, second = depth_deltas(halves[0], START, last=False), depth_deltas(halves[1], START)
    (event,) = taken(rows, [first, second])
    assert event.row[5] == 2
    assert rows.counts == {"mid_message": 1}


def test_a_clock_that_steps_back_a_little_is_held_and_far_is_refused() -> None:
    rows = BookRows(ONE.id, 1, RULES["lean-fx"])
    assert taken(rows, [quote(0), quote(1, back=SECOND)])[1].ts_ns == START
    assert rows.counts == {"time_backwards": 1}
    with pytest.raises(InputRejectedError, match=r"ts_init.*out of order.*2\.000 s"):
        rows.take(quote(0, back=2 * SECOND))
    assert taken(rows, [quote(2)])[0].ts_ns == START + 2 * MS


def test_data_of_another_instrument_or_kind_is_refused() -> None:
    rows = BookRows(instrument(2, 0, "OTHER.VENUE").id, 1, RULES["binance"])
    with pytest.raises(InputRejectedError, match=r"instrument_id.*OTHER\.VENUE.*TEST\.VENUE"):
        rows.take(quote(0))
    with pytest.raises(InputRejectedError, match=r"data.*Bar"):
        rows.take(bar(0))
    with pytest.raises(InputRejectedError, match=r"data.*QuoteTick"):
        BarRows(ONE.id).take(quote(0))
    with pytest.raises(UsageError, match="levels"):
        BookRows(ONE.id, 2, RULES["binance"]).take(quote(0))


def test_bars_again_revised_or_without_a_price_make_no_row() -> None:
    rows = BarRows(ONE.id)
    made = taken(rows, [bar(0), bar(0), bar(1, revision=True), bar(1, "0.0"), bar(2)])
    assert [(event.ts_ns - START) // (60 * SECOND) for event in made] == [0, 2]
    assert rows.counts == {"duplicate_times": 2, "non_positive_price": 1}
    with pytest.raises(InputRejectedError, match="ts_init"):
        rows.take(bar(1))
    assert taken(rows, [bar(3)])


def test_numbers_that_are_no_decimals_and_books_too_deep_are_refused() -> None:
    assert decimals(np.array([1.5, np.nan, 0.25])) == 2
    with pytest.raises(DataError, match="9 decimals"):
        decimals(np.array([1 / 3]))
    with pytest.raises(UsageError, match="levels"):
        nautilus_data(Events("book", 11, np.array([START]), np.zeros((1, 48))), ONE)
    with pytest.raises(UsageError, match="bar_type"):
        nautilus_data(Events("bars", 0, np.array([START]), np.zeros((1, 5))), ONE)
    depth = nautilus_data(Events("book", 2, np.array([START]), np.zeros((1, 12))), ONE)
    with pytest.raises(UsageError, match="levels"):
        BookRows(ONE.id, 11, RULES["binance"]).take(depth[0])


def test_without_nautilus_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['nautilus_trader'] = None; import tickserve.engines\n"
        "try:\n    import tickserve.engines.nautilus\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MissingExtraError 'nautilus_trader' is not installed")
    assert "tickserve[engines]" in done.stdout


def test_importing_the_package_alone_loads_no_engine() -> None:
    code = "import sys, tickserve.engines; print('nautilus_trader' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

"""Recorded events as NautilusTrader's market data, for a backtest of what was recorded.

The way back (`BookRows`, `BarRows`) gives the same rows, bit for bit. Letters: L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from nautilus_trader.model.data import (
    NULL_ORDER,
    Bar,
    BarType,
    BookOrder,
    OrderBookDepth10,
    QuoteTick,
    TradeTick,
)
from nautilus_trader.model.enums import AggressorSide, OrderSide
from nautilus_trader.model.identifiers import TradeId
from nautilus_trader.model.instruments import Instrument
from nautilus_trader.model.objects import Price, Quantity

from tickserve.errors import DataError, UsageError
from tickserve.events import EVENT, TRADE, TRADE_PRICE, TRADE_SIGN, TRADE_SIZE, Events

MAX_DECIMALS: Final = 9
DEPTH = 10
AGGRESSORS: Final = {1.0: AggressorSide.BUYER, -1.0: AggressorSide.SELLER, 0.0: AggressorSide.NO_AGGRESSOR}


def decimals(values: npt.NDArray[np.float64]) -> int:
    """The fewest decimals that hold every value exactly, for an instrument's precision; NaN is left out.

    Raises DataError where nine are too few: such a number is no decimal price.
    """
    known = values[np.isfinite(values)]
    for count in range(MAX_DECIMALS + 1):
        scale = 10.0**count
        whole = np.rint(known * scale)
        if (whole / scale == known).all():
            return count
    raise DataError("not a decimal number", field="values", expected=f"{MAX_DECIMALS} decimals at most")


def nautilus_data(events: Events, instrument: Instrument, bar_type: BarType | None = None) -> list[Any]:
    """`events` as nautilus data of `instrument`, in their order; `ts_event` and `ts_init` are the events' time.

    One level gives QuoteTick, up to ten OrderBookDepth10, with a TradeTick for each trade; bars give Bar of `bar_type`.
    Add it with `engine.add_data(data, sort=False)`, which keeps the order of one nanosecond. Raises UsageError, and
    DataError for events out of order: over those nautilus' clock ends the process.
    """
    if np.any(np.diff(events.ts_ns) < 0):
        raise DataError("events out of order", field="ts_ns", expected="times that never decrease")
    if events.kind == "bars":
        if bar_type is None:
            raise UsageError("bars need a type", field="bar_type", expected="a BarType", was="None")
        return _bars(events, instrument, bar_type)
    if events.levels > DEPTH:
        raise UsageError(
            "nautilus' depth has ten levels", field="levels", expected="10 at most", was=str(events.levels)
        )
    book = _quote if events.levels == 1 else _depth
    rows = zip(events.ts_ns.tolist(), events.values.tolist(), strict=True)
    return [_trade(instrument, ts, row) if row[EVENT] == TRADE else book(instrument, ts, row) for ts, row in rows]


def _price(instrument: Instrument, value: float) -> Price:
    return Price(value, instrument.price_precision)


def _size(instrument: Instrument, value: float) -> Quantity:
    return Quantity(value, instrument.size_precision)


def _quote(instrument: Instrument, ts_ns: int, row: Sequence[float]) -> QuoteTick:
    return QuoteTick(
        instrument.id,
        bid_price=_price(instrument, row[4]),
        ask_price=_price(instrument, row[6]),
        bid_size=_size(instrument, row[5]),
        ask_size=_size(instrument, row[7]),
        ts_event=ts_ns,
        ts_init=ts_ns,
    )


def _depth(instrument: Instrument, ts_ns: int, row: Sequence[float]) -> OrderBookDepth10:
    sides = []
    for start, side in ((4, OrderSide.BUY), (6, OrderSide.SELL)):
        levels = zip(row[start::4], row[start + 1 :: 4], strict=True)
        orders = [
            BookOrder(side, _price(instrument, price), _size(instrument, size), 0) if size else NULL_ORDER
            for price, size in levels
        ]
        sides.append(orders)
    counts = [[1 if order is not NULL_ORDER else 0 for order in orders] for orders in sides]
    return OrderBookDepth10(instrument.id, sides[0], sides[1], counts[0], counts[1], 0, 0, ts_ns, ts_ns)


def _trade(instrument: Instrument, ts_ns: int, row: Sequence[float]) -> TradeTick:
    return TradeTick(
        instrument.id,
        price=_price(instrument, row[TRADE_PRICE]),
        size=_size(instrument, row[TRADE_SIZE]),
        aggressor_side=AGGRESSORS[row[TRADE_SIGN]],
        trade_id=TradeId(str(ts_ns)),
        ts_event=ts_ns,
        ts_init=ts_ns,
    )


def _bars(events: Events, instrument: Instrument, bar_type: BarType) -> list[Bar]:
    return [
        Bar(bar_type, *(_price(instrument, value) for value in row[:4]), _size(instrument, row[4]), ts_ns, ts_ns)
        for ts_ns, row in zip(events.ts_ns.tolist(), events.values.tolist(), strict=True)
    ]

"""What the tests of the engine adapters share: an instrument, and recordings as events and as nautilus data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from nautilus_trader.model.currencies import USD
from nautilus_trader.model.enums import AssetClass
from nautilus_trader.model.identifiers import InstrumentId, Symbol
from nautilus_trader.model.instruments import Cfd
from nautilus_trader.model.objects import Price, Quantity

from market.readers import open_source
from tickserve.engines.nautilus import decimals
from tickserve.events import Events

BINANCE = "binance_l2_stream/usdm_btcusdt_20230404.us.jsonl.gz"
FX = "fx_tick/fxcm_eurusd/20140504_quote.zip"
BARS = "bars_1h/lean_us/bac.zip"
FX_BARS = "bars_1m/nautilus/usdjpy-m1-bid-2013.csv.gz"
EQUITY = ("us_equity_tick/aig/20131007_quote.zip", "us_equity_tick/aig/20131007_trade.zip")


def instrument(prices: int = 2, sizes: int = 0, symbol: str = "TEST.VENUE") -> Cfd:
    name = InstrumentId.from_str(symbol)
    steps = Price(10**-prices, prices), Quantity(10**-sizes, sizes)
    return Cfd(name, Symbol("TEST"), AssetClass.ALTERNATIVE, USD, prices, sizes, *steps, 0, 0)


def recorded(folder: Path, *names: str, levels: int = 5, most: int = 0) -> Events:
    """The first `most` events of a recording (0: all)."""
    source = open_source([folder / name for name in names], levels=levels)
    chunks = list(source.chunks(1 << 20))
    times, values = np.concatenate([each.ts_ns for each in chunks]), np.concatenate([each.values for each in chunks])
    most = most or len(times)
    return Events(source.kind, source.levels, times[:most], values[:most])


def instrument_for(events: Events) -> Cfd:
    """One whose precision holds every number of `events`."""
    values = events.values
    if events.kind == "bars":
        return instrument(decimals(values[:, :4]), decimals(values[:, 4]))
    prices = max(decimals(values[:, 1]), decimals(values[:, 4::2]))
    return instrument(prices, max(decimals(values[:, 2]), decimals(values[:, 5::2])))

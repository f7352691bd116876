"""The quality summary: every counter described, JSON-ready, and adding up to what was emitted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from market.quality import MET, NO_EVENT, QUIRKS, Quality
from market.readers import open_source
from market.readers.canonical import write_events
from market.simulator import SimulatedSource
from tickserve.events import Events


def book(ts_ns: list[int], bid: float, ask: float, kinds: list[float]) -> Events:
    values = np.zeros((len(ts_ns), 8))
    values[:, 0], values[:, 4], values[:, 6] = kinds, bid, ask
    return Events("book", 1, np.array(ts_ns, np.int64), values)


def test_events_are_added_up_over_chunks() -> None:
    quality = Quality()
    quality.observe(book([1_000_000_000, 1_500_000_000], 99.0, 101.0, [0.0, 1.0]))
    quality.observe(book([], 1.0, 1.0, []))
    quality.observe(book([3_500_000_001], 100.0, 100.0, [0.0]))
    quality.count("locked", 1)
    quality.count("crossed", 0)
    quality.note("stated rule")
    quality.note("stated rule")
    summary = json.loads(json.dumps(quality.to_json(), allow_nan=False))
    assert (summary["events"], summary["trades"], summary["book_updates"]) == (3, 1, 2)
    assert summary["first"] == "1970-01-01T00:00:01.000000000Z"
    assert summary["last"] == "1970-01-01T00:00:03.500000001Z"
    assert summary["duration_s"] == pytest.approx(2.500000001)
    assert summary["spread_bps"] == pytest.approx({"mean": 400 / 3, "min": 0.0, "max": 200.0})
    assert summary["quirks"] == {"locked": {"count": 1, "meaning": QUIRKS["locked"]}}
    assert summary["notes"] == ["stated rule"]


def test_an_empty_summary_is_still_json() -> None:
    summary = Quality().to_json()
    assert json.dumps(summary, allow_nan=False)
    assert summary["first"] is None
    assert summary["spread_bps"] is None
    assert not summary["complete"]


def test_bars_have_no_spread_and_no_trades() -> None:
    quality = Quality()
    quality.observe(Events("bars", 0, np.array([5]), np.ones((1, 5))))
    assert (quality.events, quality.trades, quality.book_updates) == (1, 0, 0)
    assert quality.to_json()["spread_bps"] is None


def test_a_counter_nobody_described_is_refused() -> None:
    with pytest.raises(KeyError, match="surprise"):
        Quality().count("surprise")
    assert all(re.fullmatch(r"[a-z_]+", name) and meaning for name, meaning in QUIRKS.items())


def test_no_row_is_counted_under_two_outcomes_or_none() -> None:
    assert not NO_EVENT.keys() & MET.keys()
    assert {**NO_EVENT, **MET} == QUIRKS
    quality = Quality(rows_read=9)
    quality.observe(book([1, 2], 1.0, 2.0, [0.0, 0.0]))
    quality.count("crossed", 4)
    quality.count("locked", 100)
    assert quality.unaccounted == 3
    assert quality.to_json()["unaccounted"] == 3


FILES = [
    "binance_l2_stream/usdm_btcusdt_20240808.jsonl.gz",
    "binance_l2_stream/spot_ethusdt_20240808.jsonl.gz",
    "binance_l2_stream/usdm_btcusdt_20230404.us.jsonl.gz",
    "binance_l2_stream/usdm_btcusdt_20230405.us.jsonl.gz",
    "us_equity_tick/bac/20131007_quote.zip us_equity_tick/bac/20131007_trade.zip",
    "fx_tick/fxcm_eurusd/20140504_quote.zip",
    "bars_1h/lean_us/aig.zip",
    "bars_1d/lean_us/uso.zip",
    "bars_1m/bitfinex/LTCUSD_1m_201804_201812.parquet",
    "bars_1m/nautilus/btc-perp-20211231-20220201_1m.csv.gz",
    "bars_1m/nautilus/usdjpy-m1-bid-2013.csv.gz",
]


@pytest.mark.parametrize("names", FILES)
def test_every_row_of_the_recorded_files_is_accounted_for(market_data: Path, names: str) -> None:
    source = open_source([market_data / name for name in names.split()])
    events = sum(len(chunk) for chunk in source.chunks())
    quality = source.quality
    assert quality.events == events > 0
    assert quality.unaccounted == 0
    assert quality.rows_read >= events


def test_our_own_files_are_accounted_for(tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    write_events(path, SimulatedSource(seed=1, events=500, levels=2))
    source = open_source([path])
    assert sum(len(chunk) for chunk in source.chunks()) == source.quality.rows_read == 500
    assert source.quality.unaccounted == 0

"""Many symbols told apart: names that none shares, and a broken file that costs its own group only."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from market.readers import open_source
from market.readers.grouping import group_sources
from tickserve.errors import CorruptFileError, EmptyDataError, UsageError

BITFINEX = "bars_1m/bitfinex"


def test_a_group_is_the_source_that_its_symbol_names(market_data: Path) -> None:
    folder = market_data / BITFINEX
    groups = group_sources([folder])
    assert [group.name for group in groups] == ["btcusd", "eosusd", "ethusd", "ltcusd", "xrpusd"]
    alone, grouped = open_source([folder], symbol="ethusd"), groups[2].open(5)
    assert (grouped.digests(), grouped.symbol, grouped.ignored_files) == (alone.digests(), "ethusd", 0)


def test_symbols_that_share_a_name_are_told_apart(market_data: Path) -> None:
    names = [group.name for group in group_sources([market_data / "bars_1h", market_data / "bars_1d/lean_us"])]
    ticks = [group.name for group in group_sources([market_data / "bars_1h", market_data / "us_equity_tick/aig"])]
    assert names.count("aig") == 1  # hours and days of one venue and format are one group
    assert {"us-equity-aig-lean-bars", "us-equity-aig-lean-ticks"} <= set(ticks)
    assert "aig" not in ticks


def test_a_broken_file_is_a_group_of_its_own(market_data: Path, tmp_path: Path) -> None:
    (tmp_path / "good.parquet").symlink_to(market_data / BITFINEX / "LTCUSD_1m_201804_201812.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty.csv").write_bytes(b"")
    groups = {group.name: group for group in group_sources([tmp_path])}
    assert set(groups) == {["good", "parquet"][0], "cut", "empty"}
    assert groups["good"].error is None
    for name, kind in (("cut", CorruptFileError), ("empty", EmptyDataError)):
        with pytest.raises(kind):
            pickle.loads(pickle.dumps(groups[name])).open(5)


def test_a_path_that_is_not_there_is_a_mistake_not_a_group(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot find"):
        group_sources([tmp_path / "none.parquet"])

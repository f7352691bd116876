"""The main job on each kind of data the README promises: minutes long, so it runs with the system tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import SETS_UP_A_DEMO, run_demo

pytestmark = SETS_UP_A_DEMO

FILES = [
    "binance_l2_stream/usdm_btcusdt_20240808.jsonl.gz",
    "bars_1m/bitfinex/BTCUSD_1m_201804_201812.parquet",
    "us_equity_tick/aig",
]


@pytest.mark.system
@pytest.mark.parametrize("name", FILES)
def test_recorded_data_becomes_served_signals(market_data: Path, tmp_path: Path, name: str) -> None:
    demo = run_demo(tmp_path, "--data", market_data / name)
    assert demo.result["signals_counted"] > 0
    assert len(demo.result["models"]) == 5
    assert all(row["failures"] == 0 and row["requests"] > 0 for row in demo.result["loadtest"])
    assert json.loads((demo.run / "run.json").read_text())["simulated"] is False


@pytest.mark.system
def test_the_simulator_stands_in_and_says_so(tmp_path: Path) -> None:
    demo = run_demo(tmp_path)
    assert demo.result["signals_counted"] > 0
    assert "SIMULATED" in demo.says
    assert "simulated" in (demo.run / "report.html").read_text().lower()
    for path in (tmp_path / "model_repository").glob("*/1/manifest.json"):
        assert json.loads(path.read_text())["provenance"]["simulated"] is True

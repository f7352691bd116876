"""`tickserve tune` as a user runs it: a front, a page, and a configuration that `config show` reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

SMALL = {
    "TICKSERVE_GBDT__ROUNDS": "5",
    "TICKSERVE_FEATURES__BARS_MAX_ROWS": "20000",
    "TICKSERVE_TUNE__LATENCY_CALLS": "50",
}


@pytest.mark.system
def test_a_search_ends_with_a_page_and_a_configuration(tickserve: Run, market_data: Path, tmp_path: Path) -> None:
    data = market_data / "bars_1m" / "nautilus" / "btc-perp-20211231-20220201_1m.csv.gz"
    done = tickserve("tune", "--data", data, "--trials", 2, "--study", "bars", "--json", **SMALL)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["tried"], result["folds_seen"], result["chosen"] in result["pareto_front"]) == (2, 2, True)
    page = (tmp_path / result["report"]).read_text()
    assert "bars: 2 trials of gbdt" in page
    assert page.count("<circle") == 2
    assert page.count('class="chosen"') == 1
    shown = tickserve("config", "show", "--config", result["config"], "--json")
    assert shown.returncode == 0, shown.stderr
    assert "best.toml" in shown.stdout


def test_a_wrong_name_or_space_is_one_line(tickserve: Run, tmp_path: Path) -> None:
    unsafe = tickserve("tune", "--study", "../up", "--trials", 1)
    assert (unsafe.returncode, "--study" in unsafe.stderr) == (2, True)
    missing = tickserve("tune", "--space", tmp_path / "none.toml")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)

"""`tickserve train` with the validation gate and the probe as a user meets them: what is written, said and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tickserve.manifest import load_bundle

SMALL = {
    "TICKSERVE_GBDT__ROUNDS": "5",
    "TICKSERVE_LSTM__ENABLED": "false",
    "TICKSERVE_VALIDATION__FOLDS": "2",
    "TICKSERVE_FEATURES__BARS_MAX_ROWS": "10000",
}


@pytest.fixture
def bars(market_data: Path) -> Path:
    return market_data / "bars_1m" / "nautilus" / "btc-perp-20211231-20220201_1m.csv.gz"


@pytest.mark.system
def test_a_model_that_does_not_pass_is_labelled_or_refused(tickserve: Run, bars: Path, tmp_path: Path) -> None:
    strict = SMALL | {"TICKSERVE_VALIDATION__MIN_EFFECTIVE_ROWS": "1000000"}
    told = tickserve("train", "--data", bars, "--out", "labelled", "--probe", **strict)
    assert told.returncode == 0, told.stderr
    assert "NOT PASSED" in told.stdout
    assert "fold 1: the same, bit for bit, where the future is shuffled or recast" in told.stderr
    assert "expected at least 1,000,000 effective rows out of sample, was " in told.stderr
    (folder,) = (tmp_path / "labelled").iterdir()
    manifest = load_bundle(folder)
    assert manifest.metrics["gate"]["passed"] is False
    assert manifest.metrics["probe"]["folds"] == [1, 2]

    refused = tickserve("train", "--data", bars, "--out", "refused", "--require-gate", "--json", **strict)
    assert refused.returncode == 1
    said = f"--require-gate: refused, and no bundle written: {folder.name}: validation gate: NOT PASSED"
    assert said in refused.stderr
    assert "effective rows out of sample, was " in refused.stderr
    assert not list((tmp_path / "refused").glob("*"))
    gates = json.loads(refused.stdout)["counterexample"]["gates"]
    assert gates[folder.name]["reasons"][-1]["expected"] == "at least 1,000,000 effective rows out of sample"

    exported = tickserve("export", "labelled", "--require-gate")
    assert exported.returncode == 1
    assert f"was {folder.name}: not passed" in exported.stderr
    assert not (tmp_path / "model_repository").exists()

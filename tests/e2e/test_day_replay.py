"""The command that plays a day and checks it, and that it notices what is not the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.day_replay import compare, holds, play
from tests.e2e.conftest import RECORDING, SETS_UP_A_DEMO, DemoRun, environment
from tickserve import pipeline
from tickserve.settings import load_settings

DAY = ("us_equity_tick/aig/20131007_quote.zip", "us_equity_tick/aig/20131007_trade.zip")


@pytest.mark.system
def test_a_day_of_ticks_has_the_training_matrix_and_replays_identically(market_data: Path, root: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "examples.day_replay",
        "--json",
        "--data",
        *(str(market_data / name) for name in DAY),
    ]
    done = subprocess.run(
        command, cwd=root, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    told = json.loads(done.stdout)
    assert told["events"] > 200_000
    assert told["hours"] > 6.4  # the whole session
    assert told["matrix_rows"] > 8_000
    assert told["signals"] == {"OK": told["matrix_rows"]}
    assert told["features_identical"]
    assert told["scores_are_researchs"]
    everything = {"replayed": told["matrix_rows"], "identical": told["matrix_rows"], "different": 0, "skipped": {}}
    assert told["replay_server"] == told["replay_local"] == everything
    for name, worse in (("features_identical", False), ("scores_are_researchs", False), ("signals", {"OK": 1})):
        assert not holds(told | {name: worse})
    assert not holds(told | {"replay_local": everything | {"identical": told["matrix_rows"] - 1, "different": 1}})


@SETS_UP_A_DEMO
def test_one_bit_of_a_feature_or_a_wrong_score_is_noticed(demo_run: DemoRun, market_data: Path, tmp_path: Path) -> None:
    config = load_settings(environ={}, overrides={"features.store": str(tmp_path / "features")}).config
    source = pipeline.open_source([market_data / RECORDING], config)
    table = pipeline.build_features(source, config).load()
    (bundle,) = demo_run.run.glob("bundles/*-gbdt")
    online = play(source, bundle.name, f"local://{demo_run.repository}", demo_run.repository, tmp_path / "journal")
    told = compare(online, table, bundle)
    assert (told["features_identical"], told["scores_are_researchs"]) == (True, True)
    assert told["matrix_rows"] == online.statuses["OK"] > 4_000

    features, said = list(online.features), list(online.said)
    features[77] = np.nextafter(features[77], np.float32(np.inf))
    assert not compare(replace(online, features=features), table, bundle)["features_identical"]
    said[77] = said[77][::-1]
    assert not compare(replace(online, said=said), table, bundle)["scores_are_researchs"]
    assert not compare(replace(online, ts_ns=online.ts_ns[1:]), table, bundle)["features_identical"]

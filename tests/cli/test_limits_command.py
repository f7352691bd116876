"""Limits as a user meets them: a warning that goes on, a failure that leaves no bundle and publishes nothing."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run

QUICK = {"TICKSERVE_FEATURES__MAX_ROWS": "2000", "TICKSERVE_LIMITS__FEATURES_S": "0.0001"}


def test_features_that_take_too_long_warn_and_with_fail_nothing_is_trained(tickserve: Run, tmp_path: Path) -> None:
    warned = tickserve("features", "build", "--json", **QUICK)
    assert warned.returncode == 0, warned.stderr
    assert "limit not kept: building features took" in warned.stderr
    found = json.loads(warned.stdout)
    assert [(gate["name"], gate["passed"]) for gate in found["limits"]] == [("limit.features_s", False)]
    assert found["took"]["peak_memory_mb"] > 50
    failed = tickserve("train", "--out", "bundles", **QUICK, TICKSERVE_LIMITS__ON_FEATURES_S="fail")
    assert failed.returncode == 1
    assert "limits.features_s: a limit was not kept: expected at most 0.0001" in failed.stderr
    assert list((tmp_path / "bundles").iterdir()) == []


def test_a_demo_that_passes_a_limit_that_fails_publishes_nothing(tickserve: Run, tmp_path: Path) -> None:
    small = QUICK | {
        "TICKSERVE_FEATURES__MAX_ROWS": "6000",
        "TICKSERVE_LSTM__ENABLED": "false",
        "TICKSERVE_GBDT__ROUNDS": "2",
    }
    failing = {"TICKSERVE_LIMITS__HIT_RATE": "1.0", "TICKSERVE_LIMITS__ON_HIT_RATE": "fail"}
    done = tickserve("demo", "--json", **small, **failing)
    assert done.returncode == 1, done.stderr
    assert "error: limits.hit_rate: a limit was not kept: expected at least 1, was 0." in done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    told = json.loads((run / "run.json").read_text())
    assert told["status"] == "failed"
    assert "limits.hit_rate" in told["reason"]
    assert not (run / "bundles").exists()
    assert list((tmp_path / "model_repository").iterdir()) == []

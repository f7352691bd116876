"""The limit of features, as a user meets it: a warning that goes on, a failure that leaves no bundle."""

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

"""What training took is in the manifest, and a limit that is not kept warns, or fails before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from market.build import FeatureTable
from tests.training.conftest import Trained, quick_config
from tickserve.errors import LimitExceededError
from tickserve.manifest import load_manifest
from training.examples import DataMeta
from training.train import train_table

SMALL: dict[str, Any] = {"gbdt__rounds": 3, "lstm__enabled": False}


def test_a_bundle_says_what_training_it_took(trained: Trained) -> None:
    for bundle in trained.bundles.values():
        stage = bundle.manifest.provenance.stages["train"]
        assert set(stage) == {"seconds", "rows_per_s", "peak_memory_mb", "gpu_memory_mb", "gpu_utilisation"}
        assert stage["seconds"]
        assert stage["rows_per_s"]
        assert 50 < (stage["peak_memory_mb"] or 0) < 20_000


def test_a_limit_that_warns_is_said_reported_and_in_the_manifest(
    table: FeatureTable, meta: DataMeta, tmp_path: Path
) -> None:
    said: list[str] = []
    config = quick_config(**SMALL, limits__train_memory_mb=1, limits__hit_rate=0.0)
    (bundle,) = train_table(table, meta, config, tmp_path, ("gbdt",), progress=said.append)
    assert any("gbdt: limit not kept: training took" in line and "train_memory_mb" in line for line in said)
    kept = {gate["name"]: gate["passed"] for gate in bundle.report["limits"]}
    assert kept == {"limit.train_s": True, "limit.train_memory_mb": False, "limit.hit_rate": True}
    assert {gate.name: gate.passed for gate in load_manifest(bundle.path).gates} == kept


def test_a_limit_that_fails_writes_no_bundle_of_any_family(
    trained: Trained, table: FeatureTable, meta: DataMeta, tmp_path: Path
) -> None:
    """The better family alone would keep to the limit: it is trained first, and not written either."""
    rates = {
        name.removeprefix("btcusd-bars-"): bundle.report["pooled"]["model"]["hit_rate"]
        for name, bundle in trained.bundles.items()
        if name.endswith(("gbdt", "lstm"))
    }
    better, worse = sorted(rates, key=lambda name: rates[name], reverse=True)
    config = quick_config(limits__hit_rate=(rates[better] + rates[worse]) / 2, limits__on_hit_rate="fail")
    with pytest.raises(LimitExceededError, match=r"limits\.hit_rate.*expected at least"):
        train_table(table, meta, config, tmp_path / "out", (better, worse))
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == set()


@pytest.mark.parametrize("key", ["train_s", "train_memory_mb"])
def test_time_and_memory_fail_too(key: str, table: FeatureTable, meta: DataMeta, tmp_path: Path) -> None:
    tight = {"train_s": 1e-6, "train_memory_mb": 1}
    config = quick_config(**SMALL, **{f"limits__{key}": tight[key], f"limits__on_{key}": "fail"})
    with pytest.raises(LimitExceededError, match=rf"limits\.{key}"):
        train_table(table, meta, config, tmp_path / "out", ("gbdt",))
    assert not (tmp_path / "out").exists()

"""The main job on a real recording: everything it promises to leave behind is there and agrees with itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import RECORDING, SETS_UP_A_DEMO, DemoRun, run_demo
from tickserve.manifest import bundle_id_of, load_bundle, load_manifest

pytestmark = SETS_UP_A_DEMO


def test_every_stage_left_its_result(demo_run: DemoRun) -> None:
    names = {"quality", "features", "train", "export", "served", "loadtest", "stages", "run"}
    assert {f"{name}.json" for name in names} <= {path.name for path in demo_run.run.iterdir()}
    page = (demo_run.run / "report.html").read_text()
    assert "not run" not in page
    assert 'src="http' not in page


def test_signals_are_counted_by_triton_itself(demo_run: DemoRun) -> None:
    served = json.loads((demo_run.run / "served.json").read_text())
    load = json.loads((demo_run.run / "loadtest.json").read_text())
    asked = {model["model"]: 2 * model["rows"] for model in served["models"]}
    for row in load["rows"]:
        assert row["failures"] == 0
        asked[row["model"]] += row["requests"]
    for model, count in served["metrics"].items():
        assert count >= asked[model] > 0
    assert f"{served['signals_counted']:,}" in (demo_run.run / "report.html").read_text()


def test_served_numbers_are_the_exported_graphs_numbers(demo_run: DemoRun) -> None:
    for model in json.loads((demo_run.run / "served.json").read_text())["models"]:
        assert max(model["http_max_abs_diff"], model["grpc_max_abs_diff"]) <= 1e-6, model


def test_published_manifests_name_their_bundles(demo_run: DemoRun) -> None:
    exported = json.loads((demo_run.run / "export.json").read_text())
    families = {load_manifest(Path(demo_run.folder / item["path"])).family for item in exported}
    assert families == {"gbdt", "lstm"}
    for item in exported:
        bundle = load_bundle(demo_run.run / "bundles" / item["model"])
        assert bundle.digest() == item["bundle_digest"]
        assert bundle_id_of(item["bundle_digest"]) == item["bundle_id"]


@pytest.mark.system
def test_a_second_run_reuses_the_features_and_says_so(demo_run: DemoRun, market_data: Path, tmp_path: Path) -> None:
    # In a copy: a new version is in force at once, and the server that other tests share was started before it.
    copy = shutil.copytree(demo_run.folder, tmp_path / "again", symlinks=True)
    again = run_demo(copy, "--data", market_data / RECORDING)
    assert "reused from the cache" in again.says
    assert "reused from the cache" not in demo_run.says
    assert json.loads((again.run / "features.json").read_text())["reused"] is True
    versions = {item["version"] for item in json.loads((again.run / "export.json").read_text())}
    assert versions == {2}
    first, second = (
        np.load(run.repository / again.result["models"][0]["model"] / n / "golden.npz")["probabilities"]
        for run, n in ((demo_run, "1"), (again, "2"))
    )
    np.testing.assert_array_equal(first, second)

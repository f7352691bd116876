"""`train_table` on real bars: bundles that verify, golden and parity rows that hold, a report to draw a page from."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from market.build import FeatureTable
from models.gbdt import GbdtClassifier
from models.lstm import LstmClassifier
from tickserve.config import Config
from tickserve.errors import ComponentError, GateRefusedError, UsageError
from tickserve.manifest import load_bundle
from training.examples import DataMeta
from training.train import train_table
from training.walk import refuse_not_finite


def test_every_bundle_verifies_and_is_named_by_its_market(trained) -> None:  # noqa: ANN001
    names = ["btcusd-bars-gbdt", "btcusd-bars-lstm", "btcusd-bars-lstm-fp16", "btcusd-bars-lstm-int8"]
    assert list(trained.bundles) == names
    for name, bundle in trained.bundles.items():
        manifest = load_bundle(bundle.path)
        assert manifest == bundle.manifest
        assert manifest.name == name
        assert [spec.name for spec in manifest.outputs] == ["probabilities", "score", "bundle_id"]
        assert manifest.horizon.threshold == trained.examples.published.threshold
    assert not [path for path in trained.out.iterdir() if path.name not in names]


def test_golden_and_parity_rows_are_the_research_models_numbers(trained) -> None:  # noqa: ANN001
    trees, net = trained.bundles["btcusd-bars-gbdt"], trained.bundles["btcusd-bars-lstm"]
    import torch

    def run_net(rows: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return LstmClassifier.from_bundle(net.path, net.manifest)(torch.from_numpy(rows)).numpy()

    loaded = GbdtClassifier.from_bundle(trees.path, trees.manifest)
    for bundle, name, predict in ((trees, "features", loaded.predict), (net, "window", run_net)):
        for file, count in (("golden.npz", 16), ("parity.npz", 300)):
            with np.load(bundle.path / file, allow_pickle=False) as arrays:
                inputs, expected = arrays[name], arrays["probabilities"]
                assert inputs.shape == (count, *bundle.manifest.inputs[0].shape)
                np.testing.assert_allclose(predict(inputs), expected, atol=1e-6)
                if file == "golden.npz":
                    assert np.isnan(inputs[-1]).any()
                    np.testing.assert_array_equal(arrays["score"], expected[:, [2]] - expected[:, [0]])


def test_parity_rows_are_real_rows_the_published_model_never_saw(trained) -> None:  # noqa: ANN001
    with np.load(trained.bundles["btcusd-bars-gbdt"].path / "parity.npz") as arrays:
        rows = arrays["features"]
    test = trained.examples.published.rows.test
    real = trained.examples.features[test]
    spots = np.linspace(0, len(test) - 1, len(rows)).astype(int)
    np.testing.assert_array_equal(rows, real[spots])


def test_contract_is_the_training_range(trained) -> None:  # noqa: ANN001
    contract = trained.bundles["btcusd-bars-gbdt"].manifest.features
    seen = trained.examples.features[trained.examples.published.rows.train]
    np.testing.assert_array_equal(contract.minimum, np.nanmin(seen, axis=0).astype(float))
    np.testing.assert_array_equal(contract.maximum, np.nanmax(seen, axis=0).astype(float))


def test_reports_are_json_with_folds_baselines_and_calibration(trained) -> None:  # noqa: ANN001
    for name in ("btcusd-bars-gbdt", "btcusd-bars-lstm"):
        report = trained.bundles[name].report
        assert json.loads(json.dumps(report, allow_nan=False)) == report
        assert [row["fold"] for row in report["folds"]] == [1, 2]
        for row in report["folds"]:
            assert set(row["baselines"]) == {"majority", "last_move", "linear"}
            assert {each["rows"] for each in row["baselines"].values()} == {row["test"]}
            assert 0 < row["n_eff"] < row["test"]
        assert sum(row["rows"] for row in report["calibration"]) == sum(row["test"] for row in report["folds"])
        compared = report["comparison"]
        assert report["beats_baselines"] == (compared["outcome"] == "better")
        assert report["verdict"].startswith(compared["words"])
        pooled = report["pooled"]
        assert compared["ic_difference"] == pytest.approx(
            (pooled["model"]["ic"] or 0.0) - (pooled["baselines"][compared["baseline"]]["ic"] or 0.0)
        )
        assert compared["ic_difference_95"][0] < compared["ic_difference"] < compared["ic_difference_95"][1]
        assert report["costs"] == {"fee_bps": 1.0, "bar_half_spread_bps": 1.0, "assumed_spreads": 1.0}
    assert trained.bundles["btcusd-bars-gbdt"].report["importance"]
    assert any("rows/s" in line for line in trained.said)


def test_a_leak_is_refused_before_anything_is_written(
    table: FeatureTable, meta: DataMeta, config: Config, tmp_path: Path
) -> None:
    future = np.roll(table.mid, -config.labels.bars_horizon_rows) / table.mid - 1
    leaky = replace(table, features=np.column_stack([table.features, future]).astype(np.float32))
    columns = (*meta.columns, "tomorrow")
    with pytest.raises(GateRefusedError, match="tomorrow"):
        train_table(leaky, replace(meta, columns=columns), config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_answer_shared_by_columns_is_refused_by_the_score_it_gives(
    table: FeatureTable, meta: DataMeta, config: Config, tmp_path: Path
) -> None:
    """Neither column knows anything alone: one is noise, the other the answer plus the same noise."""
    future = np.roll(table.mid, -config.labels.bars_horizon_rows) / table.mid - 1
    mask = np.random.default_rng(1).choice([-1.0, 1.0], len(future))
    shared = np.column_stack([table.features, mask, mask * future]).astype(np.float32)
    deeper = config.model_copy(update={"gbdt": config.gbdt.model_copy(update={"rounds": 60, "learning_rate": 0.3})})
    with pytest.raises(GateRefusedError, match="too good to be true"):
        train_table(
            replace(table, features=shared),
            replace(meta, columns=(*meta.columns, "mask", "masked")),
            deeper,
            tmp_path / "out",
            families=("gbdt",),
        )
    assert not (tmp_path / "out").exists()


def test_an_unknown_family_and_an_unwritable_folder_are_typed_errors(
    table: FeatureTable, meta: DataMeta, config: Config, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="expected gbdt, mlp, lstm"):
        train_table(table, meta, config, tmp_path, families=("forest",))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ComponentError, match="cannot write"):
        train_table(table, meta, config, tmp_path / "file", families=("gbdt",))


def test_a_model_whose_training_diverged_is_refused() -> None:
    fine = np.full((4, 3), 1 / 3, dtype=np.float32)
    refuse_not_finite(fine, "lstm")
    fine[1, 0] = np.nan
    with pytest.raises(GateRefusedError, match=r"1 of 4 rows without \(use a smaller lstm.learning_rate"):
        refuse_not_finite(fine, "lstm")


def test_training_trees_never_loads_torch_and_importing_training_loads_neither(root: Path) -> None:
    code = (
        "import sys, training.train; heavy = {'torch', 'xgboost', 'sklearn', 'onnx', 'onnxruntime'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "import training.gbdt; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_manifests_hold_the_reference_that_drift_is_measured_by(trained) -> None:  # noqa: ANN001
    fold = trained.examples.published
    for bundle in trained.bundles.values():
        reference = bundle.manifest.reference
        assert reference is not None
        assert len(reference.columns) == len(bundle.manifest.features.columns)
        assert (reference.rows, reference.score is None) == (len(fold.rows.train), False)
        # Deciles of the training rows: those rows lie in the bins as the reference says, and others do not.
        column = trained.examples.features[fold.rows.train][:, 0]
        counts = reference.columns[0].counts_of(column)
        np.testing.assert_allclose(counts[:-1] / len(column), reference.columns[0].shares, atol=1e-5)
    trees, net = (trained.bundles[f"btcusd-bars-{family}"].manifest.reference for family in ("gbdt", "lstm"))
    assert trees.columns == net.columns
    assert trees.score != net.score
    child = trained.bundles["btcusd-bars-lstm-int8"].manifest.reference
    assert child.columns == net.columns
    with np.load(trained.bundles["btcusd-bars-lstm-int8"].path / "parity.npz") as arrays:
        said = arrays["probabilities"]
    score = (said[:, 2] - said[:, 0]).astype(np.float32)
    np.testing.assert_allclose(child.score.counts_of(score)[:-1] / len(score), child.score.shares, atol=1e-5)

"""Bundles of real data through the whole stage, and every gate with what it must refuse."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import xgboost as xgb

from export import export_bundle, onnx_graph
from export.publish import verify_version
from export.runtime import measure_latency, score_onnx
from tests.export.bundles import Rewrite, change_pairs, nothing_published, spoil_weights
from tests.export.conftest import verify_model
from tickserve.config import ExportSettings
from tickserve.errors import ArtifactError, DigestMismatchError, GateRefusedError, UnsafeModelError
from tickserve.manifest import load_manifest

# What every model is held to; trees also on their splits.
GATES = ["graph", "parity.recorded", "parity.nan", "parity.extreme", "parity.batch", "parity.composition"]


def test_trees_are_served_with_researchs_numbers(
    trees_bundle: Path, repository: Path, settings: ExportSettings, booster: Any, real_rows: Any
) -> None:
    said: list[str] = []
    published = export_bundle(trees_bundle, repository, settings, progress=said.append)
    assert (published.model, published.version, published.reused) == ("btcusd-bars-gbdt", 1, False)
    assert sorted(path.name for path in published.path.iterdir()) == ["golden.npz", "manifest.json", "model.onnx"]
    assert (published.path / "golden.npz").read_bytes() == (trees_bundle / "golden.npz").read_bytes()
    names = [gate.name for gate in published.gates]
    trees_only = ["parity.thresholds", "parity.missing"]
    assert names == [*GATES[:4], *trees_only, *GATES[4:]]
    assert all(gate.passed for gate in published.gates)
    json.dumps(published.parity, allow_nan=False)
    rows = real_rows.features[5_000:5_050]
    served = score_onnx(published.path / "model.onnx", {"features": rows})
    expected = booster.predict(xgb.DMatrix(rows, missing=np.nan))
    np.testing.assert_allclose(served["probabilities"], expected, atol=1e-6)
    np.testing.assert_array_equal(served["score"], served["probabilities"][:, 2:] - served["probabilities"][:, :1])
    assert set(served["bundle_id"].ravel()) == {load_manifest(trees_bundle).bundle_id()}
    assert said


def test_the_published_record_names_the_bundle_and_the_bytes(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    published = export_bundle(trees_bundle, repository, settings)
    manifest = load_manifest(published.path)
    assert manifest == published.manifest
    record = manifest.export
    assert record is not None
    assert record.bundle_digest == load_manifest(trees_bundle).digest() == manifest.digest()
    assert record.stages is not None
    assert list(record.stages) == ["convert", "gates"]  # nothing was measured: the runtimes are left as they are
    assert all((stage["seconds"] or 0) > 0 and (stage["peak_memory_mb"] or 0) > 50 for stage in record.stages.values())
    assert record.stages["gates"]["rows_per_s"]
    assert (record.opset, record.ir_version, record.max_batch) == (18, 9, settings.max_batch)
    graph = onnx.load(published.path / "model.onnx")
    notes = {note.key: note.value for note in graph.metadata_props}
    assert notes == {"tickserve.bundle_digest": record.bundle_digest, "tickserve.graph_optimization": "none"}
    assert list(verify_model(published.path.parent)) == [1]


def test_the_same_bundle_gives_the_same_graph_bytes(
    trees_bundle: Path, tmp_path: Path, settings: ExportSettings
) -> None:
    graphs = [
        (export_bundle(trees_bundle, tmp_path / name, settings).path / "model.onnx").read_bytes() for name in ("a", "b")
    ]
    assert graphs[0] == graphs[1]
    assert str(tmp_path).encode() not in graphs[0]


def test_a_second_export_of_the_same_bundle_does_no_work(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    first = export_bundle(trees_bundle, repository, settings)
    config = (repository / first.model / "config.pbtxt").read_bytes()
    again = export_bundle(trees_bundle, repository, settings)
    assert (again.version, again.reused, again.gates) == (1, True, first.gates)
    assert (repository / first.model / "config.pbtxt").read_bytes() == config
    assert not (repository / first.model / "2").exists()


def test_other_settings_reach_the_config_of_a_published_bundle(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    first = export_bundle(trees_bundle, repository, settings)
    export_bundle(trees_bundle, repository, settings.model_copy(update={"keep_versions": 7}))
    assert "num_versions: 7" in (repository / first.model / "config.pbtxt").read_text()


def test_the_graph_gate_records_what_is_made_of_the_graph_at_load(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    published = export_bundle(trees_bundle, repository, settings)
    [graph] = [gate for gate in published.manifest.export.gates if gate.name == "graph"]  # type: ignore[union-attr]
    assert graph.measured["optimization"] == "none"
    assert graph.measured["optimization_at_load"] == "ORT_ENABLE_ALL"
    assert int(graph.measured["operators"] or 0) >= int(graph.measured["operators_at_load"] or 0) > 0
    assert str(graph.measured["runtime"]).startswith("onnxruntime ")
    crossed = published.parity["cross_check"]
    assert crossed["engine"] == "treelite"
    assert crossed["decision_flips"] == 0
    assert crossed["max_abs_probability"] < 1e-5
    assert crossed["rows"] > 1_000


def test_recorded_numbers_of_another_model_are_refused(
    trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    with np.load(trees_bundle / "parity.npz") as arrays:
        rows, probabilities = arrays["features"], arrays["probabilities"].copy()
    probabilities[3] = probabilities[3][::-1]
    np.savez(trees_bundle / "parity.npz", features=rows, probabilities=probabilities)
    rewrite(trees_bundle)
    with pytest.raises(GateRefusedError, match="row 3"):
        export_bundle(trees_bundle, repository, settings)
    assert nothing_published(repository)


def test_golden_numbers_of_another_model_are_refused_at_the_last_step(
    trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    with np.load(trees_bundle / "golden.npz") as arrays:
        golden = dict(arrays)
    golden["probabilities"] = np.roll(golden["probabilities"], 1, axis=1)
    np.savez(trees_bundle / "golden.npz", **golden)
    rewrite(trees_bundle)
    with pytest.raises(GateRefusedError, match="gate golden refused"):
        export_bundle(trees_bundle, repository, settings)
    assert nothing_published(repository)


def test_a_changed_model_file_is_refused(trees_bundle: Path, repository: Path, settings: ExportSettings) -> None:
    path = trees_bundle / "model.ubj"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DigestMismatchError, match=r"model\.ubj"):
        export_bundle(trees_bundle, repository, settings)
    assert nothing_published(repository)


def test_a_bundle_without_a_manifest_is_refused(trees_bundle: Path, repository: Path, settings: ExportSettings) -> None:
    (trees_bundle / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        export_bundle(trees_bundle, repository, settings)
    assert nothing_published(repository)


@pytest.mark.parametrize("name", ["golden.npz", "parity.npz"])
def test_a_bundle_without_its_recorded_pairs_is_refused(
    name: str, trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    (trees_bundle / name).unlink()
    rewrite(trees_bundle)
    with pytest.raises(ArtifactError, match=name):
        export_bundle(trees_bundle, repository, settings)


class Exploit:
    """Would run when unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("name", ["model.ubj", "model.onnx", "model.pkl", "model.pt2"])
def test_a_pickle_under_any_name_is_never_loaded(
    name: str, trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    (trees_bundle / "model.ubj").unlink()
    (trees_bundle / name).write_bytes(pickle.dumps(Exploit()))
    rewrite(trees_bundle, model_file=name)
    with pytest.raises(ArtifactError, match=r"pickle|never loaded"):
        export_bundle(trees_bundle, repository, settings)
    assert nothing_published(repository)


def test_pickled_golden_pairs_are_never_loaded(
    trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    np.savez(trees_bundle / "parity.npz", features=np.array([Exploit()], object), probabilities=np.zeros((1, 3)))
    rewrite(trees_bundle)
    with pytest.raises(ArtifactError, match=r"parity.npz"):
        export_bundle(trees_bundle, repository, settings)


def test_a_child_that_arrives_as_a_graph_is_checked_and_served(
    trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite, booster: Any
) -> None:
    (trees_bundle / "model.ubj").unlink()
    onnx.save(onnx_graph.trees_to_onnx(booster, 6), trees_bundle / "model.onnx")
    rewrite(trees_bundle, model_file="model.onnx", name="btcusd-bars-gbdt-fp16")
    published = export_bundle(trees_bundle, repository, settings)
    assert [gate.name for gate in published.gates] == GATES


def test_a_child_with_nan_weights_is_refused(
    trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite, booster: Any
) -> None:
    (trees_bundle / "model.ubj").unlink()
    child = spoil_weights(onnx_graph.trees_to_onnx, float("nan"))(booster, 6)
    onnx.save(child, trees_bundle / "model.onnx")
    rewrite(trees_bundle, model_file="model.onnx")
    with pytest.raises(UnsafeModelError, match="NaN or infinite weights"):
        export_bundle(trees_bundle, repository, settings)
    assert nothing_published(repository)


def test_tensors_that_are_not_the_manifests_are_refused(
    trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    manifest = load_manifest(trees_bundle)
    window = manifest.inputs[0].model_dump() | {"shape": (5, 6)}
    rewrite(trees_bundle, inputs=[window])
    with pytest.raises(ArtifactError):
        export_bundle(trees_bundle, repository, settings)


@pytest.mark.parametrize(("field", "asked"), [("atol", 1.0), ("rtol", 1.0), ("atol", 2e-5)])
def test_a_bundle_does_not_choose_how_strict_its_gate_is(
    field: str, asked: float, trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    tolerance = load_manifest(trees_bundle).tolerance.model_dump() | {field: asked}
    rewrite(trees_bundle, tolerance=tolerance)
    with pytest.raises(GateRefusedError) as refused:
        export_bundle(trees_bundle, repository, settings)
    assert refused.value.field == f"tolerance.{field}"
    assert nothing_published(repository)


def test_a_kind_of_model_without_a_ceiling_is_refused(
    trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    rewrite(trees_bundle, precision="int8")
    with pytest.raises(GateRefusedError, match="gbdt int8"):
        export_bundle(trees_bundle, repository, settings)


def test_a_gate_needs_more_than_a_few_rows(
    trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    change_pairs(trees_bundle, "parity.npz", lambda arrays: {name: values[:15] for name, values in arrays.items()})
    rewrite(trees_bundle)
    with pytest.raises(ArtifactError, match=r"parity\.npz.*at least 16, was 15"):
        export_bundle(trees_bundle, repository, settings)
    assert nothing_published(repository)


BAD_GOLDEN: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], type[Exception]]] = {
    "no score": (lambda a: {name: a[name] for name in ("features", "probabilities")}, ArtifactError),
    "an array without rows": (lambda a: a | {"extra": np.float32(1)}, ArtifactError),
    "an array too many": (lambda a: a | {"extra": a["score"]}, ArtifactError),
    "a score of another type": (lambda a: a | {"score": a["score"].astype(np.float64)}, ArtifactError),
    "a score of another shape": (lambda a: a | {"score": a["score"][:, 0]}, ArtifactError),
    "fewer scores": (lambda a: a | {"score": a["score"][:-1]}, ArtifactError),
    "no rows": (lambda a: {name: values[:0] for name, values in a.items()}, ArtifactError),
    "a single number for rows": (lambda a: a | {"features": np.float32(1)}, ArtifactError),
    "another model's score": (lambda a: a | {"score": -a["score"]}, GateRefusedError),
}


@pytest.mark.parametrize("case", BAD_GOLDEN)
def test_golden_pairs_that_would_not_load_are_not_published(
    case: str, trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    change, error = BAD_GOLDEN[case]
    change_pairs(trees_bundle, "golden.npz", change)
    rewrite(trees_bundle)
    with pytest.raises(error):
        export_bundle(trees_bundle, repository, settings)
    assert nothing_published(repository)


def test_a_published_version_is_not_a_bundle(trees_bundle: Path, repository: Path, settings: ExportSettings) -> None:
    published = export_bundle(trees_bundle, repository, settings)
    with pytest.raises(ArtifactError):
        export_bundle(published.path, repository, settings)
    with pytest.raises(ArtifactError, match="was a bundle"):
        verify_version(trees_bundle)


def test_latency_is_measured_per_call(trees_bundle: Path, repository: Path, settings: ExportSettings) -> None:
    published = export_bundle(trees_bundle, repository, settings)
    rows = {"features": np.zeros((8, 6), np.float32)}
    taken = measure_latency(published.path / "model.onnx", rows, (1, 8), calls=50)
    assert [timing.rows for timing in taken] == [1, 8]
    assert all(0 < timing.p50_us <= timing.p99_us for timing in taken)

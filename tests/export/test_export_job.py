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
from onnx import numpy_helper

import export.research
from export import export_bundle, onnx_graph, trees
from export.publish import verify_version
from export.runtime import measure_latency, score_onnx
from export.split_rows import read_splits
from tests.export.conftest import verify_model
from tickserve.config import ExportSettings
from tickserve.errors import ArtifactError, DigestMismatchError, GateRefusedError, UnsafeModelError
from tickserve.manifest import Manifest, load_manifest

Rewrite = Callable[..., Manifest]
# What every model is held to; trees also on their splits.
GATES = ["graph", "parity.recorded", "parity.nan", "parity.extreme", "parity.batch", "parity.composition"]


def nothing_published(repository: Path) -> bool:
    return not repository.exists() or not [path for path in repository.rglob("*") if path.name != ".publish.lock"]


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


def spoil_weights(original: Callable[..., onnx.ModelProto], change: float) -> Callable[..., onnx.ModelProto]:
    """A converter that is wrong by `change` in the weights of its leaves."""

    def convert(booster: Any, features: int) -> onnx.ModelProto:
        model = original(booster, features)
        for attribute in model.graph.node[0].attribute:
            if attribute.name == "class_weights":
                weights = [
                    weight + (change if index % 7 == 0 else 0.0) for index, weight in enumerate(attribute.floats)
                ]
                del attribute.floats[:]
                attribute.floats.extend(weights)
        return model

    return convert


@pytest.mark.parametrize("change", [1e-3, 0.5, -5.0])
def test_a_drifted_graph_is_refused_with_the_first_counterexample(
    change: float, trees_bundle: Path, repository: Path, settings: ExportSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "trees_to_onnx", spoil_weights(onnx_graph.trees_to_onnx, change))
    with pytest.raises(GateRefusedError, match=r"parity.recorded refused: row \d+.*expected \[.*, was \[") as refused:
        export_bundle(trees_bundle, repository, settings)
    assert refused.value.field == "probabilities"
    assert nothing_published(repository)


def test_thresholds_that_round_the_other_way_are_refused(
    trees_bundle: Path, repository: Path, settings: ExportSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`<` for `<=`: the same numbers on almost every real row, another leaf exactly on a split."""
    original = onnx_graph.trees_to_onnx

    def convert(booster: Any, features: int) -> onnx.ModelProto:
        model = original(booster, features)
        for attribute in model.graph.node[0].attribute:
            if attribute.name == "nodes_modes":
                attribute.strings[:] = [mode.replace(b"BRANCH_LT", b"BRANCH_LEQ") for mode in attribute.strings]
        return model

    monkeypatch.setattr(onnx_graph, "trees_to_onnx", convert)
    with pytest.raises(GateRefusedError, match="parity"):
        export_bundle(trees_bundle, repository, settings)
    assert nothing_published(repository)


def test_missing_values_sent_the_other_way_are_refused(
    trees_bundle: Path, repository: Path, settings: ExportSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = onnx_graph.trees_to_onnx

    def convert(booster: Any, features: int) -> onnx.ModelProto:
        model = original(booster, features)
        for attribute in model.graph.node[0].attribute:
            if attribute.name == "nodes_missing_value_tracks_true":
                attribute.ints[:] = [1 - track for track in attribute.ints]
        return model

    monkeypatch.setattr(onnx_graph, "trees_to_onnx", convert)
    with pytest.raises(GateRefusedError, match="parity"):
        export_bundle(trees_bundle, repository, settings)
    assert nothing_published(repository)


def test_early_stopping_converts_the_trees_it_kept(booster: Any, real_rows: Any) -> None:
    stopped = booster.copy()
    stopped.set_attr(best_iteration="9")
    graph = onnx_graph.serve_graph(onnx_graph.trees_to_onnx(stopped, 6), 1).SerializeToString()
    rows = real_rows.features[:100]
    served = score_onnx(graph, {"features": rows})["probabilities"]
    matrix = xgb.DMatrix(rows, missing=np.nan)
    np.testing.assert_allclose(served, booster.predict(matrix, iteration_range=(0, 10)), atol=1e-6)
    assert np.abs(served - booster.predict(matrix)).max() > 1e-3


def retrained(bundle: Path, forest: Any, rewrite: Rewrite) -> Manifest:
    """The bundle with another forest, and what XGBoost says of the same rows with it."""

    def said(rows: np.ndarray) -> np.ndarray:
        best = forest.attr("best_iteration")
        kept = (0, int(best) + 1) if best is not None else (0, 0)
        return np.asarray(forest.predict(xgb.DMatrix(rows, missing=np.nan), iteration_range=kept))

    def change(arrays: dict[str, Any]) -> dict[str, Any]:
        probabilities = said(arrays["features"])
        new = {"features": arrays["features"], "probabilities": probabilities}
        return new | ({"score": probabilities[:, 2:] - probabilities[:, :1]} if "score" in arrays else {})

    forest.save_model(bundle / "model.ubj")
    for name in ("golden.npz", "parity.npz"):
        change_pairs(bundle, name, change)
    return rewrite(bundle)


FORESTS: dict[str, dict[str, Any]] = {
    "one base score": {"base_score": 0.2},
    "a base score for each class": {},
    "no base score": {"base_score": 0.0},
    "deep": {"max_depth": 9},
}


@pytest.mark.parametrize("case", FORESTS)
def test_forests_of_every_base_score_are_served(
    case: str, trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite, real_rows: Any
) -> None:
    matrix = xgb.DMatrix(real_rows.features[:2_000], label=real_rows.classes[:2_000], missing=np.nan)
    parameters = {"objective": "multi:softprob", "num_class": 3, "max_depth": 3, "nthread": 1, **FORESTS[case]}
    retrained(trees_bundle, xgb.train(parameters, matrix, num_boost_round=4), rewrite)
    published = export_bundle(trees_bundle, repository, settings)
    assert all(gate.passed for gate in published.gates)


def test_a_base_score_that_was_left_out_is_refused(
    trees_bundle: Path, repository: Path, settings: ExportSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = onnx_graph.trees_to_onnx

    def convert(booster: Any, features: int) -> onnx.ModelProto:
        model = original(booster, features)
        values = [a for a in model.graph.node[0].attribute if a.name == "base_values"]
        assert any(value != 0 for value in values[0].floats)
        values[0].floats[:] = [0.0] * len(values[0].floats)
        return model

    monkeypatch.setattr(onnx_graph, "trees_to_onnx", convert)
    with pytest.raises(GateRefusedError, match=r"parity\.recorded refused"):
        export_bundle(trees_bundle, repository, settings)
    assert nothing_published(repository)


def test_early_stopping_is_served_as_it_was_kept_and_all_trees_are_refused(
    trees_bundle: Path,
    tmp_path: Path,
    settings: ExportSettings,
    rewrite: Rewrite,
    booster: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped = booster.copy()
    stopped.set_attr(best_iteration="9")
    retrained(trees_bundle, stopped, rewrite)
    published = export_bundle(trees_bundle, tmp_path / "kept", settings)
    thresholds = next(gate for gate in published.gates if gate.name == "parity.thresholds")
    every = sum(left != -1 for tree in trees.trees_of(booster) for left in tree["left_children"])
    assert 0 < int(thresholds.measured["splits"] or 0) < every
    original = onnx_graph.trees_to_onnx
    monkeypatch.setattr(onnx_graph, "trees_to_onnx", lambda _, features: original(booster, features))
    with pytest.raises(GateRefusedError, match=r"parity\.recorded refused"):
        export_bundle(trees_bundle, tmp_path / "all", settings)
    assert nothing_published(tmp_path / "all")


def test_a_refusal_shows_the_smallest_case(
    trees_bundle: Path, repository: Path, settings: ExportSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One threshold one ulp higher: the case is one row, and the value that stands on it is among what was changed."""
    original = onnx_graph.trees_to_onnx
    moved: list[tuple[int, np.float32]] = []

    def convert(booster: Any, features: int) -> onnx.ModelProto:
        model = original(booster, features)
        found = {attribute.name: attribute for attribute in model.graph.node[0].attribute}
        values = found["nodes_values"].floats
        moved.append((found["nodes_featureids"].ints[0], np.float32(values[0])))
        values[0] = float(np.nextafter(np.float32(values[0]), np.float32(np.inf)))
        return model

    monkeypatch.setattr(onnx_graph, "trees_to_onnx", convert)
    with pytest.raises(
        GateRefusedError, match=r"gate parity\.thresholds refused: row \d+.*1 row, 1 of 6 values"
    ) as refused:
        export_bundle(trees_bundle, repository, settings)
    case = refused.value.counterexample
    assert case is not None
    [(feature, threshold)] = moved
    assert [change["column"] for change in case["changed"]] == [f"column_{feature}"]
    assert np.float32(case["changed"][0]["value"]) == threshold
    assert case["research"] != case["graph"]["probabilities"]
    assert nothing_published(repository)


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


def test_column_names_do_not_reach_the_converter(booster: Any) -> None:
    named = booster.copy()
    named.feature_names = ["spread", "imbalance", "f0", "f1", "x y", "z"]
    converted = onnx_graph.trees_to_onnx(named, 6)
    assert converted.SerializeToString() == onnx_graph.trees_to_onnx(booster, 6).SerializeToString()
    assert named.feature_names[0] == "spread"


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"booster": "dart", "objective": "multi:softprob", "num_class": 3}, "booster"),
        ({"objective": "multi:softmax", "num_class": 3}, "objective"),
        ({"objective": "reg:squarederror"}, "objective"),
        ({"objective": "multi:softprob", "num_class": 4}, "num_class"),
    ],
)
def test_forests_that_do_not_convert_faithfully_are_refused(
    parameters: dict[str, Any], field: str, real_rows: Any
) -> None:
    matrix = xgb.DMatrix(real_rows.features[:300], label=real_rows.classes[:300])
    forest = xgb.train(parameters | {"nthread": 1}, matrix, num_boost_round=2)
    with pytest.raises(ArtifactError) as refused:
        onnx_graph.trees_to_onnx(forest, 6)
    assert refused.value.field == field


def test_categorical_splits_are_refused(real_rows: Any) -> None:
    rows = real_rows.features[:300].copy()
    rows[:, 0] = np.arange(300) % 4
    kinds = ["c", *["float"] * 5]
    matrix = xgb.DMatrix(rows, label=real_rows.classes[:300], feature_types=kinds, enable_categorical=True)
    parameters = {"objective": "multi:softprob", "num_class": 3, "nthread": 1}
    with pytest.raises(ArtifactError, match="categorical"):
        onnx_graph.trees_to_onnx(xgb.train(parameters, matrix, num_boost_round=2), 6)


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


@pytest.mark.parametrize("content", [b"", b"{", b"random bytes" * 50, b"{" + b"\xff" * 5_000])
def test_bytes_that_are_no_forest_are_refused(
    content: bytes, trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    (trees_bundle / "model.ubj").write_bytes(content)
    rewrite(trees_bundle)
    with pytest.raises(ArtifactError, match="UBJSON"):
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


def change_pairs(bundle: Path, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    with np.load(bundle / name) as file:
        arrays = dict(file)
    np.savez(bundle / name, **change(arrays))


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


def test_splits_are_read_as_the_model_stores_them(booster: Any) -> None:
    splits = read_splits(trees.trees_of(booster))
    frame = booster.trees_to_dataframe()
    stored = frame[frame.Feature != "Leaf"]
    wanted = sorted(
        (int(name[1:]), np.float32(value)) for name, value in zip(stored.Feature, stored.Split, strict=True)
    )
    assert sorted((split.feature, split.threshold) for split in splits) == wanted
    assert len(splits) > 50


def test_latency_is_measured_per_call(trees_bundle: Path, repository: Path, settings: ExportSettings) -> None:
    published = export_bundle(trees_bundle, repository, settings)
    rows = {"features": np.zeros((8, 6), np.float32)}
    taken = measure_latency(published.path / "model.onnx", rows, (1, 8), calls=50)
    assert [timing.rows for timing in taken] == [1, 8]
    assert all(0 < timing.p50_us <= timing.p99_us for timing in taken)


def test_weights_survive_the_conversion(booster: Any) -> None:
    assert export.research.NO_OPTIMIZATION == 2
    model = onnx_graph.trees_to_onnx(booster, 6)
    assert not [tensor for tensor in model.graph.initializer if not np.isfinite(numpy_helper.to_array(tensor)).all()]

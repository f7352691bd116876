"""Forests become graphs: every way a conversion can go wrong is refused, and what is served is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import xgboost as xgb
from onnx import numpy_helper

import export.research
from export import export_bundle, onnx_graph, trees
from export.runtime import score_onnx
from export.split_rows import read_splits
from tests.export.bundles import Rewrite, change_pairs, nothing_published, spoil_weights
from tickserve.config import ExportSettings
from tickserve.errors import ArtifactError, GateRefusedError
from tickserve.manifest import Manifest


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


@pytest.mark.parametrize("content", [b"", b"{", b"random bytes" * 50, b"{" + b"\xff" * 5_000])
def test_bytes_that_are_no_forest_are_refused(
    content: bytes, trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    (trees_bundle / "model.ubj").write_bytes(content)
    rewrite(trees_bundle)
    with pytest.raises(ArtifactError, match="UBJSON"):
        export_bundle(trees_bundle, repository, settings)


def test_splits_are_read_as_the_model_stores_them(booster: Any) -> None:
    splits = read_splits(trees.trees_of(booster))
    frame = booster.trees_to_dataframe()
    stored = frame[frame.Feature != "Leaf"]
    wanted = sorted(
        (int(name[1:]), np.float32(value)) for name, value in zip(stored.Feature, stored.Split, strict=True)
    )
    assert sorted((split.feature, split.threshold) for split in splits) == wanted
    assert len(splits) > 50


def test_weights_survive_the_conversion(booster: Any) -> None:
    assert export.research.NO_OPTIMIZATION == 2
    model = onnx_graph.trees_to_onnx(booster, 6)
    assert not [tensor for tensor in model.graph.initializer if not np.isfinite(numpy_helper.to_array(tensor)).all()]

"""Trees of one margin are served as three probabilities: every loss, every base score, and what must be refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import xgboost as xgb
from hypothesis import given, settings
from hypothesis import strategies as st

from export import export_bundle, onnx_graph, trees
from export.gates import cross_check
from export.publish import read_pairs
from export.research import load_research
from export.runtime import score_onnx
from export.runtimes.candidates import Contestant, find
from models.gbdt import GbdtClassifier
from models.ordinal import OrdinalLink
from tests.export.bundles import Rewrite, change_pairs, nothing_published
from tickserve.config import ExportSettings
from tickserve.errors import ArtifactError, GateRefusedError
from tickserve.manifest import load_manifest

LINK = OrdinalLink.of(1.5, -0.7, 0.9)
Rows = np.ndarray
FORESTS: dict[str, dict[str, Any]] = {
    "squared": {"objective": "reg:squarederror"},
    "squared, a base score": {"objective": "reg:squarederror", "base_score": 0.3},
    "pseudo-Huber": {"objective": "reg:pseudohubererror"},
    "ndcg": {"objective": "rank:ndcg"},
    "pairwise, a base score": {"objective": "rank:pairwise", "base_score": -0.25},
    "deep": {"objective": "reg:squarederror", "max_depth": 9},
}


def grown(real_rows: Any, **parameters: Any) -> Any:
    """A forest on real rows; its label rises with the class that came."""
    rows, label = real_rows.features[:2_000], real_rows.classes[:2_000].astype(np.float32)
    rank = str(parameters["objective"]).startswith("rank")
    matrix = xgb.QuantileDMatrix(rows, label=label, max_bin=64, **({"qid": np.arange(2_000) // 50} if rank else {}))
    options = {"max_depth": 3, "max_bin": 64, "nthread": 1, "seed": 7}
    return xgb.train(options | parameters, matrix, num_boost_round=6)


@pytest.fixture
def margin_bundle(trees_bundle: Path, rewrite: Rewrite) -> Callable[..., Path]:
    """Puts a forest of one margin and its link into the bundle, with what research says of its rows."""

    def put(forest: Any, link: OrdinalLink = LINK) -> Path:
        model = GbdtClassifier(forest, 6, link=link)

        def change(arrays: dict[str, Any]) -> dict[str, Any]:
            said = model.predict(arrays["features"])
            new = {"features": arrays["features"], "probabilities": said}
            return new | ({"score": said[:, 2:] - said[:, :1]} if "score" in arrays else {})

        forest.save_model(trees_bundle / "model.ubj")
        for name in ("golden.npz", "parity.npz"):
            change_pairs(trees_bundle, name, change)
        rewrite(trees_bundle, architecture={"kind": "gbdt", "link": link.to_json()})
        return trees_bundle

    return put


@pytest.mark.parametrize("case", FORESTS)
def test_every_margin_is_served_and_every_engine_agrees(
    case: str, margin_bundle: Callable[..., Path], repository: Path, settings: ExportSettings, real_rows: Any
) -> None:
    bundle = margin_bundle(grown(real_rows, **FORESTS[case]))
    published = export_bundle(bundle, repository, settings)
    gates = {gate.name: gate for gate in published.gates}
    for name in ("parity.thresholds", "parity.missing", "parity.nan"):
        assert gates[name].measured["max_abs_probability"] <= 1e-6
        assert gates[name].measured["ties_broken_differently"] == 0
    # No row is moved by another, not by one bit.
    assert gates["parity.composition"].measured["max_abs_against_alone"] == 0
    assert published.parity["cross_check"]["max_abs_probability"] <= 1e-6
    assert published.parity["cross_check"]["decision_flips"] == 0


def test_treelite_and_xgboost_in_place_are_measured_beside_the_graph(
    margin_bundle: Callable[..., Path], repository: Path, settings: ExportSettings, real_rows: Any
) -> None:
    bundle = margin_bundle(grown(real_rows, **FORESTS["ndcg"]))
    manifest = load_manifest(bundle)
    research, recorded = load_research(bundle, manifest), read_pairs(bundle / "parity.npz", manifest)
    path = export_bundle(bundle, repository, settings).path
    found = find((path / "model.onnx").read_bytes(), manifest, research, threads=1, instances=1)
    engines = {each.name: each for each in found if isinstance(each, Contestant)}
    for name in ("treelite GTIL, 1 thread", "xgboost inplace_predict, 1 thread"):
        said = engines[name].answer(recorded.rows)["probabilities"]
        np.testing.assert_allclose(said, recorded.probabilities, atol=1e-6)
    assert (cross_check(research, recorded) or {})["rows"] > len(recorded.rows)


def test_early_stopping_is_served_as_it_was_kept(real_rows: Any) -> None:
    forest = grown(real_rows, objective="rank:ndcg")
    forest.set_attr(best_iteration="2")
    graph = onnx_graph.serve_graph(onnx_graph.margin_to_onnx(forest, 6, LINK), 1).SerializeToString()
    rows = real_rows.features[:100]
    served = score_onnx(graph, {"features": rows})["probabilities"]
    np.testing.assert_allclose(served, GbdtClassifier(forest[:3], 6, link=LINK).predict(rows), atol=1e-6)
    assert np.abs(served - GbdtClassifier(forest, 6, link=LINK).predict(rows)).max() > 1e-3


@pytest.mark.parametrize("spoiled", ["slopes", "cuts", "base_values"])
def test_a_wrong_link_or_base_score_is_refused(
    spoiled: str,
    margin_bundle: Callable[..., Path],
    repository: Path,
    settings: ExportSettings,
    real_rows: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = onnx_graph.margin_to_onnx

    def convert(booster: Any, features: int, link: OrdinalLink) -> onnx.ModelProto:
        model = original(booster, features, link)
        for tensor in model.graph.initializer:
            if tensor.name == f"link.{spoiled}":
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.01, tensor.name))
        for attribute in model.graph.node[0].attribute:
            if attribute.name == spoiled:
                attribute.floats[:] = [0.0]
        return model

    monkeypatch.setattr(onnx_graph, "margin_to_onnx", convert)
    with pytest.raises(GateRefusedError, match=r"parity\.recorded refused"):
        export_bundle(margin_bundle(grown(real_rows, objective="reg:squarederror")), repository, settings)
    assert nothing_published(repository)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"objective": "multi:softprob", "num_class": 3}, "objective"),
        ({"objective": "reg:squaredlogerror"}, "objective"),
        ({"booster": "dart", "objective": "reg:squarederror"}, "booster"),
    ],
)
def test_other_forests_have_no_margin_to_link(parameters: dict[str, Any], field: str, real_rows: Any) -> None:
    with pytest.raises(ArtifactError, match="cannot be exported") as refused:
        onnx_graph.margin_to_onnx(grown(real_rows, **parameters), 6, LINK)
    assert refused.value.field == field


def test_a_forest_of_two_targets_is_refused(real_rows: Any) -> None:
    matrix = xgb.DMatrix(real_rows.features[:300], label=np.stack([real_rows.classes[:300]] * 2, axis=1))
    forest = xgb.train({"objective": "reg:squarederror", "nthread": 1}, matrix, num_boost_round=2)
    with pytest.raises(ArtifactError) as refused:
        trees.prepare_booster(forest, 6, margin=True)
    assert refused.value.field == "num_target"


def test_a_margin_without_its_link_is_refused(
    margin_bundle: Callable[..., Path], repository: Path, settings: ExportSettings, rewrite: Rewrite, real_rows: Any
) -> None:
    bundle = margin_bundle(grown(real_rows, objective="reg:squarederror"))
    rewrite(bundle, architecture={"kind": "gbdt"})
    with pytest.raises(ArtifactError) as refused:
        export_bundle(bundle, repository, settings)
    assert (refused.value.field, refused.value.was) == ("objective", "reg:squarederror")


BAD_LINKS: dict[str, Any] = {
    "falling": {"slope": -1.0, "low": -1.0, "high": 1.0},
    "crossed": {"slope": 1.0, "low": 1.0, "high": 1.0},
    "no float32": {"slope": 0.1, "low": -1.0, "high": 1.0},
    "not finite": {"slope": float("inf"), "low": -1.0, "high": 1.0},
    "whole": {"slope": 1, "low": -1.0, "high": 1.0},
    "short": {"slope": 1.0},
    "text": "sigmoid",
}


@pytest.mark.parametrize("case", BAD_LINKS)
def test_a_link_that_is_none_is_refused(case: str) -> None:
    with pytest.raises(ArtifactError) as refused:
        OrdinalLink.from_architecture({"link": BAD_LINKS[case]})
    assert refused.value.field == "architecture.link"


def test_a_monotone_forest_is_served_monotone_to_the_last_bit(real_rows: Any) -> None:
    """Over every threshold of the constrained columns, below, on and above it: the served score never goes back."""
    signs = (1, 0, 0, -1, 0, 0)
    served = {}
    for name, constraint in (("free", (0,) * 6), ("held", signs)):
        forest = grown(real_rows, objective="reg:squarederror", max_depth=5, monotone_constraints=str(constraint))
        served[name] = onnx_graph.serve_graph(onnx_graph.margin_to_onnx(forest, 6, LINK), 1).SerializeToString()
    generator = np.random.default_rng(0)
    backwards = dict.fromkeys(served, 0)
    for column in (0, 3):
        values = np.sort(real_rows.features[:2_000:5, column][np.isfinite(real_rows.features[:2_000:5, column])])
        for base in real_rows.features[generator.integers(2_000, size=20)]:
            rows = np.repeat(base[np.newaxis], len(values), axis=0)
            rows[:, column] = values
            for name, graph in served.items():
                score = score_onnx(graph, {"features": rows})["score"][:, 0]
                backwards[name] += int((np.diff(score) * signs[column] < 0).sum())
    assert backwards["held"] == 0
    assert backwards["free"] > 0


@settings(max_examples=60, deadline=None)
@given(
    st.floats(1e-3, 1e3),
    st.floats(-20, 20),
    st.floats(0, 10),
    st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=30),
)
def test_a_link_gives_probabilities_and_a_score_that_rises(
    slope: float, low: float, gap: float, margins: list[float]
) -> None:
    link = OrdinalLink.of(slope, low, low + gap)
    said = link.probabilities(np.sort(np.array(margins, np.float32)))
    assert (said >= 0).all()
    np.testing.assert_allclose(said.sum(axis=1), 1.0, atol=2e-7)
    assert (np.diff(said[:, 2] - said[:, 0]) >= 0).all()
    assert OrdinalLink.from_architecture({"link": link.to_json()}) == link

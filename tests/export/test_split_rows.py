"""Rows on the splits of a forest: they get to every split they are made for, and one ulp in one split shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import xgboost as xgb
from hypothesis import given
from hypothesis import strategies as st

from export import split_rows, trees
from export.edge_rows import extreme_rows, rows_with_nan
from export.gates import run_gates
from export.job import to_onnx
from export.parity import first_difference, in_chunks
from export.publish import read_pairs
from export.research import Research, load_research
from export.runtime import open_session, run
from export.split_rows import Bounds, Split, SplitRows, read_splits, rows_on_splits
from tickserve.errors import GateRefusedError
from tickserve.manifest import Manifest, load_manifest

NAN = np.float32(np.nan)


def leaf_way(tree: dict[str, Any], row: np.ndarray) -> list[int]:
    """The inner nodes a row passes in one tree, as XGBoost walks it."""
    node, passed = 0, []
    while tree["left_children"][node] != -1:
        passed.append(node)
        value, threshold = row[tree["split_indices"][node]], np.float32(tree["split_conditions"][node])
        left = bool(tree["default_left"][node]) if np.isnan(value) else bool(value < threshold)
        node = tree["left_children" if left else "right_children"][node]
    return passed


@pytest.fixture(scope="module")
def manifest(trees_bundle_once: Path) -> Manifest:
    return load_manifest(trees_bundle_once)


@pytest.fixture(scope="module")
def research(trees_bundle_once: Path, manifest: Manifest) -> Research:
    return load_research(trees_bundle_once, manifest)


@pytest.fixture(scope="module")
def made(research: Research, trees_bundle_once: Path, manifest: Manifest) -> SplitRows:
    recorded = read_pairs(trees_bundle_once / "parity.npz", manifest)
    assert research.splits is not None
    return rows_on_splits(recorded.rows, research.splits, research.trees)


Node = tuple[int, int]


def passed(
    forest: list[dict[str, Any]], rows: np.ndarray, stands: Callable[[np.float32, np.float32], bool]
) -> set[Node]:
    """The (tree, node) that some row passes while its value `stands` there as asked to the threshold."""
    return {
        (number, node)
        for row in rows
        for number, tree in enumerate(forest)
        for node in leaf_way(tree, row)
        if stands(row[tree["split_indices"][node]], np.float32(tree["split_conditions"][node]))
    }


@pytest.fixture(scope="module")
def reached(booster: Any, made: SplitRows) -> dict[str, set[Node]]:
    """Counted anew from the trees: which splits are passed on the threshold and just below it, and with NaN."""
    forest = trees.trees_of(booster)
    on = passed(forest, made.on_value[1::3], lambda value, at: bool(value == at))
    below = passed(forest, made.on_value[0::3], lambda value, at: bool(value == np.nextafter(at, np.float32(-np.inf))))
    missing = passed(forest, made.missing, lambda value, _: bool(np.isnan(value)))
    return {"on_value": on & below, "missing": missing}


def test_every_split_has_its_rows(booster: Any, made: SplitRows, reached: dict[str, set[Node]]) -> None:
    splits = sum(left != -1 for tree in trees.trees_of(booster) for left in tree["left_children"])
    assert made.covered["splits"] == made.covered["splits_visited"] == splits
    assert made.covered["splits_unreachable"] == 0
    assert len(reached["on_value"]) >= made.covered["splits_crossed"] == splits
    assert len(reached["missing"]) == made.covered["splits_missing"] > 0.8 * splits


def test_rows_are_real_but_for_the_way_to_the_split(
    made: SplitRows, trees_bundle_once: Path, manifest: Manifest
) -> None:
    recorded = read_pairs(trees_bundle_once / "parity.npz", manifest).rows
    for row in made.on_value[::50]:
        same = (recorded == row) | (np.isnan(recorded) & np.isnan(row))
        assert same.sum(axis=1).max() >= 1
    assert made.on_value.dtype == made.missing.dtype == np.float32


def attributes(graph: onnx.ModelProto) -> dict[str, onnx.AttributeProto]:
    node = next(node for node in graph.graph.node if node.op_type == "TreeEnsembleClassifier")
    return {attribute.name: attribute for attribute in node.attribute}


Change = Callable[[dict[str, onnx.AttributeProto], int], None]


def moved(toward: float) -> Change:
    def change(found: dict[str, onnx.AttributeProto], node: int) -> None:
        values = found["nodes_values"].floats
        values[node] = float(np.nextafter(np.float32(values[node]), np.float32(toward)))

    return change


def turned(found: dict[str, onnx.AttributeProto], node: int) -> None:
    tracks = found["nodes_missing_value_tracks_true"].ints
    tracks[node] = 1 - tracks[node]


@pytest.mark.parametrize(
    ("change", "rows"),
    [(moved(np.inf), "on_value"), (moved(-np.inf), "on_value"), (turned, "missing")],
    ids=["up", "down", "nan"],
)
def test_one_threshold_moved_by_one_ulp_or_one_missing_route_turned_shows(
    change: Change,
    rows: str,
    booster: Any,
    research: Research,
    manifest: Manifest,
    made: SplitRows,
    reached: dict[str, set[Node]],
) -> None:
    """Splits all over the forest, one at a time; nothing else in the graph is touched."""
    graph = to_onnx(manifest, research)
    found = attributes(graph)
    named = named_as_in(trees.trees_of(booster), found)
    inner = sorted(named)
    asked = getattr(made, rows)
    expected = research.predict(asked)
    assert difference(graph, asked, expected, manifest) is None
    for place in inner[:: len(inner) // 40]:
        spoiled = onnx.ModelProto()
        spoiled.CopyFrom(graph)
        change(attributes(spoiled), place)
        shows = difference(spoiled, asked, expected, manifest) is not None
        # What no row can reach cannot show, and does not matter.
        assert shows is (named[place] in reached[rows])


def named_as_in(forest: list[dict[str, Any]], found: dict[str, onnx.AttributeProto]) -> dict[int, Node]:
    """The place of each inner node in the graph's lists, with its (tree, node) in XGBoost, which counts otherwise."""
    ids = zip(found["nodes_treeids"].ints, found["nodes_nodeids"].ints, strict=True)
    place = {node: number for number, node in enumerate(ids)}
    named: dict[int, Node] = {}
    stack = [(number, 0, 0) for number in range(len(forest))]
    while stack:
        number, theirs, ours = stack.pop()
        at, left = place[number, theirs], forest[number]["left_children"][ours]
        if left != -1:
            named[at] = number, ours
            stack.append((number, found["nodes_truenodeids"].ints[at], left))
            stack.append((number, found["nodes_falsenodeids"].ints[at], forest[number]["right_children"][ours]))
    return named


def difference(graph: onnx.ModelProto, rows: np.ndarray, expected: np.ndarray, manifest: Manifest) -> Any:
    session = open_session(graph.SerializeToString())
    return first_difference(expected, in_chunks(lambda batch: run(session, {"features": batch}), rows), manifest)


def test_a_large_forest_still_has_every_threshold_visited(
    research: Research, trees_bundle_once: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_rows, "MAX_TREE_VISITS", 0)
    recorded = read_pairs(trees_bundle_once / "parity.npz", manifest)
    splits = research.splits or ()
    made = rows_on_splits(recorded.rows, splits, research.trees)
    assert made.covered["splits_visited"] == made.covered["thresholds"] < made.covered["splits"]
    visited = {(feature, value) for row in made.on_value[1::3] for feature, value in enumerate(row.tolist())}
    assert {(split.feature, float(split.threshold)) for split in splits} <= visited


def test_a_value_that_only_the_missing_reach_is_not_made_up() -> None:
    """Below 1 and then from 2 up: only NaN gets there."""
    bounds = Bounds().narrowed(np.float32(1), left=True, missing=True).narrowed(np.float32(2), left=False, missing=True)
    assert np.isnan(bounds.value())
    closed = bounds.narrowed(np.float32(2), left=False, missing=False)
    assert closed.value() is None
    unreachable = Split(1, np.float32(0), ((0, closed),))
    made = rows_on_splits(np.zeros((3, 2), np.float32), [unreachable], trees=1)
    assert (len(made.on_value), len(made.missing), made.covered["splits_unreachable"]) == (0, 0, 1)
    only_nan = Split(0, np.float32(0), ((1, bounds),))
    made = rows_on_splits(np.zeros((3, 2), np.float32), [only_nan], trees=1)
    assert np.isnan(made.on_value[:, 1]).all()


@given(
    st.lists(st.tuples(st.floats(-2, 2, width=32), st.booleans(), st.booleans()), max_size=6),
    st.floats(-3, 3, width=32) | st.just(float("nan")),
)
def test_bounds_hold_what_every_split_on_the_way_lets_pass(way: list[tuple[float, bool, bool]], value: float) -> None:
    bounds, passes = Bounds(), True
    for threshold, left, missing in way:
        bounds = bounds.narrowed(np.float32(threshold), left, missing)
        passes = passes and (missing if np.isnan(value) else (value < threshold) is left)
    assert bounds.holds(np.float32(value)) is passes
    chosen = bounds.value()
    assert chosen is None or bounds.holds(chosen)


def test_a_forest_of_bare_leaves_has_no_rows(real_rows: Any) -> None:
    matrix = xgb.DMatrix(real_rows.features[:50], label=np.ones(50))
    stump = xgb.train({"objective": "multi:softprob", "num_class": 3, "max_depth": 1, "gamma": 1e9}, matrix, 2)
    splits = read_splits(trees.trees_of(stump))
    made = rows_on_splits(real_rows.features[:5], splits, trees=6)
    assert (splits, made.on_value.shape, made.missing.shape) == ([], (0, 6), (0, 6))


def test_only_the_missing_gate_sees_one_missing_route_turned(
    booster: Any, research: Research, trees_bundle_once: Path, manifest: Manifest, made: SplitRows
) -> None:
    """A split that no other gate's rows pass with the value missing."""
    recorded = read_pairs(trees_bundle_once / "parity.npz", manifest)
    others = [recorded.rows, rows_with_nan(recorded.rows), extreme_rows(recorded.rows, manifest), made.on_value]
    forest = trees.trees_of(booster)

    def missed(rows: np.ndarray) -> set[Node]:
        return passed(forest, rows[np.isnan(rows).any(axis=1)], lambda value, _: bool(np.isnan(value)))

    only = missed(made.missing).difference(*map(missed, others))
    assert only
    graph = to_onnx(manifest, research)
    found = attributes(graph)
    places = [place for place, node in named_as_in(forest, found).items() if node in only]
    turned(found, places[0])
    session = open_session(graph.SerializeToString())
    with pytest.raises(GateRefusedError, match=r"gate parity\.missing refused"):
        run_gates(lambda rows: run(session, {"features": rows}), recorded, research, manifest, [1, 2, 3, 16])

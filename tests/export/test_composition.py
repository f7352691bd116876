"""Real graphs whose answer hangs on the batch, and the two gates that refuse them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export import composition, gates
from export.counterexample import Candidate
from export.job import to_onnx
from export.parity import Recorded, Scorer
from export.publish import read_pairs
from export.research import Research, load_research
from export.runtime import open_session, run
from tickserve.errors import GateRefusedError
from tickserve.manifest import Manifest, load_manifest


@pytest.fixture(scope="module")
def manifest(trees_bundle_once: Path) -> Manifest:
    return load_manifest(trees_bundle_once)


@pytest.fixture(scope="module")
def research(trees_bundle_once: Path, manifest: Manifest) -> Research:
    return load_research(trees_bundle_once, manifest)


@pytest.fixture(scope="module")
def recorded(trees_bundle_once: Path, manifest: Manifest) -> Recorded:
    return read_pairs(trees_bundle_once / "parity.npz", manifest)


@pytest.fixture(scope="module")
def served(manifest: Manifest, research: Research) -> onnx.ModelProto:
    return to_onnx(manifest, research)


def scorer(graph: onnx.ModelProto) -> Scorer:
    session = open_session(graph.SerializeToString())
    return lambda rows: run(session, {"features": rows})


def leaning(graph: onnx.ModelProto, share: float) -> onnx.ModelProto:
    """The graph with each row's probabilities pulled by `share` to the mean of its batch: alone, nothing changes."""
    pulled = onnx.ModelProto()
    pulled.CopyFrom(graph)
    for node in pulled.graph.node:
        node.output[:] = ["own" if name == "probabilities" else name for name in node.output]
    nodes = [
        helper.make_node("ReduceMean", ["own", "rows"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["mean", "own"], ["away"]),
        helper.make_node("Mul", ["away", "share"], ["pull"]),
        helper.make_node("Add", ["own", "pull"], ["probabilities"]),
    ]
    before = next(place for place, node in enumerate(pulled.graph.node) if "probabilities" in node.input)
    for place, node in enumerate(nodes):
        pulled.graph.node.insert(before + place, node)
    constants = {"rows": np.array([0], np.int64), "share": np.array([share], np.float32)}
    pulled.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return pulled


def candidate(graph: onnx.ModelProto, recorded: Recorded, research: Research, manifest: Manifest) -> Candidate:
    allowed = composition.bound(manifest, 1)
    return Candidate(
        scorer(graph), research.predict, recorded, manifest, lambda one, other: composition.moved(one, other, allowed)
    )


def test_the_faithful_graph_gives_the_same_bits_in_any_company(
    served: onnx.ModelProto, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    held = candidate(served, recorded, research, manifest)
    for gate in (
        composition.batch_gate(held, 40, composition.bound(manifest, 1)),
        composition.composition_gate(held, [1, 2, 3, 16, 40], composition.bound(manifest, 1)),
    ):
        assert gate.passed
        assert gate.measured["max_abs_against_alone"] == gate.limits["against_alone_atol"] == 0.0


@pytest.mark.parametrize("share", [1e-3, 1e-5])
def test_a_graph_that_leans_on_its_batch_is_refused(
    share: float, served: onnx.ModelProto, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    """The larger share shows against research; the smaller is inside that tolerance, and only company gives it away."""
    graph = leaning(served, share)
    alone = scorer(graph)(recorded.rows[:1])["probabilities"]
    np.testing.assert_array_equal(alone, scorer(served)(recorded.rows[:1])["probabilities"])
    held = candidate(graph, recorded, research, manifest)
    for gate in (
        lambda: composition.batch_gate(held, 40, composition.bound(manifest, 1)),
        lambda: composition.composition_gate(held, [1, 2, 3, 16], composition.bound(manifest, 1)),
    ):
        with pytest.raises(GateRefusedError) as refused:
            gate()
        case = refused.value.counterexample
        assert case is not None
        assert (case["kind"], case["batch"]) == ("company", 2)
        assert case["graph_alone"] != case["graph"]


def test_leaning_inside_every_tolerance_is_found_by_the_whole_run(
    served: onnx.ModelProto, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    with pytest.raises(GateRefusedError, match=r"gate parity\.batch of 2 refused"):
        gates.run_gates(scorer(leaning(served, 1e-6)), recorded, research, manifest, [1, 2, 16])


def test_a_decision_that_company_turns_is_refused_however_close(manifest: Manifest) -> None:
    """A net may move in its last digits; the class it answers, and the side of zero, may not."""
    one = {"probabilities": np.array([[0.4, 0.4, 0.2]], np.float32), "bundle_id": np.zeros((1, 1), np.int64)}
    other = {"probabilities": np.array([[0.4, np.nextafter(np.float32(0.4), np.float32(1)), 0.2]], np.float32)}
    for answer in (one, other):
        answer["score"] = answer["probabilities"][:, 2:] - answer["probabilities"][:, :1]
    assert composition.moved(one, one, manifest.tolerance) is None
    difference = composition.moved(one, other, manifest.tolerance)
    assert difference is not None
    assert difference.field == "class alone"


def test_state_that_hangs_on_company_is_refused(manifest: Manifest) -> None:
    one = {"probabilities": np.array([[0.2, 0.5, 0.3]], np.float32), "score": np.array([[0.1]], np.float32)}
    one["hidden_out"] = np.zeros((1, 2, 3), np.float32)
    other = one | {"hidden_out": np.full((1, 2, 3), 1e-3, np.float32)}
    assert composition.moved(one, one, manifest.tolerance) is None
    difference = composition.moved(one, other, manifest.tolerance)
    assert difference is not None
    assert difference.field == "hidden_out alone"


@pytest.mark.parametrize(("largest", "count"), [(1, 1), (2, 2), (256, 256), (512, 512), (513, 513), (1_024, 536)])
def test_every_batch_size_is_scored(largest: int, count: int) -> None:
    sizes = composition.every_size(largest)
    assert sizes[: min(largest, 512)] == list(range(1, min(largest, 512) + 1))
    assert (sizes[-1], len(sizes)) == (largest, count)
    assert set(sizes) >= set(range(576, largest, 64))

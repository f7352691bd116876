"""Each parity gate alone, with scorers that are wrong in one way only: the negative controls."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import gates, parity
from export.edge_rows import EDGES
from export.job import to_onnx
from export.parity import Recorded
from export.publish import read_pairs
from export.research import Research, load_research
from export.runtime import open_session, run
from tickserve.errors import ArtifactError, GateRefusedError
from tickserve.manifest import Manifest, Tolerance, load_manifest

Scorer = Callable[[np.ndarray], dict[str, np.ndarray]]
GATES = [
    "parity.recorded",
    "parity.nan",
    "parity.extreme",
    "parity.thresholds",
    "parity.missing",
    "parity.batch",
    "parity.composition",
]


@pytest.fixture
def manifest(trees_bundle_once: Path) -> Manifest:
    return load_manifest(trees_bundle_once)


@pytest.fixture
def research(trees_bundle_once: Path, manifest: Manifest) -> Research:
    return load_research(trees_bundle_once, manifest)


@pytest.fixture
def recorded(trees_bundle_once: Path, manifest: Manifest) -> Recorded:
    return read_pairs(trees_bundle_once / "parity.npz", manifest)


@pytest.fixture
def faithful(manifest: Manifest, research: Research) -> Scorer:
    session = open_session(to_onnx(manifest, research).SerializeToString())
    return lambda rows: run(session, {"features": rows})


def served(probabilities: Any, manifest: Manifest) -> dict[str, np.ndarray]:
    array = np.asarray(probabilities, np.float32)
    ids = np.full((len(array), 1), manifest.bundle_id(), np.int64)
    return {"probabilities": array, "score": array[:, 2:3] - array[:, 0:1], "bundle_id": ids}


def held(expected: Any, was: Any, manifest: Manifest, **tolerance: float) -> Any:
    """`hold` at a tolerance of its own."""
    wide = manifest.model_copy(update={"tolerance": Tolerance(**({"atol": 0.05, "rtol": 0.0} | tolerance))})
    rows = np.zeros((len(expected), 6), np.float32)
    return parity.hold("test", rows, np.asarray(expected, np.float32), served(was, wide), wide)


def test_the_faithful_graph_passes_every_gate(
    faithful: Scorer, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    passed = gates.run_gates(faithful, recorded, research, manifest, gates.served_batches((4, 8), 16))
    assert [gate.name for gate in passed] == GATES
    assert passed[-1].measured["sizes"] == "1,2,3,4,8,16"
    assert passed[-2].measured["sizes"] == "1..16"
    assert passed[0].measured["rows"] == len(recorded.rows)


def test_a_class_that_flips_inside_the_numeric_tolerance_is_refused(manifest: Manifest) -> None:
    """The numbers are close enough; the decision is another one, and research was sure of it."""
    with pytest.raises(GateRefusedError, match=r"row 1.*expected down.*was flat") as refused:
        held([[0.6, 0.3, 0.1], [0.45, 0.39, 0.16]], [[0.6, 0.3, 0.1], [0.41, 0.43, 0.16]], manifest)
    assert refused.value.field == "decision"


def test_a_tie_may_break_either_way_and_is_counted(manifest: Manifest) -> None:
    gate = held([[0.41, 0.40, 0.19]], [[0.40, 0.41, 0.19]], manifest)
    assert gate.measured["ties_broken_differently"] == 1
    with pytest.raises(GateRefusedError):
        held([[0.41, 0.40, 0.19]], [[0.40, 0.41, 0.19]], manifest, atol=0.005)


def test_ties_are_the_exception(manifest: Manifest) -> None:
    """A model that is undecided everywhere would pass with any decision."""
    rows = 400
    expected, was = np.tile([[0.41, 0.40, 0.19]], (rows, 1)), np.tile([[0.41, 0.40, 0.19]], (rows, 1))
    was[:4] = [0.40, 0.41, 0.19]
    assert held(expected, was, manifest).measured["ties_broken_differently"] == 4
    was[4] = [0.40, 0.41, 0.19]
    with pytest.raises(GateRefusedError, match=r"at most 4 of 400 rows, was 5"):
        held(expected, was, manifest)


def test_a_score_that_changes_its_sign_is_refused(manifest: Manifest) -> None:
    with pytest.raises(GateRefusedError, match=r"row 0") as refused:
        held([[0.20, 0.54, 0.26]], [[0.24, 0.53, 0.23]], manifest, atol=0.05)
    assert refused.value.field in ("sign of score", "score")


def test_a_score_that_is_not_the_difference_is_refused(manifest: Manifest) -> None:
    answer = served([[0.2, 0.5, 0.3]], manifest)
    answer["score"] = -answer["score"]
    with pytest.raises(GateRefusedError) as refused:
        parity.hold("test", np.zeros((1, 6), np.float32), np.array([[0.2, 0.5, 0.3]], np.float32), answer, manifest)
    assert refused.value.field == "score"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_none_is_refused(bad: float, manifest: Manifest) -> None:
    with pytest.raises(GateRefusedError, match="probabilities"):
        held([[0.2, 0.5, 0.3]], [[0.2, bad, 0.3]], manifest)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bundle_id", lambda array: array + 1),
        ("bundle_id", lambda array: array.astype(np.int32)),
        ("score", lambda array: array[:, 0]),
        ("probabilities", lambda array: array.astype(np.float64)),
        ("probabilities", lambda array: array[:-1]),
    ],
)
def test_another_id_shape_or_type_is_refused(
    name: str, change: Callable[[np.ndarray], np.ndarray], manifest: Manifest
) -> None:
    expected = np.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], np.float32)
    answer = served(expected, manifest)
    answer[name] = change(answer[name])
    with pytest.raises(GateRefusedError) as refused:
        parity.hold("test", np.zeros((2, 6), np.float32), expected, answer, manifest)
    assert refused.value.field == name


def wrong_where(faithful: Scorer, wrong: Callable[[np.ndarray], np.ndarray]) -> Scorer:
    """Turns the answer around for the rows that `wrong` picks."""

    def score(rows: np.ndarray) -> dict[str, np.ndarray]:
        answer, picked = faithful(rows), wrong(rows)
        answer["probabilities"][picked] = answer["probabilities"][picked][:, ::-1]
        answer["score"][picked] *= -1
        return answer

    return score


def refused_by(scorer: Scorer, recorded: Recorded, research: Research, manifest: Manifest) -> str:
    with pytest.raises(GateRefusedError) as refused:
        gates.run_gates(scorer, recorded, research, manifest, [1, 2, 3, 16])
    return str(refused.value)


def empty(rows: np.ndarray) -> np.ndarray:
    """Which rows hold no value at all; no recorded one does."""
    return np.asarray(np.isnan(rows).all(axis=1))


def test_only_the_nan_gate_sees_rows_without_any_value(
    faithful: Scorer, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    scorer = wrong_where(faithful, empty)
    assert "gate parity.nan refused" in refused_by(scorer, recorded, research, manifest)


def test_only_the_threshold_gate_sees_the_step_just_below_a_split(
    faithful: Scorer, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    assert research.splits is not None
    steps = {(split.feature, np.nextafter(split.threshold, np.float32(-np.inf))) for split in research.splits}
    # The step below a split at zero is among the edges of float32 too.
    below = {(feature, value.tobytes()) for feature, value in steps if value not in EDGES}

    def on_a_step(rows: np.ndarray) -> np.ndarray:
        return np.array([any((i, value.tobytes()) in below for i, value in enumerate(row)) for row in rows])

    clean = ~on_a_step(recorded.rows)
    rest = Recorded(recorded.rows[clean], recorded.probabilities[clean])
    assert len(rest.rows) > 300
    scorer = wrong_where(faithful, on_a_step)
    assert "gate parity.thresholds refused" in refused_by(scorer, rest, research, manifest)


@pytest.mark.parametrize(
    ("gate", "wrong"),
    [
        ("parity.batch of 3", lambda rows: np.arange(len(rows)) == (2 if len(rows) == 3 else -1)),
        ("parity.batch of 16", lambda rows: np.full(len(rows), len(rows) == 16)),
    ],
)
def test_only_the_batch_gate_sees_an_answer_that_depends_on_the_batch(
    gate: str,
    wrong: Callable[[np.ndarray], np.ndarray],
    faithful: Scorer,
    recorded: Recorded,
    research: Research,
    manifest: Manifest,
) -> None:
    assert f"gate {gate} refused" in refused_by(wrong_where(faithful, wrong), recorded, research, manifest)


def test_only_the_composition_gate_sees_a_row_that_poisons_its_neighbours(
    faithful: Scorer, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    """As dynamic quantization does: a hole in one row changes the others of a small batch."""
    scorer = wrong_where(faithful, lambda rows: np.full(len(rows), 1 < len(rows) < 100 and empty(rows).any()))
    assert "gate parity.composition of" in refused_by(scorer, recorded, research, manifest)


def test_a_model_that_rejects_nan_is_not_asked_about_it(
    faithful: Scorer, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    strict = manifest.model_copy(update={"nan_policy": "reject"})

    def score(rows: np.ndarray) -> dict[str, np.ndarray]:
        assert not np.isnan(rows).any()
        return faithful(rows) | {"bundle_id": np.full((len(rows), 1), strict.bundle_id(), np.int64)}

    whole = ~np.isnan(recorded.rows).any(axis=1)
    rest = Recorded(recorded.rows[whole], recorded.probabilities[whole])
    passed = gates.run_gates(score, rest, research, strict, [1, 2])
    assert not {"parity.nan", "parity.missing"} & {gate.name for gate in passed}


@pytest.mark.parametrize(
    "arrays",
    [
        {"features": np.zeros((3, 6), np.float32)},
        {"features": np.zeros((3, 6), np.float64), "probabilities": np.zeros((3, 3), np.float32)},
        {"features": np.zeros((3, 5), np.float32), "probabilities": np.zeros((3, 3), np.float32)},
        {"features": np.zeros((3, 6), np.float32), "probabilities": np.zeros((2, 3), np.float32)},
        {"features": np.zeros((0, 6), np.float32), "probabilities": np.zeros((0, 3), np.float32)},
        {"features": np.array(3, np.float32), "probabilities": np.zeros((2, 3), np.float32)},
    ],
)
def test_recorded_pairs_of_another_shape_are_refused(
    arrays: dict[str, np.ndarray], tmp_path: Path, manifest: Manifest
) -> None:
    np.savez(tmp_path / "pairs.npz", **arrays)
    with pytest.raises(ArtifactError, match=r"pairs\.npz"):
        read_pairs(tmp_path / "pairs.npz", manifest)


def test_a_recorded_file_that_is_none_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    array = io.BytesIO()
    np.save(array, np.zeros(3, np.float32))
    for content in (b"", b"PK\x03\x04 truncated", b"text", array.getvalue()):
        (tmp_path / "pairs.npz").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"pairs\.npz"):
            read_pairs(tmp_path / "pairs.npz", manifest)

"""A refusal shows the smallest case: which values of a row, or which company, make the difference."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import composition, gates
from export.counterexample import Candidate, Trials, smallest_case
from export.job import to_onnx
from export.parity import Recorded
from export.publish import read_pairs
from export.research import Research, load_research
from export.runtime import open_session, run
from tickserve.errors import GateRefusedError
from tickserve.manifest import Manifest, load_manifest

Scorer = Callable[[np.ndarray], dict[str, np.ndarray]]


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
def faithful(manifest: Manifest, research: Research) -> Scorer:
    session = open_session(to_onnx(manifest, research).SerializeToString())
    return lambda rows: run(session, {"features": rows})


def turned(faithful: Scorer, wrong: Callable[[np.ndarray], np.ndarray]) -> Scorer:
    """Turns the answer around for the rows that `wrong` picks."""

    def score(rows: np.ndarray) -> dict[str, np.ndarray]:
        answer, picked = faithful(rows), wrong(rows)
        answer["probabilities"][picked] = answer["probabilities"][picked][:, ::-1]
        answer["score"][picked] *= -1
        return answer

    return score


def refused(scorer: Scorer, recorded: Recorded, research: Research, manifest: Manifest) -> GateRefusedError:
    with pytest.raises(GateRefusedError) as caught:
        gates.run_gates(scorer, recorded, research, manifest, [1, 2, 16])
    json.dumps(caught.value.counterexample, allow_nan=False)
    return caught.value


def test_the_values_that_matter_are_found_together(
    faithful: Scorer, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    """Wrong only where two columns are both above their median: neither can be left out, the other four can."""
    middle = np.nanmedian(recorded.rows, axis=0)
    scorer = turned(faithful, lambda rows: (rows[:, 1] > middle[1]) & (rows[:, 4] > middle[4]))
    error = refused(scorer, recorded, research, manifest)
    case = error.counterexample
    assert case is not None
    assert (case["kind"], case["batch"], case["minimal"], case["gate"]) == ("row", 1, True, "parity.recorded")
    changed = {change["column"]: change for change in case["changed"]}
    assert set(changed) <= {"column_1", "column_4"}
    assert changed
    row = np.array([float(value) for value in case["row"]], np.float32)
    assert row[1] > middle[1]
    assert row[4] > middle[4]
    base = recorded.rows[case["base_row"]]
    unchanged = [place for place in range(6) if f"column_{place}" not in changed]
    np.testing.assert_array_equal(row[unchanged], base[unchanged])
    np.testing.assert_allclose(case["research"], research.predict(row[None])[0])
    np.testing.assert_allclose(case["graph"]["probabilities"], case["research"][::-1], atol=1e-6)
    assert f"{len(changed)} of 6 values changed in recorded row {case['base_row']}" in str(error)
    assert "research [" in str(error)
    assert "graph [" in str(error)


def test_no_value_of_the_case_can_be_left_out(
    faithful: Scorer, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    scorer = turned(faithful, lambda rows: np.nansum(rows, axis=1) > np.nanmedian(np.nansum(recorded.rows, axis=1)))
    case = refused(scorer, recorded, research, manifest).counterexample
    assert case is not None
    row = np.array([float(value) for value in case["row"]], np.float32)
    base, columns = recorded.rows[case["base_row"]], manifest.features.columns
    for change in case["changed"]:
        without = row.copy()
        without[columns.index(change["column"])] = base[columns.index(change["column"])]
        agrees = np.abs(scorer(without[None])["probabilities"] - research.predict(without[None])).max() < 1e-5
        assert agrees


def test_a_row_that_only_company_turns_is_shown_with_one_neighbour(
    faithful: Scorer, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    def beside_nothing(rows: np.ndarray) -> np.ndarray:
        """Whoever travels with a row without any value is answered wrongly."""
        empty = np.isnan(rows).all(axis=1)
        return np.asarray(~empty & empty.any() & (len(rows) < 100))

    error = refused(turned(faithful, beside_nothing), recorded, research, manifest)
    case = error.counterexample
    assert case is not None
    assert (case["kind"], case["batch"], case["minimal"]) == ("company", 2, True)
    assert case["gate"].startswith("parity.composition of")
    assert case["company"] == ["nan"] * 6
    np.testing.assert_allclose(case["graph_alone"]["probabilities"], case["research"], atol=1e-6)
    assert "in a batch of 2, beside others; alone it agrees" in str(error)


def test_an_answer_that_hangs_on_the_size_alone_is_shown_with_copies(
    faithful: Scorer, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    scorer = turned(faithful, lambda rows: np.arange(len(rows)) == (4 if len(rows) >= 7 else -1))
    rest = recorded.head(6)
    case = refused(scorer, rest, research, manifest).counterexample
    assert case is not None
    assert (case["kind"], case["batch"], case["place"]) == ("batch size", 7, 4)


def test_recorded_numbers_of_another_model_are_told_from_a_wrong_graph(
    faithful: Scorer, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    spoiled = recorded.probabilities.copy()
    spoiled[3] = spoiled[3][::-1]
    error = refused(faithful, Recorded(recorded.rows, spoiled), research, manifest)
    assert error.counterexample is not None
    assert error.counterexample["kind"] == "recorded numbers"
    assert "recorded numbers are not those of the model" in str(error)


def test_a_graph_that_is_wrong_everywhere_has_no_row_to_compare_with(
    faithful: Scorer, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    error = refused(turned(faithful, lambda rows: np.full(len(rows), True)), recorded, research, manifest)
    assert error.counterexample is not None
    assert error.counterexample["kind"] == "every row"
    assert len(error.counterexample["row"]) == 6


def test_an_answer_that_changes_from_call_to_call_says_so(
    faithful: Scorer, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    first = iter([True])
    scorer = turned(faithful, lambda rows: np.full(len(rows), next(first, False)))
    error = refused(scorer, recorded, research, manifest)
    assert error.counterexample is not None
    assert error.counterexample["kind"] == "not repeated"


def test_a_graph_that_does_not_score_one_row_differs_too(
    faithful: Scorer, recorded: Recorded, research: Research, manifest: Manifest
) -> None:
    def score(rows: np.ndarray) -> dict[str, np.ndarray]:
        if len(rows) == 1:
            raise GateRefusedError("the graph does not score a batch of 1")
        return faithful(rows)

    candidate = Candidate(score, research.predict, recorded, manifest, lambda one, other: None)
    case = smallest_case(candidate, recorded.rows[:4], 2, recorded.probabilities[2:3])
    assert (case.kind, len(case.batch)) == ("every row", 1)


def fails_with(needed: set[int]) -> Callable[[Sequence[int]], bool]:
    return lambda some: needed <= set(some)


@given(st.sets(st.integers(0, 60), min_size=1, max_size=5), st.integers(61, 90))
def test_minimising_keeps_what_is_needed_and_nothing_else(needed: set[int], count: int) -> None:
    assert set(Trials(10_000).smallest(range(count), fails_with(needed))) == needed


def test_minimising_stops_when_it_has_cost_enough() -> None:
    trials = Trials(5)
    kept = trials.smallest(range(1_000), fails_with({1, 500, 999}))
    assert {1, 500, 999} <= set(kept)
    assert (trials.used, trials.left) == (5, 0)


def test_trees_are_held_to_the_bit_and_nets_to_their_tolerance(manifest: Manifest) -> None:
    assert composition.bound(manifest, threads=1).atol == composition.bound(manifest, threads=1).rtol == 0.0
    assert composition.bound(manifest, threads=4) == manifest.tolerance
    net = manifest.model_copy(update={"family": "lstm"})
    assert composition.bound(net, threads=1) == manifest.tolerance

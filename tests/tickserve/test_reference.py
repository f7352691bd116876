"""The reference distribution: its bins, its place in the manifest, and that older manifests keep their digests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numbers

from tickserve.errors import ArtifactError
from tickserve.manifest import Manifest, parse_manifest
from tickserve.reference import Distribution, Reference, counted, reference_of
from tickserve.store import canonical_json
from tickserve.testing import make_manifest

FLOATS = st.floats(-(2.0**99), 2.0**99, width=32) | st.just(float("nan"))


@given(values=numbers.arrays(np.float32, st.integers(1, 300), elements=FLOATS))
def test_every_value_is_in_one_bin_and_the_shares_are_what_was_counted(values: np.ndarray) -> None:
    made = Distribution.of(values)
    counts = made.counts_of(values)
    assert counts.sum() == len(values)
    np.testing.assert_allclose(counts / len(values), [*made.shares, made.missing], atol=1e-6)
    assert made.missing == pytest.approx(np.isnan(values).mean(), abs=1e-6)
    assert Distribution.model_validate_json(made.model_dump_json()) == made


def test_deciles_are_deciles() -> None:
    values = np.random.default_rng(7).normal(size=50_000).astype(np.float32)
    made = Distribution.of(values)
    assert len(made.edges) == 9
    np.testing.assert_allclose(made.shares, 0.1, atol=1e-4)
    np.testing.assert_allclose(made.edges, np.quantile(values, np.arange(1, 10) / 10), atol=1e-3)


def test_a_value_on_an_edge_lies_below_it() -> None:
    counts, missing = counted(np.array([1, 2, 2, 3, np.nan], np.float32), np.array([2], np.float32))
    assert (counts.tolist(), missing) == ([3, 1], 1)


def test_values_that_tie_share_a_bin() -> None:
    made = Distribution.of(np.array([0] * 80 + list(range(1, 21)), np.float32))
    assert made.edges[0] == 0
    assert made.shares[0] == 0.8
    assert len(made.shares) < 10


@pytest.mark.parametrize("constant", [0.0, 7.5, -1e30])
def test_a_column_that_never_moved_knows_its_value_from_any_other(constant: float) -> None:
    made = Distribution.of(np.full(100, constant, np.float32))
    assert made.shares == (0.0, 1.0, 0.0)
    above = np.nextafter(np.float32(constant), np.float32(np.inf))
    assert made.counts_of(np.array([above], np.float32)).tolist() == [0, 0, 1, 0]
    below = np.nextafter(np.float32(constant), np.float32(-np.inf))
    assert made.counts_of(np.array([below], np.float32)).tolist() == [1, 0, 0, 0]


def test_a_column_without_a_value_is_all_missing() -> None:
    made = Distribution.of(np.full(10, np.nan, np.float32))
    assert (made.edges, made.shares, made.missing) == ((), (0.0,), 1.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"edges": (1.0, 1.0)}, "rising"),
        ({"shares": (0.5,)}, "one more than edges"),
        ({"shares": (0.5, 0.2, 0.5)}, "together 1"),
        ({"shares": (1.5, -0.5, 0.0)}, "from 0"),
        ({"missing": 2.0}, "less than or equal to 1"),
    ],
)
def test_what_is_no_distribution_is_refused(changes: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {"edges": (1.0, 2.0), "shares": (0.5, 0.25, 0.25), "missing": 0.0}
    Distribution(**good)
    with pytest.raises(ValueError, match=says):
        Distribution(**(good | changes))


def test_a_manifest_holds_it_and_an_older_one_keeps_its_digest() -> None:
    older = make_manifest()
    rows = np.random.default_rng(7).normal(size=(500, 3)).astype(np.float32)
    reference = reference_of(rows, rows[:, 0])
    newer = make_manifest(reference=reference)
    assert "reference" not in older.stored()
    assert parse_manifest(canonical_json(older.stored())).digest() == older.digest()
    assert newer.digest() != older.digest()
    read = parse_manifest(canonical_json(newer.stored()))
    assert (read.reference, read.digest()) == (reference, newer.digest())
    assert (reference.rows, reference.score_rows, reference.score is None) == (500, 500, False)
    assert reference_of(rows).score is None


def test_a_reference_of_another_number_of_columns_is_refused() -> None:
    rows = np.zeros((5, 2), np.float32)
    stored = make_manifest().stored() | {"reference": reference_of(rows).model_dump(mode="json", exclude_unset=True)}
    with pytest.raises(ArtifactError, match="expected 3 columns, as the features, was 2"):
        parse_manifest(canonical_json(stored))
    assert isinstance(Reference.model_validate(stored["reference"]), Reference)
    assert Manifest.model_fields["reference"].default is None

"""The population stability index: what it is by hand, and what it must be for any data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numbers

from monitoring.drift.psi import psi
from tickserve.reference import Distribution

# Multiples of a power of two: scaling them rounds nothing.
ELEMENTS = st.integers(-6_400, 6_400).map(lambda number: number / 64)
VALUES = numbers.arrays(np.float32, st.integers(20, 400), elements=ELEMENTS)


def index(training: np.ndarray, served: np.ndarray) -> float:
    reference = Distribution.of(training.astype(np.float32))
    return psi(reference, reference.counts_of(served.astype(np.float32)), len(training))


def test_it_is_the_formula() -> None:
    reference = Distribution(edges=(0.0, 1.0), shares=(0.5, 0.3, 0.2), missing=0.0)
    counts = np.array([20, 30, 50, 0])
    expected = sum((a - e) * math.log(a / e) for a, e in zip((0.2, 0.3, 0.5), (0.5, 0.3, 0.2), strict=True))
    assert psi(reference, counts, 1_000) == pytest.approx(expected)


def test_an_empty_bin_counts_as_half_a_row() -> None:
    reference = Distribution(edges=(0.0,), shares=(0.5, 0.5), missing=0.0)
    share, other = 0.5 / 100.5, 100 / 100.5
    expected = (share - 0.5) * math.log(share / 0.5) + (other - 0.5) * math.log(other / 0.5)
    assert psi(reference, np.array([0, 100, 0]), 1_000) == pytest.approx(expected)


def test_without_a_row_there_is_no_index() -> None:
    with pytest.raises(ValueError, match="expected a row"):
        psi(Distribution(edges=(), shares=(1.0,), missing=0.0), np.array([0, 0]), 10)


@given(values=VALUES)
def test_the_training_itself_has_none(values: np.ndarray) -> None:
    assert index(values, values) == pytest.approx(0, abs=1e-4)


@given(training=VALUES, served=VALUES)
def test_it_is_finite_not_negative_and_no_order_matters(training: np.ndarray, served: np.ndarray) -> None:
    found = index(training, served)
    assert math.isfinite(found)
    assert found >= 0
    assert index(training, served[::-1].copy()) == pytest.approx(found)


@given(training=VALUES, scale=st.sampled_from([2.0, 0.25, 8.0]))
def test_units_do_not_matter(training: np.ndarray, scale: float) -> None:
    served = training[: len(training) // 2]
    assert index(training * np.float32(scale), served * np.float32(scale)) == pytest.approx(index(training, served))


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), shift=st.floats(1.0, 5.0))
def test_a_shift_is_caught_and_the_same_distribution_is_not(seed: int, shift: float) -> None:
    random = np.random.default_rng(seed)
    training, same = random.normal(size=5_000), random.normal(size=1_000)
    assert index(training, same) < 0.1  # a minor shift; by chance it is about (bins - 1) / rows = 0.009
    assert index(training, same + shift) > 0.25
    assert index(training, same * 4) > 0.25


def test_by_chance_it_is_as_small_as_theory_says() -> None:
    random = np.random.default_rng(7)
    training = random.normal(size=50_000)
    found = [index(training, random.normal(size=1_000)) for _ in range(150)]
    assert np.mean(found) == pytest.approx(9 * (1 / 1_000 + 1 / 50_000), rel=0.2)


def test_what_went_missing_is_a_shift() -> None:
    training = np.random.default_rng(7).normal(size=5_000).astype(np.float32)
    served = training[:2_000].copy()
    served[:1_000] = np.nan
    assert index(training, served) > 0.25
    assert index(served, served) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_column_that_seldom_moves_is_caught_when_its_moves_are_others(sign: int) -> None:
    random = np.random.default_rng(7)
    training = np.where(random.random(20_000) < 0.08, sign * random.exponential(size=20_000), 0.0)
    same, half = training[:5_000], np.where(np.arange(5_000) % 2, training[:5_000], 0.0)
    assert index(training, same) < 0.01
    assert index(training, same * 1_000) > 0.25
    assert index(training, -same) > 0.25
    assert index(training, half) > 0.02
    assert index(training, np.zeros(5_000)) > 0.25


def test_a_column_that_never_moved_is_caught_when_it_does() -> None:
    assert index(np.full(1_000, 3.0), np.full(1_000, 3.1)) > 1
    assert index(np.full(1_000, 3.0), np.full(1_000, 3.0)) == pytest.approx(0, abs=1e-4)

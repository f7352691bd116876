"""Walk-forward folds: no label reaches from one part into the next, and the embargo is kept."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from market.walkforward import Fold, purged_walk_forward
from tickserve.errors import InsufficientDataError, SchemaError

Rows = tuple[np.ndarray, np.ndarray]


@st.composite
def labelled_rows(draw: st.DrawFn) -> Rows:
    n = draw(st.integers(40, 400))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ts = np.cumsum(rng.integers(0, 4, n)).astype(np.int64)
    return ts, ts + rng.integers(0, draw(st.integers(1, 30)), n)


def folds_or_reject(ts: np.ndarray, end: np.ndarray, folds: int, embargo: int) -> list[Fold]:
    try:
        return purged_walk_forward(ts, end, folds, embargo, min_train_rows=1)
    except InsufficientDataError:
        assume(False)
        raise


@given(labelled_rows(), st.integers(1, 6), st.integers(0, 10))
@settings(max_examples=100, deadline=None)
def test_no_label_reaches_into_the_next_part(rows: Rows, folds: int, embargo: int) -> None:
    ts, end = rows
    for fold in folds_or_reject(ts, end, folds, embargo):
        assert end[fold.train].max() + embargo < ts[fold.validation[0]]
        assert end[fold.validation].max() + embargo < ts[fold.test[0]]
        assert end[fold.train].max() + embargo < ts[fold.test].min()


@given(labelled_rows(), st.integers(1, 6), st.integers(0, 10))
@settings(max_examples=100, deadline=None)
def test_parts_are_in_order_apart_and_tests_tile_the_end(rows: Rows, folds: int, embargo: int) -> None:
    ts, end = rows
    made = folds_or_reject(ts, end, folds, embargo)
    for fold in made:
        parts = np.concatenate([fold.train, fold.validation, fold.test])
        assert (np.diff(parts) > 0).all()
    tests = np.concatenate([fold.test for fold in made])
    assert (np.diff(tests) == 1).all()
    assert tests[-1] == len(ts) - 1
    assert all(len(a.train) <= len(b.train) for a, b in pairwise(made))


def test_purging_removes_only_what_must_go() -> None:
    ts = np.arange(100, dtype=np.int64)
    [fold] = purged_walk_forward(ts, ts + 5, 1, 2, 1)
    assert fold.test[0] == 50
    assert fold.validation[-1] == 42  # 42 + 5 + 2 < 50, and 43 would touch it
    assert fold.train[-1] == fold.validation[0] - 8


def test_too_few_rows_names_what_was_needed() -> None:
    ts = np.arange(100, dtype=np.int64)
    with pytest.raises(InsufficientDataError, match=r"at least 500 rows, was \d+"):
        purged_walk_forward(ts, ts + 1, 3, 0, 500)
    with pytest.raises(InsufficientDataError):
        purged_walk_forward(ts[:2], ts[:2] + 1, 3, 0, 1)
    with pytest.raises(SchemaError, match="label_end_ts_ns"):
        purged_walk_forward(ts, ts - 1, 1, 0, 1)

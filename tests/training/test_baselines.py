"""Baselines are fitted in the fold: nothing after the training rows can change them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from training.baselines import column_scale, judged_mask, last_move, linear, linear_columns, majority
from training.examples import Examples


def test_linear_is_fitted_on_training_rows_only(examples: Examples, meta) -> None:  # noqa: ANN001
    fold = examples.folds[0]
    before = linear(examples, fold, meta.columns)
    spoiled = examples.features.copy()
    spoiled[fold.rows.test[-1] + 1 :] = 1e6
    ret = examples.ret.copy()
    ret[fold.rows.test] *= -1
    after = linear(replace(examples, features=spoiled, ret=ret), fold, meta.columns)
    np.testing.assert_array_equal(before.score, after.score)


def test_majority_and_last_move_are_what_they_say(examples: Examples) -> None:
    fold = examples.published
    classes = examples.classes(fold.rows.train, fold.threshold)
    assert set(majority(examples, fold).classes) == {np.bincount(classes).argmax()}
    moved = last_move(examples, fold)
    np.testing.assert_array_equal(moved.score, examples.trailing[fold.rows.test])
    assert set(moved.classes) == {0, 1, 2}


def test_linear_sees_imbalances_of_a_book_and_returns_of_bars() -> None:
    book = ("microprice_deviation", "level_imbalance_1", "order_flow_imbalance_1000ms", "mid_return_1000ms")
    assert linear_columns(book).tolist() == [1, 2]
    assert linear_columns(("bar_range", "bar_return_5", "return_skewness_60")).tolist() == [1]
    assert linear_columns(("a", "b")).tolist() == [0, 1]


def test_scale_ignores_holes_and_leaves_constants_alone() -> None:
    rows = np.array([[1.0, 5.0, np.nan], [3.0, 5.0, np.nan], [np.inf, 5.0, np.nan]])
    mean, std = column_scale(rows)
    assert mean.tolist() == [2.0, 5.0, 0.0]
    assert std == pytest.approx([1.0, 1.0, 1.0])


def test_judged_mask_keeps_a_baseline_on_the_models_rows(examples: Examples) -> None:
    fold = examples.published
    kept = fold.rows.test[3::2]
    np.testing.assert_array_equal(fold.rows.test[judged_mask(kept, fold)], kept)

"""Metrics: effective sample sizes, the one-position-at-a-time rule, costs, and edge cases without a number."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from training.examples import Examples
from training.metrics import (
    Prediction,
    calibration,
    effective_rows,
    evaluate,
    one_at_a_time,
    pool,
    rank_correlation,
    trades,
)


def slow_effective_rows(rows: np.ndarray, end: np.ndarray) -> float:
    """Average uniqueness, as the book writes it."""
    covered = [set(range(r + 1, e + 1)) for r, e in zip(rows.tolist(), end.tolist(), strict=True)]
    total = 0.0
    for mine in covered:
        total += np.mean([1.0 / sum(bar in other for other in covered) for bar in mine])
    return total


@given(st.lists(st.integers(0, 60), min_size=1, max_size=25, unique=True), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_effective_rows_is_the_sum_of_average_uniqueness(starts: list[int], seed: int) -> None:
    rows = np.sort(np.asarray(starts, dtype=np.int64))
    end = rows + np.random.default_rng(seed).integers(1, 12, len(rows))
    assert effective_rows(rows, end) == pytest.approx(slow_effective_rows(rows, end))
    assert effective_rows(rows, end) <= len(rows) + 1e-9


def test_labels_over_ten_rows_count_a_tenth() -> None:
    rows = np.arange(1_000, dtype=np.int64)
    assert effective_rows(rows, rows + 1) == pytest.approx(1_000)
    assert effective_rows(rows, rows + 10) == pytest.approx(100, rel=0.03)
    assert effective_rows(rows[:0], rows[:0]) == 0.0


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=40))
@settings(max_examples=60, deadline=None)
def test_rank_correlation_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    left, right = (np.asarray(side, dtype=float) for side in zip(*pairs, strict=True))
    found = rank_correlation(left, right)
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(left, right).statistic)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_positions_never_overlap_and_none_is_missed(wanted: list[bool], horizon: int) -> None:
    rows = np.arange(len(wanted), dtype=np.int64)
    taken = one_at_a_time(np.flatnonzero(wanted), rows, rows + horizon)
    assert (np.diff(taken) >= horizon).all()
    for position in np.flatnonzero(wanted):
        assert any(start <= position < start + horizon for start in taken)


def test_a_round_trip_pays_two_fees_and_two_half_spreads(examples: Examples) -> None:
    rows = examples.published.rows.test
    always_up = np.full(len(rows), 2, dtype=np.int64)
    free = trades(always_up, rows, replace(examples, cost_bps=np.zeros(len(examples.ret))), 0.0)
    paid = trades(always_up, rows, replace(examples, cost_bps=np.full(len(examples.ret), 3.0)), 1.5)
    assert paid["trades"] == pytest.approx(len(rows) / 5, rel=0.05)
    assert free["pnl_bps"] == pytest.approx(free["pnl_gross_bps"])
    assert paid["pnl_gross_bps"] == pytest.approx(free["pnl_gross_bps"])
    assert paid["pnl_bps"] == pytest.approx(free["pnl_bps"] - 2 * 3.0 - 2 * 1.5)


def test_a_seer_scores_full_marks_and_the_opposite_none(examples: Examples) -> None:
    fold = examples.published
    rows = fold.rows.test
    ret = examples.ret[rows]
    truth = examples.classes(rows, fold.threshold)
    seer = evaluate(Prediction(truth, ret), rows, examples, fold.threshold, 0.0)
    fool = evaluate(Prediction(2 - truth, -ret), rows, examples, fold.threshold, 0.0)
    for metric in ("macro_f1", "mcc", "ic", "hit_rate"):
        assert seer[metric] == pytest.approx(1.0)
    assert fool["ic"] == pytest.approx(-1.0)
    assert fool["hit_rate"] == 0.0
    assert seer["n_eff"] == pytest.approx(len(rows) / 5, rel=0.05)


def test_a_predictor_without_opinion_has_no_ic_hit_rate_or_trades(examples: Examples) -> None:
    fold = examples.published
    rows = fold.rows.test
    flat = Prediction(np.ones(len(rows), dtype=np.int64), np.zeros(len(rows)))
    found = evaluate(flat, rows, examples, fold.threshold, 1.0)
    assert (found["ic"], found["hit_rate"], found["trades"], found["pnl_bps"]) == (None, None, 0, None)
    both = pool([found, found])
    assert (both["ic"], both["ic_t"], both["hit_rate"], both["pnl_bps"], both["ranked_folds"]) == (None,) * 4 + (0,)
    assert (both["rows"], both["trades"]) == (2 * len(rows), 0)


def fold_of(**numbers: float | None) -> dict[str, float | int | None]:
    usual = {"rows": 100, "n_eff": 25.0, "macro_f1": 0.4, "mcc": 0.1, "ic": 0.2, "ic_t": 1.0, "hit_rate": 0.5}
    return usual | {"calls": 10, "trades": 1, "pnl_bps": 0.0, "pnl_gross_bps": 2.0} | numbers


def test_folds_are_pooled_by_what_lies_behind_each_number() -> None:
    folds = [
        fold_of(trades=1, pnl_bps=10.0, calls=90, hit_rate=0.6, rows=300, n_eff=75.0, ic=0.4, mcc=0.2),
        fold_of(trades=99, pnl_bps=-1.0, calls=10, hit_rate=0.1),
        fold_of(trades=0, pnl_bps=None, pnl_gross_bps=None, calls=0, hit_rate=None, ic=None, ic_t=None, mcc=0.0),
    ]
    found = pool(folds)
    assert found["pnl_bps"] == pytest.approx((10 - 99) / 100)
    assert found["hit_rate"] == pytest.approx((0.6 * 90 + 0.1 * 10) / 100)
    assert found["ic"] == pytest.approx((0.4 * 300 + 0.2 * 100 + 0.0 * 100) / 500)
    assert found["ic_t"] == pytest.approx(found["ic"] * 125.0**0.5)
    assert found["mcc"] == pytest.approx((0.2 * 300 + 0.1 * 100) / 500)
    assert (found["rows"], found["n_eff"], found["trades"], found["ranked_folds"]) == (500, 125.0, 100, 2)


def test_calibration_of_honest_probabilities_is_the_diagonal() -> None:
    rng = np.random.default_rng(5)
    p_up = rng.random(20_000)
    curve = calibration(p_up, rng.random(20_000) < p_up)
    assert sum(row["rows"] for row in curve) == 20_000
    assert all(row["observed"] == pytest.approx(row["predicted"], abs=0.05) for row in curve)

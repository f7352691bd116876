"""The block bootstrap: it covers what it says, it needs blocks, and it is about the very numbers that are reported."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy.signal import lfilter
from sklearn.metrics import f1_score, matthews_corrcoef

from training import intervals
from training.cells import CONFUSION, MODEL, macro_f1, matthews
from training.examples import Examples
from training.intervals import MIN_BLOCKS, Resampling, ratio
from training.metrics import Outcome, Prediction, evaluate, pool
from training.walk import cells_of, pooled_of


def mean(sums: np.ndarray) -> np.ndarray:
    return ratio(sums[..., 0], sums[..., 1])


def persistent(rng: np.random.Generator, cells: int, carried: float) -> np.ndarray:
    """Sums and rows of cells, each of which carries a part of the one before; the true mean is 0."""
    noise = rng.normal(size=cells + 100)
    return np.stack([lfilter([1.0], [1.0, -carried], noise)[100:], np.ones(cells)], axis=1)


def covered(carried: float, cells: int, times: int = 300) -> float:
    rng, hits = np.random.default_rng(1), 0
    for seed in range(times):
        found = Resampling.of(cells, seed).interval(persistent(rng, cells, carried), mean)
        assert found is not None
        hits += found[0] < 0 < found[1]
    return hits / times


@pytest.mark.parametrize(("carried", "cells", "least"), [(0.0, 60, 0.92), (0.3, 60, 0.90), (0.3, 400, 0.91)])
def test_the_interval_holds_the_truth_as_often_as_it_says(carried: float, cells: int, least: float) -> None:
    assert least <= covered(carried, cells) <= 0.985


def test_cells_drawn_one_by_one_would_hold_it_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without blocks, cells that resemble their neighbours count as if they stood alone."""
    monkeypatch.setattr(intervals, "MIN_BLOCK_CELLS", 1)
    monkeypatch.setattr(intervals.math, "ceil", lambda value: 1)
    assert covered(0.6, 200) < 0.8


def test_the_width_is_that_of_the_mean_of_an_autoregression() -> None:
    """Of x(t) = c x(t-1) + e the mean of C values has the standard error 1 / ((1 - c) sqrt(C))."""
    found = Resampling.of(20_000, 3).interval(persistent(np.random.default_rng(2), 20_000, 0.4), mean)
    assert found is not None
    assert found[1] - found[0] == pytest.approx(2 * 1.96 / (0.6 * 20_000**0.5), rel=0.1)


def test_too_few_blocks_or_too_few_counted_give_no_interval() -> None:
    sums = persistent(np.random.default_rng(0), 49, 0.0)
    few = Resampling.of(49, 0)
    assert few.blocks == MIN_BLOCKS - 1
    assert few.interval(sums, mean) is None
    assert few.to_json()["note"] == "too few independent rows: 9 blocks, 10 needed"
    enough = Resampling.of(50, 0)
    sums = persistent(np.random.default_rng(0), 50, 0.0)
    assert enough.to_json()["note"] is None
    assert enough.interval(sums, mean) is not None
    trades = np.zeros(50)
    trades[:45] = 1.0  # nine blocks of five hold trades, the tenth holds none
    assert enough.interval(sums, mean, trades) is None
    trades[49] = 1.0
    assert enough.interval(sums, mean, trades) is not None


@pytest.mark.parametrize("seed", range(5))
def test_scores_from_counts_are_sklearns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, said = rng.integers(0, 3, 60), rng.integers(0, 1 + seed % 3, 60)
    matrix = np.bincount(truth * 3 + said, minlength=CONFUSION).reshape(3, 3).astype(float)
    expected = f1_score(truth, said, labels=range(3), average="macro", zero_division=0)
    assert macro_f1(matrix) == pytest.approx(expected)
    assert matthews(matrix) == pytest.approx(matthews_corrcoef(truth, said))
    np.testing.assert_allclose(macro_f1(np.stack([matrix, matrix])), [expected] * 2)


def pooled_by_hand(examples: Examples, config, skill: float) -> tuple[dict, dict]:  # noqa: ANN001
    """Pooled metrics of a predictor that knows a part of the answer, and the same numbers from all cells' sums."""
    rng, cells, metrics = np.random.default_rng(4), [], []
    for fold in examples.folds:
        rows, fee = fold.rows.test, config.costs.fee_bps
        score = skill * examples.ret[rows] / examples.ret[rows].std() + rng.normal(size=len(rows))
        said = Prediction(np.digitize(score, [-0.5, 0.5]), score)
        metrics.append(evaluate(said, rows, examples, fold.threshold, fee))
        outcome = Outcome.of(said, rows, examples, fold.threshold, fee)
        cells.append(cells_of(examples, rows, {MODEL: said}, {MODEL: outcome}))
    return pooled_of(MODEL, metrics, cells, config), pool(metrics)


def test_every_pooled_number_lies_inside_its_own_interval(examples: Examples, config) -> None:  # noqa: ANN001
    found, plain = pooled_by_hand(examples, config, 0.3)
    assert {key: found[key] for key in plain} == plain
    for key in ("macro_f1", "mcc", "ic", "hit_rate", "pnl_bps"):
        low, high = found["interval"][key]
        assert low < found[key] < high
        assert found[key] == pytest.approx((low + high) / 2, abs=0.2 * (high - low))
    assert found["interval"]["ic"][0] > 0.1
    assert found["pnl_bps_by_fees"]["1"] == found["pnl_bps"]
    assert found["pnl_bps_by_fees"]["0"] - found["pnl_bps_by_fees"]["2"] == pytest.approx(4 * config.costs.fee_bps)
    assert found["turnover_per_row"] == pytest.approx(found["trades"] / found["rows"])
    minutes = found["days"] * 24 * 60
    assert found["rows"] * 0.9 < minutes < found["rows"] * 1.5  # bars of a minute, some missing
    assert found["turnover_per_day"] == pytest.approx(found["trades"] / found["days"])


def test_noise_has_an_interval_around_zero_and_no_opinion_has_none(examples: Examples, config) -> None:  # noqa: ANN001
    found, _ = pooled_by_hand(examples, config, 0.0)
    assert found["interval"]["ic"][0] < 0 < found["interval"]["ic"][1]
    rows = examples.published.rows.test
    flat = Prediction(np.ones(len(rows), dtype=np.int64), np.zeros(len(rows)))
    outcome = Outcome.of(flat, rows, examples, 0.001, 1.0)
    cells = cells_of(examples, rows, {MODEL: flat}, {MODEL: outcome})
    silent = pooled_of(MODEL, [evaluate(flat, rows, examples, 0.001, 1.0)], [cells], config)
    assert [silent["interval"][key] for key in ("ic", "hit_rate", "pnl_bps")] == [None] * 3
    assert silent["interval"]["macro_f1"] is not None


def test_the_intervals_of_sixty_thousand_rows_are_cheap() -> None:
    rng, resampling = np.random.default_rng(0), Resampling.of(12_000, 7)
    sums = rng.random((12_000, 33))
    started = time.perf_counter()
    resampling.intervals(sums, {str(key): (mean, None) for key in range(5)})
    assert time.perf_counter() - started < 2.0

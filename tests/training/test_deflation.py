"""Deflation: the bar that luck sets, against simulated luck, and the numbers of the paper."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from training.deflation import MIN_TRADES, Sharpe, deflated, expected_maximum, of_statistic


@pytest.mark.parametrize("trials", [5, 20, 100])
def test_the_bar_is_the_best_of_so_many_worthless_trials(trials: int) -> None:
    best = np.random.default_rng(1).normal(size=(20_000, trials)).max(axis=1)
    assert expected_maximum(trials) == pytest.approx(best.mean(), rel=0.04)


def test_one_trial_is_not_deflated_and_more_trials_lower_the_probability() -> None:
    assert expected_maximum(1) == 0.0
    assert of_statistic(2.0, 1) == pytest.approx(norm.cdf(2.0))
    falling = [of_statistic(2.0, trials) for trials in (1, 2, 10, 100, 1_000)]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] > 0.95 > 0.5 > falling[-2]


def test_the_example_of_the_paper() -> None:
    """Bailey and Lopez de Prado (2014), numerical example: SR 2.5 a year over 5 years of 250 days, 100 trials, skew -3,
    kurtosis 10, variance of the trials' annual ratios 1/2: the deflated ratio is 0.9004.
    """
    daily = Sharpe(2.5 / 250**0.5, 1_250, -3.0, 10.0)
    bar = (0.5 / 250) ** 0.5 * expected_maximum(100)
    spread = 1 + 3 * daily.ratio + (10 - 1) / 4 * daily.ratio**2
    assert norm.cdf((daily.ratio - bar) * 1_249**0.5 / spread**0.5) == pytest.approx(0.9004, abs=2e-4)
    # The same formula with the variance of a trial without skill, 1 / (T - 1), in place of the paper's.
    ours = (daily.ratio * 1_249**0.5 - expected_maximum(100)) / spread**0.5
    assert daily.deflated(100) == pytest.approx(norm.cdf(ours))


def test_moments_are_those_of_the_trades() -> None:
    profits = np.random.default_rng(3).gamma(2.0, size=5_000) - 1.9
    found = Sharpe.of(profits)
    assert found is not None
    assert found.ratio == pytest.approx(profits.mean() / profits.std(), rel=1e-3)
    assert found.skew == pytest.approx(2**0.5, rel=0.1)
    assert found.kurtosis == pytest.approx(6.0, rel=0.2)


def test_too_few_or_equal_trades_have_no_sharpe() -> None:
    rng = np.random.default_rng(0)
    assert Sharpe.of(rng.normal(size=MIN_TRADES - 1)) is None
    assert Sharpe.of(np.ones(100)) is None
    found = deflated(None, rng.normal(size=3), 4)
    assert (found["ic_probability"], found["sharpe_probability"], found["sharpe_trades"]) == (None, None, 3)


def test_the_best_of_many_worthless_trials_passes_no_more_often_than_a_lone_one() -> None:
    rng = np.random.default_rng(5)
    best = rng.normal(size=(500, 50)).max(axis=1)
    assert (np.array([of_statistic(value, 1) for value in best]) >= 0.95).mean() > 0.8  # undeflated: nearly all
    assert (np.array([of_statistic(value, 50) for value in best]) >= 0.95).mean() < 0.05
    many = [Sharpe.of(row) for row in rng.normal(size=(200, 60))]
    held = [each.deflated(50) >= 0.95 for each in many if each is not None]
    assert np.mean(held) < 0.02

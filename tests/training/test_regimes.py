"""Regimes: what was known at a row, by the book, and limits that only training rows have a say in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from training.examples import Examples
from training.metrics import Outcome, Prediction
from training.regimes import HORIZONS, REGIMES, Limits, Placed, behind, by_regime

WINDOW, SHORTEST = 40, 5


def slowly(examples: Examples, row: int) -> tuple[float, float]:
    first = max(int(np.flatnonzero(examples.session == examples.session[row])[0]), row - WINDOW)
    moves = np.diff(np.log(examples.mid[first : row + 1]))
    if len(moves) < SHORTEST:
        return np.nan, np.nan
    volatility = np.sqrt((moves**2).mean())
    return volatility, moves.sum() / (volatility * np.sqrt(len(moves)))


def test_volatility_and_trend_are_those_of_the_rows_behind(examples: Examples) -> None:
    opens = int(np.flatnonzero(np.diff(examples.session))[0]) + 1
    rows = np.array([0, 3, 4, 5, 39, 40, 41, 777, opens - 1, opens, opens + 4, opens + 5, len(examples.mid) - 1])
    found = np.stack(behind(examples, rows, WINDOW, SHORTEST), axis=1)
    np.testing.assert_allclose(found, [slowly(examples, row) for row in rows.tolist()], rtol=1e-6)
    assert np.isnan(found[[0, 1, 2, 9, 10]]).all()


@pytest.mark.parametrize("row", [500, 2_000, 5_000])
def test_no_later_price_has_a_say(examples: Examples, row: int) -> None:
    later = examples.mid.copy()
    later[row + 1 :] *= 1.7
    rows = np.arange(row - 100, row + 1)
    for one, other in zip(
        behind(examples, rows, WINDOW, SHORTEST),
        behind(replace(examples, mid=later), rows, WINDOW, SHORTEST),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_limits_are_fixed_on_the_training_rows(examples: Examples) -> None:
    fold = examples.folds[0]
    limits = Limits.of(examples, fold)
    assert limits is not None
    assert (limits.window, limits.shortest) == (HORIZONS * 5, 5)
    volatility, trend = behind(examples, fold.rows.train, limits.window, limits.shortest)
    known = np.isfinite(volatility)
    assert (volatility[known] <= limits.volatility[0]).mean() == pytest.approx(1 / 3, abs=0.01)
    assert (volatility[known] > limits.volatility[1]).mean() == pytest.approx(1 / 3, abs=0.01)
    assert (np.abs(trend[np.isfinite(trend)]) <= limits.trend).mean() == pytest.approx(1 / 3, abs=0.01)
    later = examples.mid.copy()
    later[fold.rows.test] *= np.random.default_rng(0).uniform(0.9, 1.1, len(fold.rows.test))
    assert Limits.of(replace(examples, mid=later), fold) == limits


def test_a_price_that_stands_still_has_no_regime(examples: Examples) -> None:
    still = replace(examples, mid=np.full(len(examples.mid), 7.0))
    assert Limits.of(still, examples.folds[0]) is None
    holes = examples.mid.copy()
    holes[10:20] = np.nan
    volatility, _ = behind(replace(examples, mid=holes), np.array([15, 50]), WINDOW, SHORTEST)
    assert np.isfinite(volatility).all()


def placed(examples: Examples, count: int) -> Placed:
    """The first rows of the last fold, judged by who knows every answer."""
    fold = examples.published
    rows = fold.rows.test[:count]
    said = Prediction(examples.classes(rows, fold.threshold), examples.ret[rows])
    return Placed.of(examples, fold, rows, said.score, Outcome.of(said, rows, examples, fold.threshold, 0.0))


def test_few_rows_have_their_count_and_no_number(examples: Examples) -> None:
    few = by_regime([placed(examples, 200)], 7)
    assert [row["regime"] for row in few] == list(REGIMES)
    assert sum(row["rows"] for row in few) == 2 * 200
    assert all(0 <= row["n_eff"] < 50 for row in few)
    for key in ("ic", "ic_interval", "hit_rate", "pnl_bps"):
        assert {row[key] for row in few} == {None}
    whole = by_regime([placed(examples, 2_600)], 7)
    assert all(row["n_eff"] >= 50 for row in whole if row["ic"] is not None)
    told = [row for row in whole if row["ic"] is not None]
    assert told
    assert all(row["ic"] == pytest.approx(1.0) and row["hit_rate"] == 1.0 for row in told)

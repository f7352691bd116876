"""In which market a model is right: its numbers by volatility (terciles) and by trend (down, flat, up).

A row's regime is what an engine knew at that row: the volatility of the rows behind it, and how far the price came over
them, measured in that volatility. Where one regime ends and the next begins is fixed on the fold's training rows alone:
the terciles of their volatility, and a flat band that holds a third of their trends. The window behind a row is
`HORIZONS` label horizons long, in rows, as long as horizons are among the training rows; a row with less than one
horizon of its session behind it has no regime. Letters: N rows of the table, n rows judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from market.jumps import priced
from market.labels import flat_threshold
from training.examples import Examples, FloatArray, IntArray, LabelledFold
from training.intervals import Resampling, cell_starts, ratio
from training.metrics import Outcome, effective_rows, rank_correlation, rank_products

HORIZONS = 20
FLAT_SHARE = 1 / 3
# Fewer independent rows, calls or trades than this in a regime, and no number is given.
MIN_EFFECTIVE = 50
VOLATILITY, TREND = ("low", "middle", "high"), ("down", "flat", "up")
REGIMES = tuple(f"volatility {name}" for name in VOLATILITY) + tuple(f"trend {name}" for name in TREND)


@dataclass(frozen=True)
class Limits:
    """Where a fold's regimes begin: window in rows, the two terciles of volatility, and the flat band of trend."""

    window: int
    shortest: int
    volatility: tuple[float, float]
    trend: float

    @classmethod
    def of(cls, examples: Examples, fold: LabelledFold) -> Limits | None:
        """Fixed on the fold's training rows; None where the price never moved among them."""
        train = fold.rows.train
        shortest = max(1, round(float(np.median(examples.end[train] - train))))
        volatility, trend = behind(examples, train, HORIZONS * shortest, shortest)
        known = volatility[np.isfinite(volatility)]
        if not np.isfinite(trend).any():
            return None
        low, high = (float(each) for each in np.quantile(known, [1 / 3, 2 / 3]))
        return cls(HORIZONS * shortest, shortest, (low, high), flat_threshold(trend, FLAT_SHARE))


def behind(examples: Examples, rows: IntArray, window: int, shortest: int) -> tuple[FloatArray, FloatArray]:
    """Volatility and trend of the `window` rows that end at each of `rows` [n]; NaN where `shortest` are not there.

    Volatility is the root of the mean squared logarithmic return of a row; trend is the return over those rows divided
    by volatility times the root of their number. A row without a price counts as one where nothing moved.
    """
    session_start = np.flatnonzero(np.diff(examples.session, prepend=examples.session[0] - 1))
    own = session_start[np.searchsorted(session_start, rows, side="right") - 1]
    start = np.maximum(rows - window, own)
    count = (rows - start).astype(np.float64)
    moves = _moves(examples, session_start)
    squares, path = (np.concatenate([[0.0], np.cumsum(each)]) for each in (moves**2, moves))
    enough = count >= shortest
    volatility = np.sqrt(np.maximum(ratio(squares[rows + 1] - squares[start + 1], count), 0.0))
    return (
        np.where(enough, volatility, np.nan),
        np.where(enough, ratio(path[rows + 1] - path[start + 1], volatility * np.sqrt(count)), np.nan),
    )


def _moves(examples: Examples, session_start: IntArray) -> FloatArray:
    """Logarithmic return of each row since the last price of its session [N]; 0 for the first one."""
    rows = np.flatnonzero(priced(examples.mid))
    moves = np.zeros(len(examples.mid))
    moves[rows] = np.diff(np.log(examples.mid[rows]), prepend=np.log(examples.mid[rows[:1]]))
    owner = np.searchsorted(session_start, rows, side="right")
    moves[rows[np.flatnonzero(np.diff(owner)) + 1]] = 0.0
    return moves


@dataclass(frozen=True)
class Placed:
    """A fold's judged rows in the order of time, by regime (a mask [n] each), and what the model made of them."""

    masks: Mapping[str, npt.NDArray[np.bool_]]
    at: IntArray
    end: IntArray
    ret: FloatArray
    score: FloatArray
    outcome: Outcome

    @classmethod
    def of(cls, examples: Examples, fold: LabelledFold, rows: IntArray, score: FloatArray, outcome: Outcome) -> Placed:
        """Of the table `rows` [n]; `score` and `outcome` are the model's."""
        limits, at = Limits.of(examples, fold), examples.place(rows)
        turn = np.argsort(at, kind="stable")
        masks = {name: np.zeros(len(rows), dtype=bool) for name in REGIMES}
        if limits is not None:
            masks = _masks(*behind(examples, rows[turn], limits.window, limits.shortest), limits)
        end = examples.place(examples.end[rows])[turn]
        return cls(masks, at[turn], end, examples.ret[rows][turn], score[turn], outcome.take(turn))


def _masks(volatility: FloatArray, trend: FloatArray, limits: Limits) -> dict[str, npt.NDArray[np.bool_]]:
    low, high = limits.volatility
    found = (
        *(volatility <= low, (volatility > low) & (volatility <= high), volatility > high),
        *(trend < -limits.trend, np.abs(trend) <= limits.trend, trend > limits.trend),
    )
    return dict(zip(REGIMES, found, strict=True))


def by_regime(folds: Sequence[Placed], seed: int) -> list[dict[str, Any]]:
    """The report's `regimes`: rows, effective rows, IC with its interval, hit rate and profit of the model in each.

    A number without `MIN_EFFECTIVE` independent observations behind it is None, and so is an interval from too few
    blocks; ranks are taken within the regime's rows of a fold. A trade belongs to the regime that it opened in.
    """
    return [_regime(name, folds, seed) for name in REGIMES]


def _regime(name: str, folds: Sequence[Placed], seed: int) -> dict[str, Any]:
    kept = [(fold, np.flatnonzero(fold.masks[name])) for fold in folds]
    kept = [(fold, rows) for fold, rows in kept if rows.size]
    n_eff = sum(effective_rows(fold.at[rows], fold.end[rows]) for fold, rows in kept)
    ic, interval = _ranked(kept, seed) if n_eff >= MIN_EFFECTIVE else (None, None)
    outcomes = [fold.outcome.take(rows) for fold, rows in kept]
    calls, hits, trades = (
        sum(int(getattr(each, key).sum()) for each in outcomes) for key in ("called", "hit", "traded")
    )
    made = sum(float(each.net_bps.sum()) for each in outcomes)
    return {
        "regime": name,
        "rows": sum(rows.size for _, rows in kept),
        "n_eff": round(n_eff, 1),
        "ic": ic,
        "ic_interval": interval,
        "calls": calls,
        "hit_rate": hits / calls if _called(kept) >= MIN_EFFECTIVE else None,
        "trades": trades,
        "pnl_bps": made / trades if trades >= MIN_EFFECTIVE else None,
    }


def _called(kept: Sequence[tuple[Placed, IntArray]]) -> float:
    """Effective calls: the effective rows of those that were called."""
    called = [(fold, rows[fold.outcome.called[rows]]) for fold, rows in kept]
    return sum(effective_rows(fold.at[rows], fold.end[rows]) for fold, rows in called)


def _ranked(kept: Sequence[tuple[Placed, IntArray]], seed: int) -> tuple[float | None, list[float] | None]:
    """The IC over all folds, weighted by rows, and its interval; None where no fold ranks."""
    if all(rank_correlation(fold.score[rows], fold.ret[rows]) is None for fold, rows in kept):
        return None, None
    cells = []
    for fold, rows in kept:
        starts = cell_starts(fold.at[rows], fold.end[rows])
        products = rank_products(fold.score[rows], fold.ret[rows])
        cells.append(np.column_stack([np.add.reduceat(each, starts) for each in (products, np.ones(rows.size))]))
    sums = np.concatenate(cells)
    found = Resampling.of(len(sums), seed).interval(sums, lambda drawn: ratio(drawn[..., 0], drawn[..., 1]))
    total: FloatArray = sums.sum(axis=0)
    return float(total[0] / total[1]), None if found is None else list(found)

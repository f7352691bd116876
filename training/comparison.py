"""Does a model rank better than its best baseline, or does it only look so? A paired block bootstrap, and the verdict.

Both rank the same out-of-sample rows against the same returns, fold by fold. A rank correlation is the mean over rows
of the product of two standardised ranks, so the difference of two of them is a mean over rows as well. Neighbouring
rows share most of their labels: rows are summed into *cells* of one label horizon, and circular blocks of cells are
drawn with replacement, which keeps what is dependent together (Kuensch, The jackknife and the bootstrap for general
stationary observations, Annals of Statistics 17, 1989; Politis and Romano, A circular block-resampling procedure for
stationary data, 1992). A draw's value is its summed products over its rows; ranks are not taken anew in each draw.
Letters: n rows of a fold, C cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.examples import FloatArray, IntArray
from training.metrics import rank_products

# The name of the model among the predictors of `Cells`.
MODEL = "model"
DRAWS = 2_000
COVERAGE = 0.95
# A block spans a few label horizons at least; longer ones as the data grow, at the rate that Kuensch gives.
MIN_BLOCK_CELLS = 5
# Fewer blocks than this to draw from, and the interval would be narrower than the truth.
MIN_BLOCKS = 10
# Random starts drawn at a time, which bounds the memory.
DRAWN_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Cells:
    """One fold's out-of-sample rows in cells of one label horizon: rows per cell [C], rank products per predictor."""

    rows: FloatArray
    products: Mapping[str, FloatArray]

    @classmethod
    def of(cls, rows: IntArray, end: IntArray, ret: FloatArray, scores: Mapping[str, FloatArray]) -> Cells:
        """From table rows [n], the table rows [n] where their labels end, forward returns and scores by predictor.

        A score that does not rank (constant) has products of zero: an information coefficient of 0.
        """
        starts = cell_starts(rows, end)
        size = np.diff(np.append(starts, len(rows))).astype(np.float64)
        return cls(size, {name: np.add.reduceat(rank_products(score, ret), starts) for name, score in scores.items()})


def cell_starts(rows: IntArray, end: IntArray) -> IntArray:
    """Positions in `rows` [n] where cells begin: each at the first row at or after the end of the label before."""
    following = np.searchsorted(rows, end, side="left").tolist()
    starts, position = [], 0
    while position < len(following):
        starts.append(position)
        position = following[position]
    return np.asarray(starts, dtype=np.int64)


def difference(folds: Sequence[Cells], model: str, other: str, seed: int) -> tuple[float, tuple[float, float] | None]:
    """IC of `model` less that of `other`, pooled over folds by rows, and its 95 % interval.

    The interval is None where there are fewer than MIN_BLOCKS blocks of independent rows.
    """
    sums = np.concatenate([fold.products[model] - fold.products[other] for fold in folds])
    rows = np.concatenate([fold.rows for fold in folds])
    return float(sums.sum() / rows.sum()), _interval(sums, rows, seed)


def _interval(sums: FloatArray, rows: FloatArray, seed: int) -> tuple[float, float] | None:
    """Percentiles of the ratio of summed `sums` to summed `rows` over circular blocks drawn with replacement."""
    length = max(MIN_BLOCK_CELLS, math.ceil(len(sums) ** (1 / 3)))
    blocks = len(sums) // length
    if blocks < MIN_BLOCKS:
        return None
    block_sums, block_rows = _circular(sums, length), _circular(rows, length)
    rng, drawn = np.random.default_rng(seed), []
    at_once = max(1, DRAWN_AT_ONCE // blocks)
    for done in range(0, DRAWS, at_once):
        starts = rng.integers(0, len(sums), (min(at_once, DRAWS - done), blocks))
        drawn.append(block_sums[starts].sum(axis=1) / block_rows[starts].sum(axis=1))
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    return float(low), float(high)


def _circular(values: FloatArray, length: int) -> FloatArray:
    """Sum of the `length` values from each position on, around the end."""
    total = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[:length]]))])
    summed: FloatArray = total[length : length + len(values)] - total[: len(values)]
    return summed


@dataclass(frozen=True)
class Judgement:
    """How a model compares with its best baseline: `outcome` is better, none or worse."""

    outcome: str
    baseline: str
    ic_difference: float
    interval: tuple[float, float] | None
    folds_won: int
    folds: int
    higher_mcc: tuple[str, ...]

    @property
    def words(self) -> str:
        """The outcome in a few words."""
        return {
            "better": "better than every baseline",
            "none": f"no clear difference from {self.baseline}",
            "worse": f"worse than {self.baseline}",
        }[self.outcome]

    def to_json(self) -> dict[str, Any]:
        """The report's `comparison`."""
        return {
            "outcome": self.outcome,
            "words": self.words,
            "baseline": self.baseline,
            "ic_difference": self.ic_difference,
            "ic_difference_95": None if self.interval is None else list(self.interval),
            "folds_won": self.folds_won,
            "folds": self.folds,
        }

    def sentence(self, model: Mapping[str, Any]) -> str:
        """The outcome with the numbers behind it; `model` are the model's pooled metrics."""
        if self.interval is None:
            span = "too few independent rows for an interval"
        else:
            span = f"95 % interval {self.interval[0]:+.3f} to {self.interval[1]:+.3f}"
        parts = [
            f"IC {_signed(model['ic'])}, {self.ic_difference:+.3f} from that of {self.baseline} ({span})",
            f"ahead in {self.folds_won} of {self.folds} folds",
            f"MCC {_signed(model['mcc'])}" + (f", lower than {' and '.join(self.higher_mcc)}" * bool(self.higher_mcc)),
            _paid(model),
        ]
        if model["ranked_folds"] < self.folds:
            parts.insert(1, f"ranked in {model['ranked_folds']} of {self.folds} folds only (IC 0 in the others)")
        return f"{self.words}: {'; '.join(parts)}"


def judge(
    folds: Sequence[Mapping[str, Any]], pooled: Mapping[str, Any], cells: Sequence[Cells], seed: int
) -> Judgement:
    """The model against the baseline with the highest pooled IC.

    `folds` are the report's rows (`metrics`, `baselines`), `pooled` its `model` and `baselines`; `cells` one per fold,
    the model's products under the name MODEL. Better means: the interval of the IC difference lies above 0 and no
    baseline has a higher MCC. Worse: it lies below 0. Anything else is no clear difference.
    """
    model, others = pooled["model"], pooled["baselines"]
    best = max(others, key=lambda name: others[name]["ic"] or 0.0)
    gain, interval = difference(cells, MODEL, best, seed)
    won = sum((fold["metrics"]["ic"] or 0.0) > (fold["baselines"][best]["ic"] or 0.0) for fold in folds)
    ahead = [name for name, other in others.items() if other["mcc"] > model["mcc"]]
    outcome = "none"
    if interval and interval[0] > 0 and not ahead:
        outcome = "better"
    elif interval and interval[1] < 0:
        outcome = "worse"
    return Judgement(outcome, best, gain, interval, won, len(folds), tuple(ahead))


def _signed(value: float | None) -> str:
    return "none" if value is None else f"{value:+.3f}"


def _paid(model: Mapping[str, Any]) -> str:
    pnl = model["pnl_bps"]
    return "no trades" if pnl is None else f"PnL {pnl:+.2f} bp a trade after costs"

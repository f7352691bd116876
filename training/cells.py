"""A fold's out-of-sample rows in cells of one label horizon: what every predictor adds up to in each of them.

Every pooled number of a report is a function of these sums, so that `training/intervals.py` can say how sure it is.
Letters: n rows of a fold, C cells, F folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training.intervals import FloatArray, IntArray, Number, Resampling, cell_starts, ratio
from training.metrics import Outcome, rank_products

# The name of the model among the predictors of `Cells`.
MODEL = "model"
CLASSES = 3
CONFUSION = CLASSES * CLASSES
# Behind the confusion matrices of all folds: what is counted and summed, cell by cell.
SUMS = ("rows", "products", "calls", "hits", "trades", "net_bps")
ROWS, PRODUCTS, CALLS, HITS, TRADES, NET = range(-len(SUMS), 0)


@dataclass(frozen=True)
class Tally:
    """What one predictor's classes came to, by cell: counts [C, 9] of (truth, said), and by name the sums [C]."""

    confusion: FloatArray
    sums: Mapping[str, FloatArray]

    @classmethod
    def of(cls, outcome: Outcome, starts: IntArray) -> Tally:
        """The outcomes of rows in the order of time, in the cells that begin at `starts`."""
        rows = len(outcome.truth)
        cell = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, rows)))
        place = (cell * CLASSES + outcome.truth) * CLASSES + outcome.said
        confusion = np.bincount(place, minlength=len(starts) * CONFUSION).reshape(-1, CONFUSION).astype(np.float64)
        summed = {"calls": outcome.called, "hits": outcome.hit, "trades": outcome.traded, "net_bps": outcome.net_bps}
        return cls(confusion, {name: np.add.reduceat(each.astype(np.float64), starts) for name, each in summed.items()})


@dataclass(frozen=True)
class Cells:
    """Rows per cell [C], and per predictor its summed rank products [C] and its tally."""

    rows: FloatArray
    products: Mapping[str, FloatArray]
    tallies: Mapping[str, Tally] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        rows: IntArray,
        end: IntArray,
        ret: FloatArray,
        scores: Mapping[str, FloatArray],
        outcomes: Mapping[str, Outcome] | None = None,
    ) -> Cells:
        """From places in time [n], the places [n] where labels end, forward returns, and by predictor scores, outcomes.

        A score that does not rank (constant) has products of zero: an information coefficient of 0.
        """
        starts = cell_starts(rows, end)
        size = np.diff(np.append(starts, len(rows))).astype(np.float64)
        products = {name: np.add.reduceat(rank_products(score, ret), starts) for name, score in scores.items()}
        return cls(size, products, {name: Tally.of(each, starts) for name, each in (outcomes or {}).items()})


def pooled_intervals(folds: Sequence[Cells], name: str, pooled: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """By metric the 95 % interval of a predictor's number over all folds; None where there is no number or no interval.

    Each is the interval of exactly what `metrics.pool` gives in `pooled`: macro-F1 and MCC from the confusion matrix of
    each fold, weighted by rows.
    """
    sums, numbers = _side_by_side(folds, name), _numbers(len(folds))
    counted = {"hit_rate": sums[:, CALLS], "pnl_bps": sums[:, TRADES]}
    asked = {key: (each, counted.get(key)) for key, each in numbers.items() if pooled[key] is not None}
    found = Resampling.of(len(sums), seed).intervals(sums, asked)
    return {key: None if found.get(key) is None else list(found[key] or ()) for key in numbers}


def _side_by_side(folds: Sequence[Cells], name: str) -> FloatArray:
    """The sums of all cells, [C, 9 F + 6]: a confusion matrix for each fold, then `SUMS`."""
    parts = []
    for place, fold in enumerate(folds):
        tally = fold.tallies[name]
        matrix = np.zeros((len(fold.rows), CONFUSION * len(folds)))
        matrix[:, CONFUSION * place : CONFUSION * (place + 1)] = tally.confusion
        named = {"rows": fold.rows, "products": fold.products[name], **tally.sums}
        parts.append(np.column_stack([matrix, *(named[each] for each in SUMS)]))
    return np.concatenate(parts)


def _numbers(folds: int) -> dict[str, Number]:
    """Each metric as a function of the sums [..., 9 F + 6]."""

    def weighted(of_fold: Number) -> Number:
        def number(sums: FloatArray) -> FloatArray:
            matrices = sums[..., : CONFUSION * folds].reshape(*sums.shape[:-1], folds, CLASSES, CLASSES)
            rows = matrices.sum(axis=(-2, -1))
            return ratio((of_fold(matrices) * rows).sum(axis=-1), rows.sum(axis=-1))

        return number

    return {
        "macro_f1": weighted(macro_f1),
        "mcc": weighted(matthews),
        "ic": lambda sums: ratio(sums[..., PRODUCTS], sums[..., ROWS]),
        "hit_rate": lambda sums: ratio(sums[..., HITS], sums[..., CALLS]),
        "pnl_bps": lambda sums: ratio(sums[..., NET], sums[..., TRADES]),
    }


def macro_f1(matrices: FloatArray) -> FloatArray:
    """Mean F1 of the classes of confusion matrices [..., 3, 3] (truth, said); 0 for a class that never occurs."""
    right = np.einsum("...kk->...k", matrices)
    both = matrices.sum(axis=-1) + matrices.sum(axis=-2)
    score: FloatArray = np.divide(2 * right, both, out=np.zeros_like(both), where=both > 0).mean(axis=-1)
    return score


def matthews(matrices: FloatArray) -> FloatArray:
    """Matthews' correlation coefficient of confusion matrices [..., 3, 3]; 0 where one side is constant.

    Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, 2004, equation 8.
    """
    truth, said, total = matrices.sum(axis=-1), matrices.sum(axis=-2), matrices.sum(axis=(-2, -1))
    together = np.einsum("...kk->...", matrices) * total - (truth * said).sum(axis=-1)
    spread = (total**2 - (truth**2).sum(axis=-1)) * (total**2 - (said**2).sum(axis=-1))
    found: FloatArray = np.divide(together, np.sqrt(spread), out=np.zeros_like(together), where=spread > 0)
    return found

"""How good a prediction is, each number with the number of independent observations behind it.

Labels over a horizon overlap, so neighbouring rows say nearly the same thing. The *effective* sample size is the sum of
the labels' average uniqueness (Lopez de Prado, Advances in Financial Machine Learning, 2018, section 4.4): a row counts
by the share of its horizon that no other row covers. Letters: n rows judged, N rows of the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from market.labels import DOWN, FLAT, UP
from training.examples import BPS, Examples, FloatArray, IntArray

CALIBRATION_BINS = 10
# What each ratio is weighted by when folds are pooled.
WEIGHTS = {
    "macro_f1": "rows",
    "mcc": "rows",
    "ic": "rows",
    "hit_rate": "calls",
    "pnl_bps": "trades",
    "pnl_gross_bps": "trades",
}
NS_PER_DAY = 86_400 * 10**9
Metrics = dict[str, float | int | None]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Prediction:
    """What one predictor said about n rows: a class, and a score that ranks them (p_up - p_down for a model)."""

    classes: IntArray
    score: FloatArray

    @classmethod
    def of(cls, probabilities: npt.NDArray[np.float32]) -> Prediction:
        """The most likely class, and p_up - p_down, of probabilities [n, 3]."""
        score = probabilities[:, UP].astype(np.float64) - probabilities[:, DOWN]
        return cls(probabilities.argmax(axis=1).astype(np.int64), score)

    def take(self, keep: npt.NDArray[np.bool_]) -> Prediction:
        """Only the rows of a mask [n]."""
        return Prediction(self.classes[keep], self.score[keep])


def effective_rows(rows: IntArray, end: IntArray) -> float:
    """The effective sample size of labels that span the table rows (row, end], both int64 [n].

    0 rows give 0; labels that do not overlap give n.
    """
    if not len(rows):
        return 0.0
    start = int(rows.min())
    change = np.zeros(int(end.max()) - start + 2)
    np.add.at(change, rows - start + 1, 1.0)
    np.add.at(change, end - start + 1, -1.0)
    concurrent = np.cumsum(change)
    share = np.cumsum(np.divide(1.0, concurrent, out=np.zeros_like(concurrent), where=concurrent > 0.5))
    uniqueness = (share[end - start] - share[rows - start]) / (end - rows)
    return float(uniqueness.sum())


def rank_correlation(left: FloatArray, right: FloatArray) -> float | None:
    """Spearman's rank correlation with average ranks for ties; None where one side is constant or not finite."""
    if not (_ranks(left) and _ranks(right)):
        return None
    return float(rank_products(left, right).mean())


def rank_products(left: FloatArray, right: FloatArray) -> FloatArray:
    """Per row [n] the product of both sides' standardised ranks: their mean is the rank correlation.

    Zeros where one side is constant or not finite.
    """
    if not (_ranks(left) and _ranks(right)):
        return np.zeros(len(left))
    return standard_ranks(left) * standard_ranks(right)


def standard_ranks(values: FloatArray) -> FloatArray:
    """Average ranks [n] of values that are not all equal, shifted to mean 0 and scaled to variance 1."""
    from scipy.stats import rankdata

    ranks: FloatArray = rankdata(values) - (len(values) + 1) / 2
    return ranks / float(ranks.std())


def _ranks(values: FloatArray) -> bool:
    return len(values) >= 3 and bool(0 < np.ptp(values) < np.inf)


@dataclass(frozen=True)
class Outcome:
    """What a prediction came to, row by row [n]: the class that came and the one said, and what following it made.

    `called`: up or down was said and the price moved; `hit`: it moved that way; `traded`: a trade opened.
    """

    truth: IntArray
    said: IntArray
    called: Mask
    hit: Mask
    traded: Mask
    net_bps: FloatArray

    @classmethod
    def of(cls, said: Prediction, rows: IntArray, examples: Examples, threshold: float, fee_bps: float) -> Outcome:
        """Of a prediction about table `rows` [n]."""
        ret = examples.ret[rows]
        called = (said.classes != FLAT) & (ret != 0)
        hit = called & (np.sign(ret) == said.classes - FLAT)
        traded, net = np.zeros(len(rows), dtype=bool), np.zeros(len(rows))
        taken, _, made = round_trips(said.classes, rows, examples, fee_bps)
        traded[taken], net[taken] = True, made
        return cls(examples.classes(rows, threshold), said.classes, called, hit, traded, net)

    def take(self, places: IntArray) -> Outcome:
        """Those of some rows, or all in another order."""
        return Outcome(*(getattr(self, each.name)[places] for each in fields(self)))


def evaluate(said: Prediction, rows: IntArray, examples: Examples, threshold: float, fee_bps: float) -> Metrics:
    """Every metric of a prediction about table `rows` [n], under a fold's flat band.

    `ic` is Spearman(score, forward return), `ic_t` that times the root of `n_eff`. `hit_rate` is the share of rows
    where the predicted side is the side the price went, among the `calls`: rows predicted up or down whose price moved.
    Money is in basis points of the price, see `trades`; `days` is the time that the rows cover, see `recorded_days`.
    None where a number does not exist.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    truth, ret = examples.classes(rows, threshold), examples.ret[rows]
    n_eff = effective_rows(examples.place(rows), examples.place(examples.end[rows]))
    ic = rank_correlation(said.score, ret)
    called = (said.classes != FLAT) & (ret != 0)
    hits = np.sign(ret[called]) == said.classes[called] - FLAT
    return {
        "rows": len(rows),
        "n_eff": round(n_eff, 1),
        "macro_f1": float(f1_score(truth, said.classes, labels=range(3), average="macro", zero_division=0)),
        "mcc": float(matthews_corrcoef(truth, said.classes)),
        "ic": ic,
        "ic_t": None if ic is None else ic * math.sqrt(n_eff),
        "hit_rate": float(hits.mean()) if hits.size else None,
        "calls": hits.size,
        "days": recorded_days(rows, examples),
        **trades(said.classes, rows, examples, fee_bps),
    }


def trades(classes: IntArray, rows: IntArray, examples: Examples, fee_bps: float) -> Metrics:
    """Profit of following the prediction, one position at a time, in basis points per round trip.

    A position is opened in the predicted direction at the first row predicted up or down while none is open, crossing
    the half-spread there; it is held until its label's end, and closed crossing the half-spread there; a fee is paid
    on both sides. It fills at the quote that the prediction was made from: latency costs nothing here. Rows predicted
    meanwhile are not traded, so trades do not overlap: `trades` is the effective size.
    """
    _, gross, net = round_trips(classes, rows, examples, fee_bps)
    if not net.size:
        return {"trades": 0, "pnl_bps": None, "pnl_gross_bps": None}
    return {"trades": len(net), "pnl_bps": float(net.mean()), "pnl_gross_bps": float(gross.mean())}


def round_trips(
    classes: IntArray, rows: IntArray, examples: Examples, fee_bps: float
) -> tuple[IntArray, FloatArray, FloatArray]:
    """The trades of `trades`: positions in `rows`, and the profit of each before and after costs, in basis points."""
    taken = one_at_a_time(np.flatnonzero(classes != FLAT), rows, examples.end[rows])
    entry = rows[taken]
    gross = (classes[taken] - FLAT) * examples.ret[entry] * BPS
    net = gross - examples.cost_bps[entry] - examples.cost_bps[examples.end[entry]] - 2 * fee_bps
    return taken, gross, net


def by_fees(pnl_bps: float | None, fee_bps: float) -> dict[str, float | None]:
    """Profit after costs at 0, 1 and 2 times the fee of `pnl_bps`. Which trades are made does not depend on the fee."""
    return {str(times): None if pnl_bps is None else pnl_bps + 2 * fee_bps * (1 - times) for times in (0, 1, 2)}


def recorded_days(rows: IntArray, examples: Examples) -> float | None:
    """The time from the first to the last of the table `rows` of each session, in days of 24 hours; None without times.

    Nights and weekends between sessions do not count; several symbols at one time count each.
    """
    if examples.ts_ns is None or not len(rows):
        return None
    first = np.flatnonzero(np.diff(examples.session[rows], prepend=examples.session[rows[0]] - 1))
    last = np.append(first[1:], len(rows)) - 1
    return float((examples.ts_ns[rows[last]] - examples.ts_ns[rows[first]]).sum()) / NS_PER_DAY


def one_at_a_time(candidates: IntArray, rows: IntArray, end: IntArray) -> IntArray:
    """Those of `candidates` (positions into `rows`) that start when the one taken before has ended."""
    taken, free = [], -1
    for position in candidates.tolist():
        if rows[position] >= free:
            taken.append(position)
            free = int(end[position])
    return np.asarray(taken, dtype=np.int64)


def calibration(p_up: FloatArray, went_up: npt.NDArray[np.bool_]) -> list[dict[str, float | int]]:
    """Reliability of P(up): per bin of equal width, its rows, the mean predicted and the observed share of "up"."""
    bins = np.minimum((p_up * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    return [
        {
            "low": index / CALIBRATION_BINS,
            "high": (index + 1) / CALIBRATION_BINS,
            "rows": int((bins == index).sum()),
            "predicted": float(p_up[bins == index].mean()),
            "observed": float(went_up[bins == index].mean()),
        }
        for index in np.unique(bins).tolist()
    ]


def pool(folds: Sequence[Metrics]) -> dict[str, Any]:
    """All folds as one: what `evaluate` says of each, pooled as if their rows, calls and trades lay in one heap.

    `rows`, `n_eff`, `calls`, `trades` and `days` are sums; `turnover_per_row` and `turnover_per_day` are round trips
    for each row judged and for each 24 hours recorded. `macro_f1`, `mcc` and `ic` are means weighted by rows,
    `hit_rate` by calls, `pnl_bps` and `pnl_gross_bps` by trades (total profit over total trades);
    `ic_t = ic * sqrt(n_eff)`. A fold without an IC, where the predictor does not rank, counts as an IC of 0;
    `ranked_folds` says how many have one. None where no fold has the number.
    """
    summary: dict[str, Any] = {key: _total(folds, key) for key in ("rows", "n_eff", "calls", "trades", "days")}
    for key, weight in WEIGHTS.items():
        summary[key] = _weighted(folds, key, weight)
    summary["ic_t"] = None if summary["ic"] is None else summary["ic"] * math.sqrt(summary["n_eff"])
    summary["turnover_per_row"] = summary["trades"] / summary["rows"] if summary["rows"] else None
    summary["turnover_per_day"] = summary["trades"] / summary["days"] if summary["days"] else None
    summary["ranked_folds"] = sum(fold["ic"] is not None for fold in folds)
    return summary


def _total(folds: Sequence[Metrics], key: str) -> float:
    return sum(fold.get(key) or 0 for fold in folds)


def _weighted(folds: Sequence[Metrics], key: str, weight: str) -> float | None:
    if all(fold[key] is None for fold in folds):
        return None
    return math.fsum((fold[key] or 0.0) * (fold[weight] or 0) for fold in folds) / _total(folds, weight)

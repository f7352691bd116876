"""How good a prediction is, each number with the number of independent observations behind it.

Labels over a horizon overlap, so neighbouring rows say nearly the same thing. The *effective* sample size is the sum of
the labels' average uniqueness (Lopez de Prado, Advances in Financial Machine Learning, 2018, section 4.4): a row counts
by the share of its horizon that no other row covers. Letters: n rows judged, N rows of the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from market.labels import DOWN, FLAT, UP
from training.examples import BPS, Examples, FloatArray, IntArray

CALIBRATION_BINS = 10
Metrics = dict[str, float | int | None]


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
    from scipy.stats import rankdata

    if len(left) < 3 or not (0 < np.ptp(left) < np.inf and 0 < np.ptp(right) < np.inf):
        return None
    return float(np.corrcoef(rankdata(left), rankdata(right))[0, 1])


def evaluate(said: Prediction, rows: IntArray, examples: Examples, threshold: float, fee_bps: float) -> Metrics:
    """Every metric of a prediction about table `rows` [n], under a fold's flat band.

    `ic` is Spearman(score, forward return), `ic_t` that times the root of `n_eff`. `hit_rate` is the share of rows
    where the predicted side is the side the price went, among rows predicted up or down whose price moved. Money is
    in basis points of the price, see `trades`. None where a number does not exist.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    truth, ret = examples.classes(rows, threshold), examples.ret[rows]
    n_eff = effective_rows(rows, examples.end[rows])
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
        "hit_n_eff": round(effective_rows(rows[called], examples.end[rows[called]]), 1),
        **trades(said.classes, rows, examples, fee_bps),
    }


def trades(classes: IntArray, rows: IntArray, examples: Examples, fee_bps: float) -> Metrics:
    """Profit of following the prediction, one position at a time, in basis points per round trip.

    A position is opened in the predicted direction at the first row predicted up or down while none is open, crossing
    the half-spread there; it is held until its label's end, and closed crossing the half-spread there; a fee is paid
    on both sides. Rows predicted meanwhile are not traded, so trades do not overlap: `trades` is the effective size.
    """
    taken = one_at_a_time(np.flatnonzero(classes != FLAT), rows, examples.end[rows])
    if not taken.size:
        return {"trades": 0, "pnl_bps": None, "pnl_gross_bps": None, "pnl_total_bps": 0.0, "pnl_t": None}
    entry = rows[taken]
    gross = (classes[taken] - FLAT) * examples.ret[entry] * BPS
    net = gross - examples.cost_bps[entry] - examples.cost_bps[examples.end[entry]] - 2 * fee_bps
    spread = float(net.std(ddof=1)) if len(net) > 1 else 0.0
    return {
        "trades": len(net),
        "pnl_bps": float(net.mean()),
        "pnl_gross_bps": float(gross.mean()),
        "pnl_total_bps": float(net.sum()),
        "pnl_t": float(net.mean()) / spread * math.sqrt(len(net)) if spread else None,
    }


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


def mean_over_folds(folds: list[Metrics]) -> dict[str, Any]:
    """The mean of each ratio over the folds that have it, and the sum of each count."""
    counts = {"rows", "n_eff", "hit_n_eff", "trades", "pnl_total_bps"}
    summary: dict[str, Any] = {}
    for key in folds[0]:
        values = [value for fold in folds if (value := fold[key]) is not None]
        total = math.fsum(values)
        summary[key] = (total if key in counts else total / len(values)) if values else None
    return summary

"""Does a model rank better than its best baseline, or does it only look so? A paired block bootstrap, and the verdict.

Both rank the same out-of-sample rows against the same returns, fold by fold. A rank correlation is the mean over rows
of the product of two standardised ranks, so the difference of two of them is a mean over rows as well, and has the
interval of one (`training/intervals.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.cells import MODEL, Cells
from training.intervals import Interval, Resampling, ratio


def difference(folds: Sequence[Cells], model: str, other: str, seed: int) -> tuple[float, Interval | None]:
    """IC of `model` less that of `other`, pooled over folds by rows, and its 95 % interval.

    The interval is None where there are too few blocks of independent rows.
    """
    sums = np.concatenate([fold.products[model] - fold.products[other] for fold in folds])
    rows = np.concatenate([fold.rows for fold in folds])
    both = np.stack([sums, rows], axis=1)
    interval = Resampling.of(len(rows), seed).interval(both, lambda drawn: ratio(drawn[..., 0], drawn[..., 1]))
    return float(sums.sum() / rows.sum()), interval


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

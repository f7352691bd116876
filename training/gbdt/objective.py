"""What the trees of a task learn: XGBoost's objective, the target of each row, and the metric that stops it.

Scale, grades and flat band come from the training rows alone. Letters: n rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tickserve.config import GbdtSettings
from training.examples import Examples, FloatArray, IntArray

REGRESSION = {"squared": ("reg:squarederror", "rmse"), "pseudo_huber": ("reg:pseudohubererror", "mphe")}
RANKING = {"ndcg": "rank:ndcg", "pairwise": "rank:pairwise"}


@dataclass(frozen=True)
class Objective:
    """`parameters` for XGBoost, the `target` [n] of table rows [n], and the `metric`, which is `raised` or lowered.

    `group` gives the group of each of increasing table rows, int64 [n] and never falling; None where rows stand alone.
    """

    parameters: dict[str, Any]
    metric: str
    target: Callable[[IntArray], npt.NDArray[Any]]
    raised: bool = False
    group: Callable[[IntArray], IntArray] | None = None

    def loss(self, value: float) -> float:
        """The metric as something to lower."""
        return -value if self.raised else value


def objective_of(examples: Examples, train: IntArray, threshold: float, settings: GbdtSettings) -> Objective:
    """The objective of `settings.task`, fitted on the table rows `train` and the flat band `threshold`."""
    if settings.task == "regression":
        return _regression(examples, train, settings)
    if settings.task == "ranking":
        return _ranking(examples, train, settings)
    parameters = {"objective": "multi:softprob", "num_class": 3}
    return Objective(parameters, "mlogloss", lambda rows: examples.classes(rows, threshold))


def _regression(examples: Examples, train: IntArray, settings: GbdtSettings) -> Objective:
    """The forward return in units of its mean size over the training rows, where the losses' defaults make sense."""
    name, metric = REGRESSION[settings.regression_loss]
    # Never 0: `prepare` refuses training rows whose price does not move.
    scale = float(np.abs(examples.ret[train]).mean())
    return Objective({"objective": name}, metric, lambda rows: examples.ret[rows] / scale)


def _ranking(examples: Examples, train: IntArray, settings: GbdtSettings) -> Objective:
    """Which of neighbouring moments the price rises most after; grades are cut at quantiles of the training returns."""
    shares = np.linspace(0, 1, settings.ranking_grades + 1)[1:-1]
    edges: FloatArray = np.quantile(examples.ret[train], shares)
    return Objective(
        {"objective": RANKING[settings.ranking_loss]},
        "ndcg",
        lambda rows: np.searchsorted(edges, examples.ret[rows], side="right"),
        raised=True,
        group=lambda rows: blocks(rows, examples.session, settings.ranking_block_rows),
    )


def blocks(rows: IntArray, session: npt.NDArray[np.int32], size: int) -> IntArray:
    """Number from 0 of the block of each of increasing table `rows` [n]: `size` table rows of one session.

    Blocks follow each other and do not overlap, so no moment is compared with one far from it.
    """
    block, day = rows // size, session[rows]
    changes = (np.diff(block) != 0) | (np.diff(day) != 0)
    numbers: IntArray = np.concatenate([[0], np.cumsum(changes)])[: len(rows)].astype(np.int64)
    return numbers

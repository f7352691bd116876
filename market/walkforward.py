"""Purged, embargoed walk-forward: train on the past, stop early on its tail, test on what comes next.

    fold 1   train ........ | validation |  test
    fold 2   train .................... | validation |  test
    fold 3   train ................................ | validation |  test

The rows are cut into `folds + 1` equal blocks; fold k tests block k + 1 and learns from every block before it. At each
"|" the earlier side is *purged* of labels that end at or after the later side begins, and an *embargo* of time is kept
besides. Lopez de Prado, Advances in Financial Machine Learning (2018), chapter 7. Letters: N rows, in time order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from market.labels import check_time_order
from tickserve.errors import InsufficientDataError, SchemaError

IntArray = npt.NDArray[np.int64]
VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class Fold:
    """Row indices, int64 and increasing: what is learned from, what stops the learning, what is out of sample."""

    train: IntArray
    validation: IntArray
    test: IntArray


def purged_walk_forward(
    ts_ns: IntArray, label_end_ts_ns: IntArray, folds: int, embargo_ns: int, min_train_rows: int
) -> list[Fold]:
    """`folds` expanding folds over N labelled rows (`ts_ns` int64 [N], and when each row's label is known).

    In every fold `max(label_end[train]) + embargo < ts[validation[0]]`, and the same between validation and test.
    Raises InsufficientDataError when a fold keeps fewer than `min_train_rows` training rows, or no validation row.
    """
    check_time_order(ts_ns)
    if (label_end_ts_ns < ts_ns).any():
        raise SchemaError("a label ends before its row", field="label_end_ts_ns", expected=">= ts_ns")
    edges = np.linspace(0, len(ts_ns), folds + 2).astype(np.int64)
    return [
        _fold(ts_ns, label_end_ts_ns, (int(edges[k]), int(edges[k + 1])), embargo_ns, min_train_rows)
        for k in range(1, folds + 1)
    ]


def _fold(ts_ns: IntArray, label_end: IntArray, test: tuple[int, int], embargo_ns: int, min_train_rows: int) -> Fold:
    begin, end = test
    if begin >= end:
        raise InsufficientDataError(
            "too few labelled rows for the folds", field="validation.folds", was=f"{len(ts_ns)}"
        )
    learn = _before(np.arange(begin), label_end, int(ts_ns[begin]) - embargo_ns)
    tail = max(1, round(len(learn) * VALIDATION_SHARE))
    validation = learn[len(learn) - tail :]
    if not len(validation):
        raise _too_few(0, min_train_rows)
    train = _before(learn[: len(learn) - tail], label_end, int(ts_ns[validation[0]]) - embargo_ns)
    if len(train) < min_train_rows:
        raise _too_few(len(train), min_train_rows)
    return Fold(train=train, validation=validation, test=np.arange(begin, end))


def _before(rows: IntArray, label_end: IntArray, limit_ns: int) -> IntArray:
    kept: IntArray = rows[label_end[rows] < limit_ns]
    return kept


def _too_few(was: int, needed: int) -> InsufficientDataError:
    return InsufficientDataError(
        "too few training rows in a fold after purging and embargo",
        field="validation.min_train_rows",
        expected=f"at least {needed} rows",
        was=f"{was}",
        hint="use a longer recording, fewer folds or a shorter horizon",
    )

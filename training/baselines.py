"""What a model has to beat: the majority class, the last move, and a linear model on a handful of columns.

Each is fitted on a fold's training rows only and judged on the same test rows as the models. Letters: n rows.
"""

from __future__ import annotations

import warnings

import numpy as np

from market import labels
from training.examples import Examples, FloatArray, IntArray, LabelledFold, evenly
from training.metrics import Prediction

# The linear baseline has few columns: more rows than this change nothing but the time it takes.
LINEAR_ROWS = 20_000
Z_LIMIT = 10.0


def majority(examples: Examples, fold: LabelledFold) -> Prediction:
    """Always the class seen most often in training; its score says nothing."""
    classes = examples.classes(fold.rows.train, fold.threshold)
    most = int(np.bincount(classes, minlength=3).argmax())
    n = len(fold.rows.test)
    return Prediction(np.full(n, most, dtype=np.int64), np.zeros(n))


def last_move(examples: Examples, fold: LabelledFold) -> Prediction:
    """The next move is the last one, over the same horizon and with the same flat band."""
    moved = examples.trailing[fold.rows.test]
    return Prediction(labels.to_classes(moved, fold.threshold), moved)


def linear_columns(columns: tuple[str, ...]) -> IntArray:
    """Positions of what the linear baseline sees: the imbalances of a book, or the returns of bars; else everything."""
    for wanted in ("imbalance", "bar_return", "return"):
        found = [index for index, name in enumerate(columns) if wanted in name]
        if found:
            return np.asarray(found, dtype=np.int64)
    return np.arange(len(columns), dtype=np.int64)


def linear(examples: Examples, fold: LabelledFold, columns: tuple[str, ...]) -> Prediction:
    """Multinomial logistic regression on `linear_columns`, scaled by the training rows; missing is the mean."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    chosen = linear_columns(columns)
    train = evenly(fold.rows.train, LINEAR_ROWS)
    seen = examples.features[np.ix_(train, chosen)].astype(np.float64)
    mean, std = column_scale(seen)
    model = LogisticRegression(max_iter=200)
    with warnings.catch_warnings():
        # A baseline that stops at 200 steps is judged as it stands.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(_scaled(seen, mean, std), examples.classes(train, fold.threshold))
    judged = examples.features[np.ix_(fold.rows.test, chosen)].astype(np.float64)
    probabilities = np.zeros((len(judged), 3), dtype=np.float32)
    probabilities[:, model.classes_] = model.predict_proba(_scaled(judged, mean, std))
    return Prediction.of(probabilities)


def column_scale(rows: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation [F] of the finite values of each column; 0 and 1 where there is nothing to scale."""
    finite = np.isfinite(rows)
    count = np.maximum(finite.sum(axis=0), 1)
    mean = np.where(finite, rows, 0.0).sum(axis=0) / count
    std = np.sqrt((np.where(finite, rows - mean, 0.0) ** 2).sum(axis=0) / count)
    # Below float32's resolution of the mean, spread is rounding: such a column is constant.
    return mean, np.where(std > np.maximum(1e-6 * np.abs(mean), 1e-12), std, 1.0)


def _scaled(rows: FloatArray, mean: FloatArray, std: FloatArray) -> FloatArray:
    scaled = np.clip((rows - mean) / std, -Z_LIMIT, Z_LIMIT)
    return np.where(np.isfinite(scaled), scaled, 0.0)


def predict_all(examples: Examples, fold: LabelledFold, columns: tuple[str, ...]) -> dict[str, Prediction]:
    """Every baseline's prediction of the fold's test rows, by name."""
    return {
        "majority": majority(examples, fold),
        "last_move": last_move(examples, fold),
        "linear": linear(examples, fold, columns),
    }


def judged_mask(kept: IntArray, fold: LabelledFold) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of the fold's test rows are among `kept` (a net cannot judge a row without a full window)."""
    return np.isin(fold.rows.test, kept, assume_unique=True)

"""What ranges are calibrated by: real training rows of the fold, and never none, or one over and over."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from market.walkforward import Fold
from tickserve.errors import InsufficientDataError
from training.compress.quantization import calibration_rows
from training.compress.recipe import QuantizeStep
from training.compress.teacher import Data
from training.nets import NetJob

STEP = QuantizeStep(kind="quantize", method="static", calibration_rows=64)


def job_of(data: Data, features: np.ndarray) -> NetJob:
    return NetJob("mlp", replace(data.examples, features=features), data.config.mlp, 0, data.config.trainer)


def test_calibration_is_by_training_rows_alone(data: Data) -> None:
    fold = data.examples.folds[0]
    rows = calibration_rows(job_of(data, data.examples.features), fold, STEP)
    assert len(rows) == STEP.calibration_rows
    assert set(rows.tolist()) <= set(fold.rows.train.tolist())


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_constant_calibration_set_is_refused(data: Data, value: float) -> None:
    job = job_of(data, np.full_like(data.examples.features, value))
    with pytest.raises(InsufficientDataError, match="at least 32 that differ, was 1"):
        calibration_rows(job, data.examples.folds[0], STEP)


def test_an_empty_calibration_set_is_refused(data: Data) -> None:
    fold = data.examples.folds[0]
    none = np.empty(0, np.int64)
    empty = replace(fold, rows=Fold(none, fold.rows.validation, fold.rows.test))
    with pytest.raises(InsufficientDataError, match="was 0"):
        calibration_rows(job_of(data, data.examples.features), empty, STEP)

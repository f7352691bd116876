"""The accuracy that `elementary.py` states for its exp and log, against a library in higher precision."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tickserve.features.elementary import FADED, SMALLEST, exp_minus, log_positive
from tickserve.features.jit import njit

Floats = npt.NDArray[np.float64]


@njit
def _exp(values: Floats, out: Floats) -> None:
    for index in range(len(values)):
        out[index] = exp_minus(values[index])


@njit
def _log(values: Floats, out: Floats) -> None:
    for index in range(len(values)):
        out[index] = log_positive(values[index])


def ulps(values: Floats, exact: npt.NDArray[np.longdouble]) -> float:
    return float(np.max(np.abs(values.astype(np.longdouble) - exact) / np.spacing(np.abs(exact).astype(np.float64))))


def test_exp_is_within_three_units() -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate(
        [rng.uniform(0, FADED, 100_000), rng.uniform(0, 1, 100_000), 10.0 ** -rng.uniform(0, 18, 50_000)]
    )
    out = np.empty_like(values)
    _exp(values, out)
    assert ulps(out, np.exp(-values.astype(np.longdouble))) <= 3
    edges = np.array([0.0, FADED, FADED + 1, math.inf])
    result = np.empty_like(edges)
    _exp(edges, result)
    assert result.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_log_is_within_one_unit() -> None:
    rng = np.random.default_rng(2)
    values = np.concatenate([10.0 ** rng.uniform(-299, 307, 100_000), 1 + rng.uniform(-0.3, 0.4, 100_000)])
    out = np.empty_like(values)
    _log(values, out)
    assert ulps(out, np.log(values.astype(np.longdouble))) <= 1
    edges = np.array([1.0, 0.0, -1.0, math.inf, math.nan, SMALLEST / 10])
    result = np.empty_like(edges)
    _log(edges, result)
    assert result[0] == 0.0
    assert np.isnan(result[1:]).all()

"""The link from a margin to probabilities, fitted by maximum likelihood on rows the trees did not grow on.

The proportional-odds model (`models/ordinal.py`) has three numbers: slope and two cut points. Letters: n rows.
"""

from __future__ import annotations

import math

import numpy as np

from market.labels import DOWN, UP
from models.ordinal import OrdinalLink, Rows, logistic
from training.examples import FloatArray, IntArray

# Of margins scaled to variance 1. A margin that ranks the rows backwards gets the smallest slope, not a negative one:
# the score has to rise with the margin. A class the rows do not hold leaves its cut point at the bound.
SLOPES, CUTS, GAPS = (1e-3, 20.0), (-15.0, 15.0), (1e-2, 30.0)
SMALLEST = 1e-12


def fit_link(margins: Rows, classes: IntArray) -> OrdinalLink:
    """The likeliest link of margins float32 [n] and the classes [n] that came."""
    from scipy.optimize import minimize

    values = margins.astype(np.float64)
    center, spread = float(values.mean()), float(values.std())
    scale = spread if spread > SMALLEST else 1.0
    bounds = [tuple(map(math.log, SLOPES)), CUTS, tuple(map(math.log, GAPS))]
    found = minimize(
        _likelihood,
        _start(classes),
        args=((values - center) / scale, classes),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
    )
    slope, low, gap = math.exp(found.x[0]) / scale, float(found.x[1]), math.exp(found.x[2])
    return OrdinalLink.of(slope, low + slope * center, low + gap + slope * center)


def _start(classes: IntArray) -> FloatArray:
    """A margin that says next to nothing, and the shares of the classes."""
    down, up = (np.clip((classes == side).mean(), 0.01, 0.98) for side in (DOWN, UP))
    low, high = math.log(down / (1 - down)), math.log((1 - up) / up)
    return np.array([math.log(0.1), low, math.log(max(high - low, GAPS[0]))])


def _likelihood(parameters: FloatArray, values: FloatArray, classes: IntArray) -> tuple[float, FloatArray]:
    """Mean negative log-likelihood at (log slope, low, log gap), and its gradient [3]."""
    slope, low, gap = math.exp(parameters[0]), parameters[1], math.exp(parameters[2])
    margin = slope * values
    below, under = logistic(low - margin), logistic(low + gap - margin)  # P(down), P(down or flat)
    chances = np.choose(classes, [below, under - below, 1.0 - under])
    likely = np.maximum(chances, SMALLEST)
    of_low = np.choose(classes, [below * (1 - below), -below * (1 - below), 0.0]) / likely
    of_high = np.choose(classes, [0.0, under * (1 - under), -under * (1 - under)]) / likely
    gradient = np.array([-(of_low + of_high) @ margin, (of_low + of_high).sum(), of_high.sum() * gap])
    return float(-np.log(likely).mean()), -gradient / len(values)

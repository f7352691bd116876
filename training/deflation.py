"""Whether a score still stands out when it is the best of several tried: its probability, deflated.

The best of N worthless trials looks good by luck alone. Its expected score, in standard errors of one, is

    E[max of N] = (1 - g) Phi^-1(1 - 1/N) + g Phi^-1(1 - 1/(N e)),    g = 0.5772... (Euler-Mascheroni),  0 for N = 1

and the deflated probability is that of a lower score than the one found, were the truth that bar and not 0 (Bailey and
Lopez de Prado, The deflated Sharpe ratio, Journal of Portfolio Management 40(5), 2014, equations 1 and 2):

    of the IC:      Phi(t - E[max of N]),  t = IC sqrt(n_eff)
    of the Sharpe:  Phi((SR - SR0) sqrt(T - 1) / sqrt(1 - skew SR + (kurtosis - 1) / 4 SR^2)),
                    SR0 = E[max of N] / sqrt(T - 1)

SR is the mean over the standard deviation of the T trades' profit after costs, not annualised. The paper takes the
variance of the trials' own Sharpe ratios; here it is 1 / (T - 1), that of a trial without skill, since only the number
of trials is known. Trials that resemble each other count as if they did not, which sets the bar too high.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.intervals import FloatArray

EULER_MASCHERONI = 0.5772156649015329
# Skew and kurtosis of fewer trades are noise.
MIN_TRADES = 30


def expected_maximum(trials: int) -> float:
    """The expected highest of so many independent standard normal scores (0 for one)."""
    from scipy.stats import norm

    if trials <= 1:
        return 0.0
    near, far = norm.ppf(1 - 1 / trials), norm.ppf(1 - 1 / (trials * math.e))
    return float((1 - EULER_MASCHERONI) * near + EULER_MASCHERONI * far)


def of_statistic(statistic: float, trials: int) -> float:
    """The deflated probability of a t-statistic that is the best of `trials`."""
    from scipy.stats import norm

    return float(norm.cdf(statistic - expected_maximum(trials)))


@dataclass(frozen=True)
class Sharpe:
    """Mean over standard deviation of T trades' profits, and the moments its error depends on."""

    ratio: float
    trades: int
    skew: float
    kurtosis: float

    @classmethod
    def of(cls, profits: FloatArray) -> Sharpe | None:
        """Of profits [T]; None for fewer than MIN_TRADES, or where all are the same."""
        if len(profits) < MIN_TRADES or not np.ptp(profits):
            return None
        centred = profits - profits.mean()
        spread = float(np.sqrt((centred**2).mean()))
        third, fourth = (float((centred**power).mean()) / spread**power for power in (3, 4))
        return cls(float(profits.mean()) / float(profits.std(ddof=1)), len(profits), third, fourth)

    def deflated(self, trials: int) -> float:
        """The deflated probability that the ratio is above 0, as the best of `trials`."""
        from scipy.stats import norm

        # Below 0 only for moments that no sample has together: kurtosis >= skew^2 + 1.
        spread = 1 - self.skew * self.ratio + (self.kurtosis - 1) / 4 * self.ratio**2
        steps = self.ratio * math.sqrt(self.trades - 1) - expected_maximum(trials)
        return float(norm.cdf(steps / math.sqrt(max(spread, 1e-12))))


def deflated(ic_t: float | None, profits: FloatArray, trials: int) -> dict[str, Any]:
    """The report's `deflation`: the bar that `trials` set, and what the IC and the trades' Sharpe are against it.

    `ic_t` is the IC's t-statistic from effective rows, `profits` [T] are in basis points after costs. A probability is
    None where there is no statistic.
    """
    sharpe = Sharpe.of(profits)
    return {
        "trials": trials,
        "expected_maximum": expected_maximum(trials),
        "ic_probability": None if ic_t is None else of_statistic(ic_t, trials),
        "sharpe": None if sharpe is None else sharpe.ratio,
        "sharpe_trades": len(profits),
        "sharpe_probability": None if sharpe is None else sharpe.deflated(trials),
    }

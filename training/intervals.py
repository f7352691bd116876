"""The uncertainty of every number in a report: one circular block bootstrap, of whatever is a function of sums.

An information coefficient is summed rank products over rows, a hit rate hits over calls, a profit money over trades,
MCC and macro-F1 functions of the counts of a confusion matrix: each is a function of sums over rows. Neighbouring rows
share most of their labels, so rows are summed into *cells* of one label horizon, and circular blocks of cells are drawn
with replacement, which keeps what is dependent together (Kuensch, The jackknife and the bootstrap for general
stationary observations, Annals of Statistics 17, 1989; Politis and Romano, A circular block-resampling procedure for
stationary data, 1992). The number of a draw is the function of the draw's sums; ranks, flat bands and models are not
fitted anew.

The interval is the percentile one, widened for few blocks: a percentile interval of B draws with replacement is too
narrow by sqrt((B - 1) / B) and knows no Student's t, so its tails are taken at Phi(-sqrt(B / (B - 1)) t(B - 1))
(Hesterberg, What teachers should know about the bootstrap, American Statistician 69, 2015, section 5.2: the expanded
percentile interval). Letters: C cells, B blocks, K sums, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.validation import TOO_FEW

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Interval = tuple[float, float]
# From sums [..., K] to the number [...]; NaN where a draw has none.
Number = Callable[[FloatArray], FloatArray]

DRAWS = 2_000
COVERAGE = 0.95
# A block spans a few label horizons at least; longer ones as the data grow, at the rate that Kuensch gives.
MIN_BLOCK_CELLS = 5
# Fewer blocks than this to draw from, and no interval is worth its name.
MIN_BLOCKS = 10
# Random starts drawn at a time, which bounds the memory.
DRAWN_AT_ONCE = 1_000_000


def cell_starts(rows: IntArray, end: IntArray) -> IntArray:
    """Positions in `rows` [n] where cells begin: each at the first row at or after the end of the label before."""
    following = np.searchsorted(rows, end, side="left").tolist()
    starts, position = [], 0
    while position < len(following):
        starts.append(position)
        position = following[position]
    return np.asarray(starts, dtype=np.int64)


@dataclass(frozen=True)
class Resampling:
    """How C cells are drawn: blocks of `length` cells, `blocks` of them a draw, from `seed`."""

    cells: int
    length: int
    blocks: int
    seed: int

    @classmethod
    def of(cls, cells: int, seed: int) -> Resampling:
        """The resampling of so many cells."""
        length = max(MIN_BLOCK_CELLS, math.ceil(cells ** (1 / 3)))
        return cls(cells, length, cells // length, seed)

    @property
    def enough(self) -> bool:
        """Whether there are blocks enough for an interval."""
        return self.blocks >= MIN_BLOCKS

    def interval(self, sums: FloatArray, number: Number, counted: FloatArray | None = None) -> Interval | None:
        """The 95 % interval of `number` of the sums of cells [C, K].

        `counted` [C] is what the number counts where that is not rows (calls, trades). None where fewer than MIN_BLOCKS
        blocks hold any, or no draw has the number.
        """
        return self.intervals(sums, {"number": (number, counted)})["number"]

    def intervals(
        self, sums: FloatArray, numbers: dict[str, tuple[Number, FloatArray | None]]
    ) -> dict[str, Interval | None]:
        """`interval` of several numbers, all from the same draws."""
        found: dict[str, Interval | None] = dict.fromkeys(numbers)
        asked = {name: each for name, (each, counted) in numbers.items() if self.enough and self._holds(counted)}
        if asked:
            drawn = np.concatenate(list(self._draws(sums)))
            found |= {name: _percentiles(number(drawn), self._tail()) for name, number in asked.items()}
        return found

    def to_json(self) -> dict[str, Any]:
        """The report's `resampling`."""
        said = {"coverage": COVERAGE, "draws": DRAWS, "cells": self.cells, "cells_per_block": self.length}
        note = None if self.enough else f"{TOO_FEW}: {self.blocks} blocks, {MIN_BLOCKS} needed"
        return said | {"blocks": self.blocks, "note": note}

    def _holds(self, counted: FloatArray | None) -> bool:
        """Whether MIN_BLOCKS blocks beside each other hold something that is counted."""
        if counted is None:
            return True
        return int(np.count_nonzero(np.add.reduceat(counted, np.arange(0, self.cells, self.length)))) >= MIN_BLOCKS

    def _draws(self, sums: FloatArray) -> Iterator[FloatArray]:
        """Sums [D, K] of all draws, some at a time."""
        from scipy.sparse import csr_matrix

        rng, block_sums = np.random.default_rng(self.seed), _circular(sums, self.length)
        at_once = max(1, DRAWN_AT_ONCE // self.blocks)
        for done in range(0, DRAWS, at_once):
            count = min(at_once, DRAWS - done)
            starts = rng.integers(0, self.cells, (count, self.blocks))
            rows = np.arange(0, starts.size + 1, self.blocks)
            taken = csr_matrix((np.ones(starts.size), starts.ravel(), rows), shape=(count, self.cells))
            yield np.asarray(taken @ block_sums)

    def _tail(self) -> float:
        """The share of draws below the interval, and above it."""
        from scipy.stats import norm, t

        wide = t.ppf(0.5 + COVERAGE / 2, self.blocks - 1) * math.sqrt(self.blocks / (self.blocks - 1))
        return float(norm.cdf(-wide))


def _percentiles(values: FloatArray, tail: float) -> Interval | None:
    """The interval of the draws' numbers; None where no draw has one."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def _circular(values: FloatArray, length: int) -> FloatArray:
    """Sums [C, K] of the `length` cells from each one on, around the end."""
    total = np.concatenate([values[:1] * 0.0, np.cumsum(np.concatenate([values, values[:length]]), axis=0)])
    summed: FloatArray = total[length : length + len(values)] - total[: len(values)]
    return summed


def ratio(over: FloatArray, under: FloatArray) -> FloatArray:
    """`over / under`; NaN where there is nothing below."""
    return np.divide(over, under, out=np.full(np.shape(over), np.nan), where=under > 0)

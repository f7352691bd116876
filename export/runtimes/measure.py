"""How long calls take: warmed up, in turns, so that a slow spell of the machine meets every contestant."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tickserve.runtimes import Timing

Call = Callable[[], object]
Times = npt.NDArray[np.int64]
WARM_UP = 3
BLOCK = 4
SEED = 7


@dataclass(frozen=True)
class Effort:
    """`budget_s` for one batch size of all contestants together; `least` and `most` are timed calls of each."""

    budget_s: float
    least: int
    most: int


EFFORTS = {"quick": Effort(0.04, 5, 100), "full": Effort(4.0, 50, 2_000)}
# The winner and the default alone, once more: noise seldom wins twice.
AGAIN = {"quick": Effort(0.02, 20, 100), "full": Effort(2.0, 100, 2_000)}


def interleaved(calls: Mapping[str, Call], effort: Effort) -> dict[str, Times]:
    """Nanoseconds of every timed call, by contestant, as many of each. Blocks take turns, in a new order each time.

    The order is drawn (from a fixed seed), not rotated: in a rotation a contestant follows the same one every time, and
    one that leaves cold caches behind made its successor look a fifth slower than an identical twin.
    """
    if not calls:
        return {}
    round_s = sum(_warm(call) for call in calls.values()) / 1e9
    wanted = int(np.clip(effort.budget_s / max(round_s, 1e-9), effort.least, effort.most))
    block = BLOCK if wanted >= 4 * BLOCK else 1
    times: dict[str, list[int]] = {name: [] for name in calls}
    names, order = list(calls), np.random.default_rng(SEED)
    for _ in range(-(-wanted // block)):
        for place in order.permutation(len(names)):
            times[names[place]] += _block(calls[names[place]], block)
    return {name: np.array(taken[:wanted], np.int64) for name, taken in times.items()}


def _warm(call: Call) -> int:
    """Pay for first-call work; the nanoseconds of the fastest of the calls."""
    return min(_block(call, WARM_UP))


def _block(call: Call, count: int) -> list[int]:
    if count > 1:
        call()  # the first of a block finds the caches that the contestant before it left
    taken = []
    for _ in range(count):
        start = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - start)
    return taken


def timing(rows: int, taken: Times) -> Timing:
    """The times of one batch size, in microseconds."""
    p25, p50, p99 = (round(float(value) / 1_000, 1) for value in np.percentile(taken, [25, 50, 99]))
    return Timing(rows=rows, calls=len(taken), p25_us=p25, p50_us=p50, p99_us=p99)


def picked(count: int, rows: int) -> npt.NDArray[np.int64]:
    """Which of `count` recorded rows make a batch of `rows`: the same at every measurement, spread over all of them."""
    order = np.random.default_rng(SEED).permutation(count)
    return np.resize(order, rows)

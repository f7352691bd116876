"""The rule that names one runtime. It is slow to leave the default: a measurement is noisy, a configuration is not.

A candidate takes the place of the default when config.pbtxt can ask for it, its decisions are research's, it is at
least GAIN faster over all batch sizes (the geometric mean of the ratios of p25, see `tickserve.runtimes.Timing`), and a
lone row, the case an engine waits for, is not slower by more than ALONE at p25, or by more than TAIL at p99 where
enough calls were timed to speak of one. Batch sizes with fewer than FEW calls are shown and not compared. Of those the
fastest over all sizes is taken. The survey then times the two again, and both have to come out the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tickserve.manifest import TREES
from tickserve.runtimes import RuntimeCandidate

GAIN = 0.10
ALONE = 0.02
TAIL = 0.50
TAIL_CALLS = 1_000
FEW = 20


def choose(candidates: Sequence[RuntimeCandidate], default: str) -> tuple[str, str]:
    """The name of the chosen candidate, and why."""
    by_name = {each.name: each for each in candidates}
    base = by_name[default]
    electable = [each for each in candidates if each.name != default and may_be_chosen(each)]
    better = {each.name: share for each in electable if (share := _share(each, base)) is not None}
    if not base.timings or not better:
        name = default
        words = f"none is {GAIN:.0%} faster over all batch sizes without slowing a lone row"
    else:
        name = min(better, key=lambda each: better[each])
        words = f"{better[name]:.2f}x the time of {default!r} over all batch sizes, and no slower for a lone row"
    return name, f"{words}; {_about_the_gpu(candidates, by_name[name])}"


def may_be_chosen(candidate: RuntimeCandidate) -> bool:
    """Whether nothing but its speed stands between a candidate and the configuration."""
    return candidate.served and candidate.decisions == "same" and not candidate.reason and bool(candidate.timings)


def one_thread_only(family: str, threads: int | None) -> bool:
    """Whether so many threads would give up what one thread gives: a forest's sums in research's order, bit for bit.

    More threads add a forest's leaves in another order, which the gate allows for by a bound. Only a person asks that.
    """
    return family in TREES and (threads or 1) > 1


def _share(candidate: RuntimeCandidate, base: RuntimeCandidate) -> float | None:
    """The candidate's time as a share of the default's over all batch sizes; None where it may not replace it."""
    ratios, tails = _ratios(candidate, base, "p25_us"), _ratios(candidate, base, "p99_us")
    alone = min(ratios, default=None)
    if alone is None or ratios[alone] > 1 + ALONE:
        return None
    calls = min(timing.calls for timing in (*candidate.timings, *base.timings) if timing.rows == alone)
    if calls >= TAIL_CALLS and tails[alone] > 1 + TAIL:
        return None
    share = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    return share if share <= 1 - GAIN else None


def _ratios(candidate: RuntimeCandidate, base: RuntimeCandidate, field: str) -> dict[int, float]:
    """By batch size, the candidate's time over the default's, where both were timed often enough."""
    reference = {timing.rows: getattr(timing, field) for timing in base.timings if timing.calls >= FEW}
    return {
        timing.rows: max(getattr(timing, field), 0.1) / max(reference[timing.rows], 0.1)
        for timing in candidate.timings
        if timing.calls >= FEW and timing.rows in reference
    }


def _about_the_gpu(candidates: Sequence[RuntimeCandidate], chosen: RuntimeCandidate) -> str:
    measured = [each for each in candidates if each.gpu and each.timings]
    if chosen.gpu:
        return "the GPU"
    if measured:
        return "not the GPU: measured, and no better for this model"
    return "not the GPU: none was measured on this machine"

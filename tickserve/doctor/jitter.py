"""The machine's own jitter: how late it wakes a thread that sleeps, and for how long it stops one that runs.

Whatever a model takes, a call cannot be more punctual than this. It is measured here and now: a noisy neighbour, the
hypervisor's steal and a sleeping core show in it, and a second run may find another number.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from tickserve.doctor.finding import Finding

SLEEP_S, SLEEPING_S, SPINNING_S = 0.001, 0.3, 0.2
# A timer of an idle machine's kernel wakes in some 60 us, its slack of 50 us included.
LATE_P99_US = 500.0
# A tick of the kernel takes some tens of microseconds; a time slice given to somebody else takes milliseconds.
GAP_US = 1_000.0
QUIET = "a quieter machine, or no CPU limit; isolated cores (isolcpus, nohz_full) with the engine pinned to them"

Clock = Callable[[], int]


def findings() -> list[Finding]:
    """Both, in half a second."""
    return [sleeping(), spinning()]


def sleeping(clock: Clock = time.perf_counter_ns, sleep: Callable[[float], None] = time.sleep) -> Finding:
    """By how much a thread that sleeps for a millisecond is woken late."""
    late: list[int] = []
    end = clock() + int(SLEEPING_S * 1e9)
    while (began := clock()) < end:
        sleep(SLEEP_S)
        late.append(clock() - began - int(SLEEP_S * 1e9))
    p50, p99, worst = (float(value) / 1e3 for value in np.percentile(late, (50, 99, 100)))
    return Finding(
        "woken late from a sleep",
        f"p50 {p50:.0f} us, p99 {p99:.0f} us, most {worst:,.0f} us",
        p99 <= LATE_P99_US,
        f"p99 above {LATE_P99_US:.0f} us: governor performance, shallow idle states (cpupower idle-set -D 10); {QUIET}",
    )


def spinning(clock: Clock = time.perf_counter_ns) -> Finding:
    """The longest time that a thread which does nothing but look at the clock is kept from it."""
    longest, last = 0, clock()
    end = last + int(SPINNING_S * 1e9)
    while last < end:
        now = clock()
        if now - last > longest:
            longest = now - last
        last = now
    gap_us = longest / 1e3
    fix = f"above {GAP_US / 1e3:.0f} ms somebody else had the core: {QUIET}"
    return Finding("held up while running", f"at most {gap_us:,.0f} us", gap_us <= GAP_US, fix)

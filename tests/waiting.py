"""Waiting for a state, where a sleep would say how fast the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Counted = TypeVar("Counted")


def wait_until(condition: Callable[[], bool], within_s: float = 20) -> bool:
    """Whether it comes true."""
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def settled(
    measure: Callable[[], Counted], enough: Callable[[Counted], bool] = lambda _: True, within_s: float = 5
) -> Counted:
    """What `measure` gives once it is `enough` and the same as 50 ms before, or in the end.

    A server counts what it did after it has answered.
    """
    until, before = time.monotonic() + within_s, measure()
    while True:
        time.sleep(0.05)
        now = measure()
        if (now == before and enough(now)) or time.monotonic() > until:
            return now
        before = now

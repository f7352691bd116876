"""What the thread of a call does while that call waits for its answer: work that an observer put off.

Nothing else needs the thread then, and a piece of that work takes far less than an answer. A thread of the observer's
own wants the interpreter just when a call comes back to it, and takes the processor's caches from the call.
"""

from __future__ import annotations

from collections.abc import Callable

Work = Callable[[], None]  # some 20 us of it at most; it never waits and never raises

_works: list[Work] = []


def enlist(work: Work) -> None:
    """Have `work` done from now on; once, however often it is enlisted."""
    if work not in _works:
        _works.append(work)


def dismiss(work: Work) -> None:
    """Have it done no more; idempotent."""
    if work in _works:
        _works.remove(work)


def work_meanwhile() -> None:
    """A piece of the work of each."""
    for work in _works:
        work()

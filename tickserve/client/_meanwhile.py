"""What the thread of a call does while that call waits for its answer: work that an observer put off.

Nothing else needs the thread then. A thread of the observer's own wants the interpreter just when a call comes back to
it, and takes the processor's caches from the call.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress

# Far less of it than an answer takes: `AT_ONCE` decisions. It never waits, and what it raises is not its own: a signal
# handler's exception, which goes to the call that it met.
Work = Callable[[], None]
AT_ONCE = 3

# What a piece of work that cannot be done raises; anything else is a signal handler's.
BROKEN: tuple[type[Exception], ...] = (
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    LookupError,
    MemoryError,
    struct.error,
)

_works: list[Work] = []


def enlist(work: Work) -> None:
    """Have `work` done from now on; once, however often it is enlisted."""
    if work not in _works:
        _works.append(work)


def dismiss(work: Work) -> None:
    """Have it done no more; idempotent."""
    with suppress(ValueError):
        _works.remove(work)


def work_meanwhile() -> None:
    """A piece of the work of each."""
    for work in _works:
        work()

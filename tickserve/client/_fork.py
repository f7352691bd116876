"""What a forked child must not share with its parent is made anew before the child runs anything else.

The child has one thread at that moment, so nothing races; a check of the process id at each call would.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Forked(Protocol):
    """Holds what belongs to one process: connections, locks, a prefix that is unique."""

    def after_fork(self) -> None:
        """Called in the child, once for each fork."""
        ...


class Paused(Protocol):
    """Has a thread in native code now and then, whose locks would be held for ever in a child."""

    def before_fork(self) -> None:
        """Stop there until `fork_over`; called before each fork."""
        ...

    def fork_over(self) -> None:
        """Go on; called in the parent."""
        ...


_watched: WeakSet[Forked] = WeakSet()
_paused: WeakSet[Paused] = WeakSet()


def renew_after_fork(holder: Forked) -> None:
    """Have `holder.after_fork()` called in every child that is forked while `holder` lives."""
    _watched.add(holder)


def pause_at_fork(holder: Paused) -> None:
    """Have `holder` stop while its process forks."""
    _paused.add(holder)


def _before() -> None:
    for holder in list(_paused):
        holder.before_fork()


def _in_parent() -> None:
    for holder in list(_paused):
        holder.fork_over()


def _in_child() -> None:
    for holder in list(_watched):
        holder.after_fork()


if hasattr(os, "register_at_fork"):  # absent where there is no fork
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)

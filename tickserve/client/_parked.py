"""Lines whose call was given up: each stays open until its answer has come, or for `PARK_NS`.

Some Triton versions die of a gRPC call that is cancelled just as it is answered (server issues 7368 and 8034), and to
close its connection is to cancel it. Nothing waits here and no thread is started: whoever uses the pool next looks.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from time import monotonic_ns
from typing import Any

PARK_NS = 2_000_000_000
LOOK_NS = 1_000_000  # between two looks: a look costs a system call a line
MAX_PARKED = 64


class Parked:
    """At most `MAX_PARKED` lines. A deque's pop and append are atomic, so no lock is taken."""

    def __init__(self) -> None:
        self._lines: deque[tuple[Any, int]] = deque()
        self._look_ns = 0

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, line: Any) -> None:
        """Keep `line` open; the oldest is closed when there are too many."""
        self._lines.append((line, monotonic_ns() + PARK_NS))
        if len(self._lines) > MAX_PARKED:
            with suppress(IndexError):
                self._lines.popleft()[0].close()

    def look(self) -> list[Any]:
        """The lines that were answered and can be used again; those that cannot, or owe too long, are closed."""
        now, free = monotonic_ns(), list[Any]()
        if now < self._look_ns:
            return free
        self._look_ns = now + LOOK_NS
        for _ in range(len(self._lines)):
            try:
                line, until_ns = self._lines.popleft()
            except IndexError:  # another thread looks too
                break
            if line.settled():
                if line.reusable:
                    free.append(line)
                else:
                    line.close()
            elif now >= until_ns:
                line.close()
            else:
                self._lines.append((line, until_ns))
        return free

    def end(self) -> None:
        """Close all."""
        with suppress(IndexError):
            while True:
                self._lines.popleft()[0].close()

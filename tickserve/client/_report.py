"""One log line for each change of a replica's state, written beside the calls and never in them.

A log sink may block (a full pipe, a dead network handler) or raise; the call that noticed the change must not wait for
it. Lines queue up to a bound, and a thread that lives only while there are lines hands them to `logging`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from contextlib import suppress

from tickserve.client._fork import renew_after_fork

LOGGER = logging.getLogger("tickserve.client")
MAX_LINES = 256


class Reporter:
    """Hands lines to the logger in order, from a thread of its own. Lines beyond `MAX_LINES` push out the oldest."""

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """The thread is not there in a child, and its lines are the parent's."""
        self._lines: deque[tuple[int, str]] = deque(maxlen=MAX_LINES)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def say(self, level: int, line: str) -> None:
        """Queue one line; returns at once and never raises."""
        if not LOGGER.isEnabledFor(level):
            return
        with self._lock:
            self._lines.append((level, line))
            if self._thread is None:
                thread = threading.Thread(target=self._drain, name="tickserve-log", daemon=True)
                with suppress(RuntimeError):  # no thread to be had: the next change tries again
                    thread.start()
                    self._thread = thread

    def _drain(self) -> None:
        while True:
            with self._lock:
                if not self._lines:
                    self._thread = None
                    return
                level, line = self._lines.popleft()
            with suppress(Exception):  # a sink that is down is not the client's trouble
                LOGGER.log(level, line)


REPORTER = Reporter()

"""What one client has counted since it was opened: signals by status, failures by type."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from tickserve.client._fork import renew_after_fork


class Statistics:
    """Counters. Safe for threads; a forked child goes on from its parent's."""

    __slots__ = ("__weakref__", "_failures", "_lock", "_observer_errors", "_signals")

    def __init__(self) -> None:
        self._signals: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._observer_errors = 0
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """The lock may be held for ever by a thread that is not here."""
        self._lock = threading.Lock()

    def signal(self, status: str) -> None:
        """A call ended with a signal."""
        with self._lock:
            self._signals[status] += 1

    def failure(self, error: Exception) -> None:
        """A call failed, whatever stood in for its answer."""
        with self._lock:
            self._failures[type(error).__name__] += 1

    def observer_error(self) -> None:
        """An observer raised; the call did not notice."""
        with self._lock:
            self._observer_errors += 1

    def snapshot(self) -> dict[str, Any]:
        """Plain values: `requests` is signals and raised errors together."""
        with self._lock:
            signals, failures = dict(self._signals), dict(self._failures)
            errors = self._observer_errors
        return {"signals": signals, "failures": failures, "observer_errors": errors}

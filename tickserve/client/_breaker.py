"""Whether a replica is believed to be alive: closed (yes), open (no), half open (one call is finding out).

Failures in a row open it; after a wait that doubles up to a cap, one live call may try. Strikes (slow beside the other
replicas) open it softly: such a replica still answers, and is used when nothing better is left.
"""

from __future__ import annotations

import logging
import threading
from time import monotonic_ns
from typing import Any, Literal
from weakref import ref

from tickserve.client._backoff import Backoff
from tickserve.client._report import REPORTER

State = Literal["closed", "open", "half_open"]
# A call that tries a replica and never ends (its thread hangs) must not shut it out for ever.
TRIAL_NS = 60_000_000_000


class Breaker:
    """The belief about one replica. Safe for threads; `closed` and `troubled` may be read without the lock."""

    __slots__ = (
        *("_backoff", "_failures", "_lock", "_name", "_down_ns", "_retry_ns", "_strikes", "_threshold", "_trial"),
        *("soft", "state"),
    )

    def __init__(self, name: str, threshold: int, backoff: Backoff) -> None:
        self._name, self._threshold, self._backoff = name, threshold, backoff
        self.state: State = "closed"
        self.soft = False  # open for slowness only
        self._failures = self._strikes = self._retry_ns = 0
        self._down_ns = 0  # when the failures in a row began, or it was opened
        self._trial: ref[Any] | None = None  # the call that tries it; one that is gone tries nothing
        self.renew_lock()

    def renew_lock(self) -> None:
        """A forked child may have been given a lock that is held for ever."""
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether calls may pass."""
        return self.state == "closed"

    @property
    def troubled(self) -> bool:
        """Whether a success would change anything."""
        return self.state != "closed" or self._failures > 0 or self._strikes > 0

    def due(self, now_ns: int) -> bool:
        """Whether an open replica may be tried again (or its trial was lost)."""
        return self.state != "closed" and (now_ns >= self._retry_ns or (self.state == "half_open" and not self.tried))

    @property
    def tried(self) -> bool:
        """Whether the call that tries it is still there."""
        trial = self._trial
        return trial is not None and trial() is not None

    def try_again(self, now_ns: int, call: object) -> bool:
        """Take the one trial that is due for `call`; False when another call was faster or it is not due."""
        with self._lock:
            if not self.due(now_ns):
                return False
            self._trial = ref(call)
            self._become("half_open", "one call tries it")
            self._retry_ns = now_ns + TRIAL_NS
            return True

    def wait_ns(self, now_ns: int) -> int:
        """How long until the next trial; 0 when calls pass."""
        return 0 if self.state == "closed" else max(0, self._retry_ns - now_ns)

    def succeeded(self, asked_ns: int | None = None) -> None:
        """It answered in time. One asked for (`asked_ns`) before the trouble began proves nothing of it now."""
        with self._lock:
            if asked_ns is not None and asked_ns <= self._down_ns:
                return
            self._failures = self._strikes = 0
            if self.state != "closed":
                self.soft = False
                self._backoff.reset()
                self._become("closed", "it answers again")

    def failed(self, why: str) -> None:
        """It did not answer, or refused for want of capacity."""
        with self._lock:
            if not self._failures:
                self._down_ns = monotonic_ns()
            self._failures += 1
            if self.state == "half_open" or (self.state == "closed" and self._failures >= self._threshold):
                self.soft = False
                self._open(f"{self._failures} failures in a row, the last: {why}")
            elif self.state == "open":
                self.soft = False

    def struck(self, why: str) -> None:
        """It was slow beside the others."""
        with self._lock:
            self._strikes += 1
            if self.state == "half_open" or (self.state == "closed" and self._strikes >= self._threshold):
                self.soft = True
                self._open(f"{self._strikes} slow answers in a row, the last: {why}")

    def released(self, call: object) -> None:
        """`call` ended; when it was a trial that told nothing (it was cancelled), the next call may try."""
        with self._lock:
            trial = self._trial
            if self.state == "half_open" and trial is not None and trial() is call:
                self._retry_ns = monotonic_ns()
                self._become("open", "its trial was cancelled")

    def _open(self, why: str) -> None:
        self._down_ns = now = monotonic_ns()
        self._retry_ns = now + self._backoff.next_ns()
        self._become("open", why)

    def _become(self, state: State, why: str) -> None:
        before, self.state = self.state, state
        # Every trial of a replica that stays down would be two lines a second for ever: only news is told.
        level = logging.DEBUG if "half_open" in (before, state) and state != "closed" else logging.WARNING
        REPORTER.say(level, f"replica {self._name}: {before} -> {state}: {why}")

"""What one call knows: its deadline, its id, how old its event is, and how long each stage took."""

from __future__ import annotations

import itertools
import os
import time

from tickserve.client._check import Answer, Checked
from tickserve.client._fork import renew_after_fork
from tickserve.client._manifests import Pinned
from tickserve.signal import Fallback, Signal, Status

NS_PER_US = 1_000


class Call:
    """One call from its start to its signal."""

    __slots__ = (
        "_last",
        "age_us",
        "attempts",
        "checked",
        "deadline_ns",
        "newest_event_ns",
        "replica",
        "request_id",
        "stages",
        "started",
        "timeout_us",
        "wall_ns",
    )

    def __init__(self, started: int, request_id: str) -> None:
        self.started, self.request_id, self.wall_ns = started, request_id, time.time_ns()
        self.age_us: float | None = None
        self.newest_event_ns: int | None = None
        self.checked: Checked | None = None
        self.replica: str | None = None
        self.attempts = 0
        self.deadline_ns = self.timeout_us = 0
        self.stages: dict[str, float] = {}
        self._last = started

    def bound(self, budget_ms: float) -> None:
        """Set the absolute deadline: `budget_ms` after the start."""
        self.deadline_ns = self.started + int(budget_ms * 1e6)
        self.timeout_us = max(1, int(budget_ms * 1e3))

    def reached(self, stage: str) -> int:
        """The end of `stage`: its time is kept, and now is returned."""
        now = time.monotonic_ns()
        self.stages[stage] = (now - self._last) / NS_PER_US
        self._last = now
        return now

    def stale(self, pinned: Pinned, checked: Checked) -> Signal:
        """The signal of a call whose event is too old: without a number."""
        return self.signal("STALE", pinned, checked.flags, None, pinned.version, reason="the newest event is too old")

    def signal(
        self,
        status: Status,
        pinned: Pinned,
        flags: tuple[str, ...],
        answer: Answer | None,
        version: int | None,
        *,
        reason: str | None = None,
        fallback: Fallback | None = None,
    ) -> Signal:
        """The signal this call ends with."""
        contract = pinned.contract
        self.stages["total"] = (time.monotonic_ns() - self.started) / NS_PER_US
        ahead = self.age_us is not None and self.age_us < 0
        return Signal(
            status=status,
            probabilities=None if answer is None else answer.probabilities,
            score=None if answer is None else answer.score,
            decision=None if answer is None else answer.decision,
            classes=contract.classes,
            model=contract.name,
            version=version,
            bundle_digest=contract.bundle_digest,
            bundle_id=contract.bundle_id,
            feature_digest=contract.feature_digest,
            request_id=self.request_id,
            event_age_us=self.age_us,
            stage_us=self.stages,
            flags=(*flags, "event_in_future") if ahead else flags,
            reason=reason,
            fallback=fallback,
            replica=self.replica,
            attempts=self.attempts,
            state=None if answer is None else answer.state,
        )


class RequestIds:
    """Ids that are unique across clients and processes: eight random hex digits, then a counter."""

    __slots__ = ("__weakref__", "_count", "_prefix")

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """A forked child must not repeat its parent's ids."""
        self._prefix, self._count = os.urandom(4).hex(), itertools.count()

    def next(self) -> str:
        """The next id."""
        return f"{self._prefix}{next(self._count):08x}"

"""What one call knows: its deadline, its id, how old its event is, and how long each stage took."""

from __future__ import annotations

import itertools
import os
import time

from tickserve.client._check import Answer
from tickserve.client._fork import renew_after_fork
from tickserve.client._manifests import Pinned
from tickserve.client._risk import Risk
from tickserve.client._usual import Checked
from tickserve.signal import Fallback, Signal, Status, make_signal

NS_PER_US = 1_000
NOTHING = (None, None, None, None)  # in place of an answer


class Call:
    """One call from its start to its signal. A moment (`_ns`, of the monotonic clock) is 0 until it is reached."""

    __slots__ = (
        "_stages",
        "age_us",
        "aged_ns",
        "attempts",
        "checked",
        "checked_ns",
        "deadline_ns",
        "decoded_ns",
        "newest_event_ns",
        "received_ns",
        "replica",
        "request_id",
        "risk",
        "started",
        "wall_ns",
    )

    def __init__(self, started: int, request_id: str, wall_ns: int) -> None:
        self.started, self.request_id, self.wall_ns = started, request_id, wall_ns
        self.age_us: float | None = None
        self.newest_event_ns: int | None = None
        self.checked: Checked | None = None
        self.risk: Risk | None = None
        self.replica: str | None = None
        self.attempts = self.deadline_ns = 0
        self.aged_ns = 0  # until when `age_us` counts
        self.checked_ns = self.received_ns = self.decoded_ns = 0
        self._stages: dict[str, float] | None = None

    def stages(self) -> dict[str, float]:
        """Microseconds of each stage that was reached, and of the `total` until this was asked first."""
        told = self._stages
        if told is None:
            started, checked, received, decoded = self.started, self.checked_ns, self.received_ns, self.decoded_ns
            told = self._stages = {}
            if checked:
                told["check"] = (checked - started) / NS_PER_US
            if received:
                told["send_wait"] = (received - checked) / NS_PER_US
            if decoded:
                told["decode"] = (decoded - received) / NS_PER_US
            told["total"] = (time.monotonic_ns() - started) / NS_PER_US
        return told

    def grow_older(self) -> None:
        """Count the age of the newest event up to now; it is measured once, before the request is sent."""
        if self.age_us is not None:
            now = time.monotonic_ns()
            self.age_us += (now - (self.aged_ns or self.checked_ns or now)) / NS_PER_US
            self.aged_ns = now

    def stale(self, pinned: Pinned, checked: Checked, why: str = "") -> Signal:
        """The signal of a call whose event is too old: without a number."""
        reason = f"the newest event is too old{why}"
        return self.signal("STALE", pinned, checked.flags, None, pinned.version, reason=reason)

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
        probabilities, score, decision, state = answer or NOTHING
        age_us, risk = self.age_us, self.risk
        if age_us is not None and age_us < 0:
            flags = (*flags, "event_in_future")
        if risk is not None:
            flags = (*flags, *risk.flags)
        return make_signal(
            status,
            probabilities,
            score,
            decision,
            contract.classes,
            contract.name,
            version,
            contract.bundle_digest,
            contract.bundle_id,
            contract.feature_digest,
            self.request_id,
            age_us,
            self.stages(),
            flags,
            reason,
            fallback,
            self.replica,
            self.attempts,
            state,
            1.0 if risk is None else risk.factor,
        )


class RequestIds:
    """Ids that are unique across clients and processes: eight random hex digits, then a counter."""

    __slots__ = ("__weakref__", "_count", "_prefix")

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """A forked child must not repeat its parent's ids."""
        self._prefix, self._count = os.urandom(4).hex(), itertools.count().__next__

    def next(self) -> str:
        """The next id."""
        return f"{self._prefix}{self._count():08x}"

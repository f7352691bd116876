"""What may be tried again, and how often: two token buckets, so that trouble is never multiplied by retries.

Scoring changes nothing on a server, so a request is as good sent twice; what a replica refused for itself (overloaded,
stopping, unreachable, nonsense) another may answer, while a request that is wrong is wrong everywhere.
"""

from __future__ import annotations

import threading

from tickserve.errors import (
    DeadlineExceededError,
    ModelNotFoundError,
    OverloadedError,
    ProtocolError,
    RequestError,
    TransportError,
)

_ELSEWHERE = (TransportError, OverloadedError, ProtocolError, ModelNotFoundError)
_HARMFUL = (TransportError, OverloadedError, ProtocolError, DeadlineExceededError)


def elsewhere(error: RequestError) -> bool:
    """Whether another replica may answer what this one did not. ModelNotFound: a rollout reaches them one by one."""
    return isinstance(error, _ELSEWHERE)


def harmful(error: RequestError) -> bool:
    """Whether `error` speaks against the replica. A deadline does: the replica had all that was left of it."""
    return isinstance(error, _HARMFUL)


class TokenBucket:
    """`capacity` tokens; taking one needs more than `floor` of them. Safe for threads.

    Retries follow gRPC's retry throttling: a failure costs a token, a success gives back `ratio`, and a retry needs
    more than half of the bucket. Hedges: each call gives `ratio`, each hedge costs a token.
    """

    __slots__ = ("_capacity", "_floor", "_lock", "_ratio", "_tokens")

    def __init__(self, capacity: float, ratio: float, *, floor: float = 0.0) -> None:
        self._capacity, self._ratio, self._floor = capacity, ratio, floor
        self._tokens = capacity
        self.renew_lock()

    def renew_lock(self) -> None:
        """A forked child may have been given a lock that is held for ever."""
        self._lock = threading.Lock()

    @property
    def tokens(self) -> float:
        """What is left."""
        return self._tokens

    def earn(self) -> None:
        """One more success or call."""
        if self._tokens < self._capacity:
            with self._lock:
                self._tokens = min(self._capacity, self._tokens + self._ratio)

    def take(self) -> bool:
        """Spend a token; False when there are too few."""
        with self._lock:
            enough = self._tokens - 1 >= self._floor
            self._tokens = max(0.0, self._tokens - 1)
            return enough

    def take_if_enough(self) -> bool:
        """Spend a token only where there are enough."""
        with self._lock:
            if self._tokens - 1 < self._floor:
                return False
            self._tokens -= 1
            return True

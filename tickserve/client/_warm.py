"""Calls that decide nothing: a row of zeros, scored for real, so that an engine's own call finds nothing cold.

They take each replica's bare transport, past its breaker, retries and hedges; no observer, fallback or statistic hears
of them. Their request is, but for its id and numbers, byte for byte what the engine sends.
"""

from __future__ import annotations

from time import monotonic_ns
from typing import Any, Generic, NamedTuple, TypeVar

from tickserve.client._arguments import positive_ms
from tickserve.client._breaker import Breaker
from tickserve.client._core import Core
from tickserve.client._transport import InferRequest, Transport
from tickserve.errors import DeadlineExceededError, RequestError, UsageError

T = TypeVar("T")

NS_PER_US, NS_PER_MS = 1_000, 1_000_000
# A connection whose first answer was slow does not look for the next eight without sleeping (_socket.py), and Python
# runs a function faster from about its eighth time on.
CALLS = 12


class Warmed(NamedTuple):
    """One model on one replica (`local` in this process), and the microseconds of the last call that it answered.

    `error` says why there are not all of the calls; `latency_us` is None where there is none.
    """

    replica: str
    model: str
    latency_us: float | None
    error: RequestError | None


class Place(NamedTuple, Generic[T]):
    """Where calls can be answered; `breaker` None: in this process."""

    name: str
    transport: T
    breaker: Breaker | None


def places(carrier: Any) -> list[Place[Any]]:
    """The replicas behind a client's transport, or that transport where it scores in this process."""
    replicas = getattr(carrier, "replicas", None)
    if replicas is None:
        return [Place("local", carrier, None)]
    return [Place(replica.name, replica.transport, replica.breaker) for replica in replicas]


class Turn:
    """The calls of one model on one replica, one after another until `deadline_ns`; sending them is the caller's."""

    def __init__(self, core: Core, replica: str, model: str, deadline_ns: int) -> None:
        self._core, self._replica, self._model, self.deadline_ns = core, replica, model, deadline_ns
        self._latency_us: float | None = None
        self._count = 0

    def next(self) -> InferRequest | None:
        """The next request; None when these were enough. Raises RequestError."""
        self._began_ns = monotonic_ns()
        if self._count == CALLS or (self._count and self._began_ns >= self.deadline_ns):
            return None
        if self._began_ns >= self.deadline_ns:
            raise DeadlineExceededError("no time was left for it")
        self._pinned, request = self._core.rehearse(self._model)
        self._request = request
        return request

    def answered(self, response: Any) -> None:
        """Hold an answer against the manifest. Raises ProtocolError."""
        self._core.rehearsed(self._pinned, self._request, response)
        self._latency_us = (monotonic_ns() - self._began_ns) / NS_PER_US
        self._count += 1

    def ended(self, error: RequestError | None) -> Warmed:
        """What it came to."""
        if error is not None:
            error.model, error.replica = self._model, error.replica or self._replica
        return Warmed(self._replica, self._model, self._latency_us, error)


def deadline_of(deadline_ms: object) -> int:
    """The moment `deadline_ms` from now. Raises UsageError."""
    return monotonic_ns() + int(positive_ms("deadline_ms", deadline_ms, UsageError) * NS_PER_MS)


def warm(core: Core, carrier: Transport, model: str | None, deadline_ms: float) -> tuple[Warmed, ...]:
    """Warm `model`, or every pinned one, on every replica in turn; each may take its share of the time that is left.

    Raises UsageError, InputRejectedError and ModelNotFoundError for the arguments; what a server does is in the answer.
    """
    models, deadline_ns = core.to_rehearse(model), deadline_of(deadline_ms)
    found: list[Warmed] = []
    everywhere = places(carrier)
    for left, place in zip(range(len(everywhere), 0, -1), everywhere, strict=True):
        now = monotonic_ns()
        until = now + (deadline_ns - now) // left
        found += [_warm_one(Turn(core, place.name, each, until), place.transport) for each in models]
    return tuple(found)


def _warm_one(turn: Turn, transport: Transport) -> Warmed:
    try:
        while (request := turn.next()) is not None:
            turn.answered(transport.infer(request, turn.deadline_ns))
    except RequestError as error:
        return turn.ended(error)
    return turn.ended(None)

"""Waiting for several replicas in one thread: a request in two halves, and one poll over all that are pending.

A transport that can be hedged has `begin`, which sends and gives a `Pending`; whatever is pending has a descriptor that
becomes readable when there is something to receive. No thread is started on the way.
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from time import monotonic_ns
from typing import Protocol

from tickserve.client._transport import InferRequest, InferResponse, Transport

NS_PER_MS = 1_000_000


class Pending(Protocol):
    """A request that has been sent."""

    def wait(self, until_ns: int) -> bool:
        """Whether there is something to receive before `until_ns`; 0 does not wait."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to receive."""
        ...

    def receive(self, deadline_ns: int) -> InferResponse:
        """The answer before `deadline_ns`; releases what it held. Raises RequestError."""
        ...

    def abandon(self) -> None:
        """Let the answer go; idempotent, and nothing of it reaches a later request."""
        ...


class Divisible(Transport, Protocol):
    """A transport whose requests come in two halves."""

    def begin(self, request: InferRequest, deadline_ns: int, connect_by_ns: int) -> Pending:
        """Send; a connection that is not made, or does not take the request, by `connect_by_ns` is a TransportError.

        Raises RequestError.
        """
        ...


class Whole:
    """A transport that knows only whole exchanges, as something pending: it is asked when it is received from."""

    def __init__(self, transport: Transport, request: InferRequest) -> None:
        self._transport, self._request = transport, request

    def wait(self, until_ns: int) -> bool:
        """Always: the exchange is yet to come."""
        return True

    def fileno(self) -> int:
        """None: such a request is never one of several."""
        return -1

    def receive(self, deadline_ns: int) -> InferResponse:
        """The whole exchange."""
        return self._transport.infer(self._request, deadline_ns)

    def abandon(self) -> None:
        """Nothing was sent."""


def begin(transport: Transport, request: InferRequest, deadline_ns: int, connect_by_ns: int) -> Pending:
    """Send `request`, in two halves where `transport` can. Raises RequestError."""
    divided = getattr(transport, "begin", None)
    if divided is None:
        return Whole(transport, request)
    pending: Pending = divided(request, deadline_ns, connect_by_ns)
    return pending


def first_ready(pending: Sequence[Pending], deadline_ns: int) -> int | None:
    """The index of the first that has something to receive; None at the deadline."""
    poll = select.poll()
    for one in pending:
        poll.register(one.fileno(), select.POLLIN)
    while True:
        # What a poll shows need not be an answer, and what was read already no poll shows.
        for index, one in enumerate(pending):
            if one.wait(0):
                return index
        remaining = deadline_ns - monotonic_ns()
        if remaining <= 0:
            return None
        # A last poll of less than a millisecond is rounded up: it is never late by more than that.
        poll.poll(-(-remaining // NS_PER_MS))

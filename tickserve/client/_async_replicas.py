"""One or several servers behind one asyncio transport: what _replicas.py does in threads, on an event loop.

A call makes one future and one timer; a second replica is asked by the same task. Cancelling a call parts with
what it had under way and tells the balance nothing about the servers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic_ns
from typing import Any, NamedTuple, Protocol

from tickserve.client._balance import Balance, Call, Replica, half_ns
from tickserve.client._resilience import Resilience
from tickserve.client._retry import harmful
from tickserve.client._transport import InferRequest, InferResponse
from tickserve.errors import RequestError


class AsyncPending(Protocol):
    """A request that has been sent; `done` is its future."""

    @property
    def done(self) -> asyncio.Future[Any]:
        """Done when there is an answer or an error, by the deadline the request was begun with."""
        ...

    def abandon(self) -> None:
        """Let the answer go; idempotent."""
        ...

    async def receive(self) -> InferResponse:
        """The answer. Raises RequestError."""
        ...


class AsyncTransport(Protocol):
    """Carries requests to one server, on an event loop."""

    async def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """Send and receive before `deadline_ns` (absolute, `time.monotonic_ns`). Raises RequestError."""
        ...

    async def begin(self, request: InferRequest, deadline_ns: int, connect_by_ns: int) -> AsyncPending:
        """Send; a connection that does not stand by `connect_by_ns` is a TransportError. Raises RequestError."""
        ...

    def close(self) -> None:
        """Release connections; idempotent."""
        ...


Server = Replica[AsyncTransport]


class AsyncGuarded:
    """One server behind its breaker: while that is open, a call fails at once and nothing is sent."""

    def __init__(self, name: str, transport: AsyncTransport, resilience: Resilience) -> None:
        self._balance: Balance[AsyncTransport] = Balance([(name, transport)], resilience)
        self._replica = self._balance.replicas[0]
        self._breaker, self._transport, self._name = self._replica.breaker, transport, name

    async def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """One request, one response. Raises RequestError; UnavailableError while the server is left alone."""
        breaker, call = self._breaker, None
        if breaker.state != "closed":
            call = Call[AsyncTransport]()  # held until this returns: a trial that is gone is the next call's
            self._balance.check_trial(call)
        self._replica.requests += 1
        try:
            response = await self._transport.infer(request, deadline_ns)
        except RequestError as error:
            error.replica, error.attempts = self._name, 1
            if harmful(error):
                breaker.failed(type(error).__name__)
            elif breaker.troubled:
                breaker.succeeded()
            self._replica.failures += 1
            raise
        except BaseException:
            if call is not None:
                breaker.released(call)
            raise
        if breaker.troubled:
            breaker.succeeded()
        return response

    @property
    def replicas(self) -> tuple[Server, ...]:
        """The one server."""
        return self._balance.replicas

    def close(self) -> None:
        """Close the transport."""
        self._transport.close()

    def statistics(self) -> dict[str, Any]:
        """A snapshot, as plain values."""
        return self._balance.statistics()


class _Runner(NamedTuple):
    replica: Server
    pending: AsyncPending
    began_ns: int


class AsyncReplicas:
    """Several servers of the same models, for one event loop at a time."""

    def __init__(self, servers: Sequence[tuple[str, AsyncTransport]], resilience: Resilience) -> None:
        self._balance: Balance[AsyncTransport] = Balance(servers, resilience)

    @property
    def replicas(self) -> tuple[Server, ...]:
        """Every server."""
        return self._balance.replicas

    def close(self) -> None:
        """Close every transport."""
        for replica in self._balance.replicas:
            replica.transport.close()

    def statistics(self) -> dict[str, Any]:
        """A snapshot, as plain values."""
        return self._balance.statistics()

    async def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """One request, one response, from whichever server. Raises RequestError."""
        balance = self._balance
        call = Call[AsyncTransport]()
        try:
            balance.first(call)
            started = monotonic_ns()
            while True:
                try:
                    return await self._attempt(call, request, deadline_ns, started)
                except RequestError as error:
                    if balance.another(call, error, deadline_ns) is None:
                        error.replica, error.attempts = call.tried[-1].name, len(call.tried)
                        raise
        finally:
            balance.ended(call)

    async def _attempt(
        self, call: Call[AsyncTransport], request: InferRequest, deadline_ns: int, started_ns: int
    ) -> InferResponse:
        """Ask the last one that `call` took, and after its usual time another one beside it."""
        runners = [await self._begin(call.tried[-1], request, deadline_ns, hurry=len(call.tried) == 1)]
        first = runners[0]
        try:
            until = self._balance.patience_ns(first.replica, request.model, first.began_ns, deadline_ns)
            second, waits = None, await _first_done([first.pending.done], until) is None
            if waits:
                second = self._balance.beside(call)
            if waits and second is None:
                half = half_ns(first.began_ns, deadline_ns)
                if await _first_done([first.pending.done], half) is None:
                    second = self._balance.beside(call, last=True)
            if second is not None:
                await self._join(runners, second, request, deadline_ns)
            return await self._race(runners, len(call.tried), request.model, started_ns)
        except BaseException:
            for other in runners:  # those that are still under way when an error, or a cancel, ends the call
                other.pending.abandon()
            raise

    async def _begin(self, replica: Server, request: InferRequest, deadline_ns: int, *, hurry: bool) -> _Runner:
        """Send to `replica`. In a `hurry` it has little time to connect: another can be asked instead."""
        began = monotonic_ns()
        try:
            by = began + (deadline_ns - began) // 2
            if hurry:
                by = self._balance.connect_by_ns(replica, request.model, began, deadline_ns)
            pending = await replica.transport.begin(request, deadline_ns, by)
        except RequestError as error:
            self._balance.failed(replica, error)
            raise
        return _Runner(replica, pending, began)

    async def _join(self, runners: list[_Runner], second: Server, request: InferRequest, deadline_ns: int) -> None:
        """Send to `second` as well; when that fails, the first runs on alone."""
        try:
            runners.append(await self._begin(second, request, deadline_ns, hurry=True))
        except RequestError:
            return

    async def _race(self, runners: list[_Runner], attempts: int, model: str, started_ns: int) -> InferResponse:
        """The first answer. Who fails leaves `runners`; the last failure is raised when nobody is left."""
        hedged, first = len(runners) > 1, runners[0].replica
        while True:
            place = await _first_done([runner.pending.done for runner in runners], None) if len(runners) > 1 else 0
            runner = runners.pop(place or 0)
            try:
                response = await runner.pending.receive()
            except RequestError as error:
                self._balance.failed(runner.replica, error)
                if not runners:
                    raise
                continue
            self._balance.answered(runner.replica, model, runner.began_ns, started_ns)
            self._overtake(runners, first)
            if hedged and runner.replica is not first:
                self._balance.hedges_won += 1
            return response._replace(replica=runner.replica.name, attempts=attempts, hedged=hedged)

    def _overtake(self, runners: list[_Runner], first: Server) -> None:
        """Let the losers go. Only who was asked first and answered later was slow."""
        while runners:
            loser = runners.pop()
            loser.pending.abandon()
            if loser.replica is first:
                self._balance.overtaken(loser.replica, loser.began_ns)


async def _first_done(futures: Sequence[asyncio.Future[Any]], until_ns: int | None) -> int | None:
    """The index of the first that is done; None at `until_ns`. Each has its own deadline, so None waits for one."""
    loop = asyncio.get_running_loop()
    woken: asyncio.Future[None] = loop.create_future()

    def wake(_: object = None) -> None:
        if not woken.done():
            woken.set_result(None)

    timer = None
    if until_ns is not None:
        timer = loop.call_later(max(0.0, (until_ns - monotonic_ns()) / 1e9), wake)
    for future in futures:
        future.add_done_callback(wake)
    try:
        await woken
    finally:
        if timer is not None:
            timer.cancel()
        for future in futures:
            future.remove_done_callback(wake)
    return next((index for index, future in enumerate(futures) if future.done()), None)

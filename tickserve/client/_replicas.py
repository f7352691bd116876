"""One or several servers behind one transport: balance, retry elsewhere, hedge, and leave alone what is down.

Everything happens in the caller's thread and inside the one deadline it was given. A lone server passes a breaker on
its way and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from time import monotonic_ns
from typing import Any, NamedTuple

from tickserve.client._balance import Balance, Call, Replica, half_ns
from tickserve.client._hedge import Pending, begin, first_ready
from tickserve.client._resilience import Resilience
from tickserve.client._retry import harmful
from tickserve.client._transport import InferRequest, InferResponse, Transport
from tickserve.errors import DeadlineExceededError, RequestError

Server = Replica[Transport]


class Guarded:
    """One server behind its breaker: while that is open, a call fails at once and nothing is sent."""

    def __init__(self, name: str, transport: Transport, resilience: Resilience) -> None:
        self._balance = Balance([(name, transport)], resilience)
        self._replica = self._balance.replicas[0]
        self._breaker, self._infer = self._replica.breaker, transport.infer
        self._name, self._transport = name, transport

    def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """One request, one response. Raises RequestError; UnavailableError while the server is left alone."""
        breaker, call = self._breaker, None
        if breaker.state != "closed":
            call = Call[Transport]()  # held until this returns: a trial that is gone is the next call's
            self._balance.check_trial(call)
        self._replica.requests += 1
        try:
            response = self._infer(request, deadline_ns)
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
    pending: Pending
    began_ns: int


class Replicas:
    """Several servers of the same models. Safe for threads; after a fork as its transports are."""

    def __init__(self, servers: Sequence[tuple[str, Transport]], resilience: Resilience) -> None:
        self._balance: Balance[Transport] = Balance(servers, resilience)

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

    def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """One request, one response, from whichever server. Raises RequestError."""
        balance = self._balance
        call = Call[Transport]()
        try:
            balance.first(call)
            started = monotonic_ns()
            while True:
                try:
                    return self._attempt(call, request, deadline_ns, started)
                except RequestError as error:
                    if balance.another(call, error, deadline_ns) is None:
                        error.replica, error.attempts = call.tried[-1].name, len(call.tried)
                        raise
        finally:
            balance.ended(call)

    def _attempt(
        self, call: Call[Transport], request: InferRequest, deadline_ns: int, started_ns: int
    ) -> InferResponse:
        """Ask the last one that `call` took, and after its usual time another one beside it."""
        runners: list[_Runner] = []
        try:
            self._begin(runners, call.tried[-1], request, deadline_ns, hurry=len(call.tried) == 1)
            until = self._balance.patience_ns(call.tried[-1], request.model, runners[0].began_ns, deadline_ns)
            second, waits = None, not runners[0].pending.wait(until)
            if waits:
                second = self._balance.beside(call)
            if waits and second is None and not runners[0].pending.wait(half_ns(runners[0].began_ns, deadline_ns)):
                second = self._balance.beside(call, last=True)
            if second is not None:
                with suppress(RequestError):  # the first runs on alone; while this connects nobody listens to it
                    self._begin(runners, second, request, deadline_ns, hurry=True)
            return self._race(runners, len(call.tried), request.model, deadline_ns, started_ns)
        except BaseException:
            for other in runners:  # those that are still under way when an error ends the call
                other.pending.abandon()
            raise

    def _begin(
        self, runners: list[_Runner], replica: Server, request: InferRequest, deadline_ns: int, *, hurry: bool
    ) -> None:
        """Send to `replica`. In a `hurry` it has little time to connect: another can be asked instead."""
        began = monotonic_ns()
        try:
            by = began + (deadline_ns - began) // 2
            if hurry:
                by = self._balance.connect_by_ns(replica, request.model, began, deadline_ns)
            runners.append(_Runner(replica, begin(replica.transport, request, deadline_ns, by), began))
        except RequestError as error:
            self._balance.failed(replica, error)
            raise

    def _race(
        self, runners: list[_Runner], attempts: int, model: str, deadline_ns: int, started_ns: int
    ) -> InferResponse:
        """The first answer. Who fails leaves `runners`; the last failure is raised when nobody is left."""
        hedged, first = len(runners) > 1, runners[0].replica
        while True:
            place = first_ready([runner.pending for runner in runners], deadline_ns) if len(runners) > 1 else 0
            if place is None:
                raise self._silent(runners)
            runner = runners[place]
            try:
                response = runner.pending.receive(deadline_ns)
            except RequestError as error:
                del runners[place]
                self._balance.failed(runner.replica, error)
                if not runners:
                    raise
                continue
            del runners[place]
            self._balance.answered(runner.replica, model, runner.began_ns, started_ns)
            self._overtake(runners, first)
            if hedged and runner.replica is not first:
                self._balance.hedges_won += 1
            return response._replace(replica=runner.replica.name, attempts=attempts, hedged=hedged)

    def _overtake(self, runners: list[_Runner], first: Server) -> None:
        """Let the losers go. Only who was asked first and answered later was slow."""
        for loser in runners:
            loser.pending.abandon()
            if loser.replica is first:
                self._balance.overtaken(loser.replica, loser.began_ns)

    def _silent(self, runners: list[_Runner]) -> DeadlineExceededError:
        error = DeadlineExceededError("no answer inside the deadline, while waiting for several replicas")
        for runner in runners:
            runner.pending.abandon()
            self._balance.failed(runner.replica, error)
        return error

"""One or several servers behind one transport: balance, retry elsewhere, hedge, and leave alone what is down.

Everything happens in the caller's thread and inside the one deadline it was given. A lone server passes a breaker on
its way and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic_ns
from typing import Any, NamedTuple

from tickserve.client._balance import Balance, Replica
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
        breaker = self._breaker
        if breaker.state != "closed":
            self._balance.check_trial()
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
            breaker.released()
            raise
        if breaker.troubled:
            breaker.succeeded()
        return response

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
        replica: Server | None = balance.first()
        tried: list[Server] = []
        started = monotonic_ns()
        while True:
            assert replica is not None  # noqa: S101 - for the type checker
            tried.append(replica)
            try:
                return self._attempt(tried, request, deadline_ns, started)
            except RequestError as error:
                replica = balance.another(tried, error, deadline_ns)
                if replica is None:
                    error.replica, error.attempts = tried[-1].name, len(tried)
                    raise

    def _attempt(self, tried: list[Server], request: InferRequest, deadline_ns: int, started_ns: int) -> InferResponse:
        """Ask the last of `tried`, and after its usual time another one beside it."""
        runner = self._begin(tried[-1], request, deadline_ns, hurry=len(tried) == 1)
        runners = [runner]
        try:
            until = self._balance.patience_ns(request.model, runner.began_ns, deadline_ns)
            if not runner.pending.wait(until) and (second := self._balance.beside(tried)) is not None:
                tried.append(second)
                self._join(runners, second, request, deadline_ns)
            return self._race(runners, tried, request.model, deadline_ns, started_ns)
        except BaseException:
            for other in runners:  # those that are still under way when an error ends the call
                other.pending.abandon()
                self._balance.dropped(other.replica)
            raise

    def _begin(self, replica: Server, request: InferRequest, deadline_ns: int, *, hurry: bool) -> _Runner:
        """Send to `replica`. In a `hurry` it has little time to connect: another can be asked instead."""
        began = monotonic_ns()
        try:
            by = began + (deadline_ns - began) // 2
            if hurry:
                by = self._balance.connect_by_ns(replica, request.model, began, deadline_ns)
            pending = begin(replica.transport, request, deadline_ns, by)
        except RequestError as error:
            self._balance.failed(replica, error)
            raise
        except BaseException:
            self._balance.dropped(replica)
            raise
        return _Runner(replica, pending, began)

    def _join(self, runners: list[_Runner], second: Server, request: InferRequest, deadline_ns: int) -> None:
        """Send to `second` as well; when that fails, the first runs on alone."""
        try:
            # While it connects nobody listens to the first.
            runners.append(self._begin(second, request, deadline_ns, hurry=True))
        except RequestError:
            return

    def _race(
        self, runners: list[_Runner], tried: list[Server], model: str, deadline_ns: int, started_ns: int
    ) -> InferResponse:
        """The first answer. Who fails leaves `runners`; the last failure is raised when nobody is left."""
        hedged, first = len(runners) > 1, runners[0].replica
        while True:
            place = first_ready([runner.pending for runner in runners], deadline_ns) if len(runners) > 1 else 0
            if place is None:
                raise self._silent(runners)
            runner = runners.pop(place)
            try:
                response = runner.pending.receive(deadline_ns)
            except RequestError as error:
                self._balance.failed(runner.replica, error)
                if not runners:
                    raise
                continue
            except BaseException:
                self._balance.dropped(runner.replica)
                raise
            self._balance.answered(runner.replica, model, runner.began_ns, started_ns)
            self._overtake(runners, first)
            if hedged and runner.replica is not first:
                self._balance.hedges_won += 1
            return response._replace(replica=runner.replica.name, attempts=len(tried), hedged=hedged)

    def _overtake(self, runners: list[_Runner], first: Server) -> None:
        """Let the losers go. Only who was asked first and answered later was slow."""
        while runners:
            loser = runners.pop()
            loser.pending.abandon()
            if loser.replica is first:
                self._balance.overtaken(loser.replica, loser.began_ns)
            else:
                self._balance.dropped(loser.replica)

    def _silent(self, runners: list[_Runner]) -> DeadlineExceededError:
        error = DeadlineExceededError("no answer inside the deadline, while waiting for several replicas")
        while runners:
            runner = runners.pop()
            runner.pending.abandon()
            self._balance.failed(runner.replica, error)
        return error

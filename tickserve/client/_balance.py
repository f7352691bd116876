"""Which replica is asked next, and what every outcome says about it. No input or output: sync and asyncio share it."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from time import monotonic_ns
from typing import Any, Generic, TypeVar
from weakref import ref

from tickserve.client._backoff import Backoff
from tickserve.client._breaker import Breaker
from tickserve.client._fork import renew_after_fork
from tickserve.client._latency import RunningMean, RunningQuantile
from tickserve.client._resilience import Resilience
from tickserve.client._retry import TokenBucket, elsewhere, harmful
from tickserve.errors import RequestError, UnavailableError

NS_PER_MS = 1_000_000
HEDGE_BURST = 10.0
CONNECT_ANSWERS, CONNECT_FLOOR_NS = 4, 20 * NS_PER_MS
# Of the trials of a replica that was overtaken, one in so many has time to connect. Each holds up one call.
LONG_TRIALS = 4
# Below this a ratio of latencies is the machine's noise.
SLOW_FLOOR_NS = 1 * NS_PER_MS

T = TypeVar("T")


class Replica(Generic[T]):
    """One server: its transport, what is believed of it, and its counts."""

    __slots__ = ("_calls", "breaker", "failures", "mean", "name", "overtaken", "requests", "transport")

    def __init__(self, name: str, transport: T, resilience: Resilience) -> None:
        backoff = Backoff(int(resilience.backoff_ms * NS_PER_MS), int(resilience.max_backoff_ms * NS_PER_MS))
        self.name, self.transport = name, transport
        self.breaker = Breaker(name, resilience.breaker_failures, backoff)
        self.mean = RunningMean()
        self.requests = self.failures = 0
        self.overtaken = 0  # how often in a row it lost to a hedge, or was slow after that; 0 after a failure
        self._calls: set[ref[Call[T]]] = set()

    @property
    def in_flight(self) -> int:
        """How many calls have asked it and are not over."""
        return len(self._calls)

    def enter(self, call: Call[T]) -> None:
        """Count `call` until `leave`, or until it is gone.

        An exception out of a signal's handler may end a call between any two lines, past every `finally`; what
        removes a call that is garbage is no Python code that could be interrupted.
        """
        self._calls.add(ref(call, self._calls.discard))

    def leave(self, call: Call[T]) -> None:
        """Count `call` no more; idempotent."""
        self._calls.discard(ref(call))

    def forget(self) -> None:
        """Count no call."""
        self._calls.clear()

    def statistics(self) -> dict[str, Any]:
        """A snapshot, as plain values."""
        return {
            "breaker": self.breaker.state,
            "requests": self.requests,
            "failures": self.failures,
            "in_flight": self.in_flight,
        }


class Call(Generic[T]):
    """One call, and the replicas it has asked in their order; `Balance.ended` ends it."""

    __slots__ = ("__weakref__", "tried")

    def __init__(self) -> None:
        self.tried: list[Replica[T]] = []


def half_ns(now_ns: int, deadline_ns: int) -> int:
    """When half of what is left will be gone."""
    return now_ns + (deadline_ns - now_ns) // 2


class Balance(Generic[T]):
    """The replicas of one client. Safe for threads and after a fork."""

    def __init__(self, replicas: Sequence[tuple[str, T]], resilience: Resilience) -> None:
        self.replicas = tuple(Replica(name, transport, resilience) for name, transport in replicas)
        self._resilience = resilience
        tokens = resilience.retry_tokens
        self._retry_budget = TokenBucket(tokens, resilience.retry_ratio, floor=tokens / 2)
        self._hedge_budget = TokenBucket(HEDGE_BURST, resilience.hedge_budget)
        self._quantiles: dict[str, RunningQuantile] = {}
        self.retries = self.hedges = self.hedges_won = 0
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Locks may be held for ever, and the parent's calls do not end here."""
        self._lock = threading.Lock()
        self._retry_budget.renew_lock()
        self._hedge_budget.renew_lock()
        for replica in self.replicas:
            replica.breaker.renew_lock()
            replica.forget()

    def first(self, call: Call[T]) -> Replica[T]:
        """The replica for a new call, taken. Raises UnavailableError when every breaker is open: nothing is sent.

        A replica whose trial is due comes first: its call is its trial, and goes elsewhere when it is slow.
        """
        self._hedge_budget.earn()
        return self._take(call, trial_first=True) or self._unavailable()

    def check_trial(self, call: Call[T]) -> None:
        """For a lone server that is not closed: return for the one call that tries it. Raises UnavailableError."""
        if not self.replicas[0].breaker.try_again(monotonic_ns(), call):
            self._unavailable()

    def another(self, call: Call[T], error: RequestError, deadline_ns: int) -> Replica[T] | None:
        """The replica for a retry after `error`, taken; None when there is none, or no budget, or no sense in it."""
        if not elsewhere(error) or len(call.tried) >= self._resilience.attempts or monotonic_ns() >= deadline_ns:
            return None
        if not self._retry_budget.take():
            return None
        replica = self._take(call, trial_first=False)
        if replica is not None:
            self.retries += 1
        return replica

    def beside(self, call: Call[T], *, last: bool = False) -> Replica[T] | None:
        """The replica for a hedge, taken; None when there is none or no budget. A trial's hedge costs nothing.

        The `last` chance, with half of the deadline gone, may be paid as a retry is: it stands in for one.
        """
        tried = call.tried
        if len(tried) >= self._resilience.attempts or not self._resilience.hedge_budget:
            return None
        trial = tried[0].breaker.state == "half_open"
        if not any(replica.breaker.closed for replica in self.replicas if replica not in tried):
            return None
        paid = trial or self._hedge_budget.take_if_enough() or (last and self._retry_budget.take())
        if not paid:
            return None
        replica = self._take(call, trial_first=False)
        if replica is not None:
            self.hedges += 1
        return replica

    def patience_ns(self, replica: Replica[T], model: str, now_ns: int, deadline_ns: int) -> int:
        """Until when `replica`, asked first, has the call alone: the model's usual time, at most half of what is left.

        Some trials have some times that. Who comes back has no connection left, and those that are warm would overtake
        it each time, however well it is; an answer, even a slow one, leaves a connection for the next trial. After
        failures all trials are such; of one that was overtaken, as who hangs is each time, one in `LONG_TRIALS`.
        """
        half = half_ns(now_ns, deadline_ns)
        quantile = self._quantiles.get(model)
        usual = None if quantile is None else quantile.value
        if usual is None:
            return half
        if replica.breaker.state == "half_open" and replica.overtaken % LONG_TRIALS == 0:
            usual = max(CONNECT_FLOOR_NS, CONNECT_ANSWERS * usual)
        return min(half, now_ns + usual)

    def connect_by_ns(self, replica: Replica[T], model: str, now_ns: int, deadline_ns: int) -> int:
        """Until when `replica` may take to connect: half of what is left, so that a dead path leaves some for another.

        Less where another one is believed alive and can be asked instead: some times a whole answer, or an eighth. (An
        engine that opens many connections at once is slow itself, and must not hold that against a replica.)
        """
        left = deadline_ns - now_ns
        half = left // 2
        quantile = self._quantiles.get(model)
        usual = None if quantile is None else quantile.value
        if usual is None or not any(other.breaker.closed for other in self.replicas if other is not replica):
            return now_ns + half
        return now_ns + min(half, max(CONNECT_FLOOR_NS, CONNECT_ANSWERS * usual, left // 8))

    def answered(self, replica: Replica[T], model: str, began_ns: int, started_ns: int) -> None:
        """`replica`, asked at `began_ns`, answered a call that started at `started_ns`."""
        now = monotonic_ns()
        taken = now - began_ns
        self._retry_budget.earn()
        quantile = self._quantiles.get(model)
        if quantile is None:
            quantile = self._quantiles.setdefault(model, RunningQuantile(self._resilience.hedge_quantile))
        quantile.add(now - started_ns)
        replica.mean.add(model, taken)
        if self._is_slow(replica, model, taken):
            replica.overtaken += replica.overtaken > 0
            replica.breaker.struck(f"{taken / NS_PER_MS:.1f} ms")
        elif replica.breaker.troubled:
            replica.breaker.succeeded(began_ns)

    def failed(self, replica: Replica[T], error: RequestError) -> None:
        """`replica` gave `error`."""
        replica.failures += 1
        if harmful(error):
            replica.overtaken = 0
            replica.breaker.failed(type(error).__name__)
        elif replica.breaker.troubled:
            replica.breaker.succeeded()

    def overtaken(self, replica: Replica[T], began_ns: int) -> None:
        """A replica that was asked later answered earlier."""
        waited = monotonic_ns() - began_ns
        replica.overtaken = replica.overtaken + 1 if replica.breaker.state == "half_open" else 1
        replica.breaker.struck(f"none after {waited / NS_PER_MS:.1f} ms")

    def ended(self, call: Call[T]) -> None:
        """`call` is over. An answer that it did not wait for says nothing about a replica."""
        for replica in call.tried:
            replica.leave(call)
            if replica.breaker.state == "half_open":
                replica.breaker.released(call)

    def statistics(self) -> dict[str, Any]:
        """A snapshot, as plain values."""
        return {
            "retries": self.retries,
            "hedges": self.hedges,
            "hedges_won": self.hedges_won,
            "replicas": {replica.name: replica.statistics() for replica in self.replicas},
        }

    def _take(self, call: Call[T], *, trial_first: bool) -> Replica[T] | None:
        with self._lock:
            replica = self._choose(call, trial_first=trial_first)
            if replica is not None:
                call.tried.append(replica)
                replica.enter(call)
                replica.requests += 1
            return replica

    def _choose(self, call: Call[T], *, trial_first: bool) -> Replica[T] | None:
        """A trial that is due, else the least busy that is closed, else any trial, else one that is only slow."""
        now, replicas = monotonic_ns(), self.replicas
        start = int(random.random() * len(replicas))  # noqa: S311 - a fair turn, not a secret
        best: Replica[T] | None = None
        shut: list[Replica[T]] = []
        for replica in replicas[start:] + replicas[:start]:
            if replica in call.tried:
                continue
            if not replica.breaker.closed:
                shut.append(replica)
            elif best is None or replica.in_flight < best.in_flight:
                best = replica
        if shut and (trial_first or best is None):
            for replica in shut:
                if replica.breaker.due(now) and replica.breaker.try_again(now, call):
                    return replica
        return best or next((replica for replica in shut if replica.breaker.soft), None)

    def _is_slow(self, replica: Replica[T], model: str, taken_ns: int) -> bool:
        """Whether another replica that is believed alive usually answers this model several times faster."""
        if taken_ns < SLOW_FLOOR_NS:
            return False
        limit = (taken_ns - SLOW_FLOOR_NS) / self._resilience.slow_factor
        for other in self.replicas:
            if other is not replica and other.breaker.closed:
                usual = other.mean.of(model)
                if usual is not None and usual < limit:
                    return True
        return False

    def _unavailable(self) -> Replica[T]:
        now = monotonic_ns()
        waits = [one.breaker.wait_ns(now) for one in self.replicas if one.breaker.state != "half_open"]
        trials = ["one call is trying it"] if len(waits) < len(self.replicas) else []
        if trials and len(self.replicas) > 1:
            trials = ["one call is trying one of them"]
        if waits:
            trials.append(f"the next trial is in {min(waits) / NS_PER_MS:.0f} ms")
        names = ", ".join(replica.name for replica in self.replicas)
        raise UnavailableError(
            f"no replica is believed to be alive ({names[:200]}); {', '.join(trials)}",
            hint="nothing was sent",
        )

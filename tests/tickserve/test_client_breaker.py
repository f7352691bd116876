"""The pieces of resilience by themselves: breaker, backoff, budgets, quantile, and log lines that hold nobody up."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tickserve.client._backoff import Backoff
from tickserve.client._balance import CONNECT_ANSWERS, CONNECT_FLOOR_NS, Balance, Call
from tickserve.client._breaker import TRIAL_NS, Breaker
from tickserve.client._latency import REFRESH, WINDOW, RunningQuantile
from tickserve.client._report import LOGGER, MAX_LINES, REPORTER
from tickserve.client._resilience import Resilience
from tickserve.client._retry import TokenBucket, elsewhere, harmful
from tickserve.config import ClientSettings
from tickserve.errors import (
    CertificateError,
    DeadlineExceededError,
    InputRejectedError,
    ModelNotFoundError,
    OverloadedError,
    ProtocolError,
    ServerRejectedError,
    TransportError,
    UnavailableError,
)

SOON_NS = 5_000_000
CALL = Call[None]()


def breaker(threshold: int = 3, wait_ns: int = SOON_NS, replica: str = "here:1") -> Breaker:
    return Breaker(replica, threshold, Backoff(wait_ns, wait_ns))


def test_failures_in_a_row_open_it_and_a_success_between_does_not() -> None:
    one = breaker(wait_ns=10**12)
    for _ in range(10):
        one.failed("x")
        one.failed("x")
        one.succeeded()
    assert one.closed
    for _ in range(3):
        one.failed("x")
    assert one.state == "open"
    assert not one.due(time.monotonic_ns())


def test_an_answer_from_before_it_was_believed_down_changes_nothing() -> None:
    """Sixty answers may lie in the sockets of a replica that refuses whoever asks now."""
    one = breaker()
    before = time.monotonic_ns()
    for _ in range(3):
        one.succeeded(before)
        one.failed("x")
    one.succeeded(before)
    assert one.state == "open"
    time.sleep(SOON_NS / 1e9)
    assert one.try_again(time.monotonic_ns(), CALL)
    one.succeeded(before)
    assert one.state == "half_open"
    one.succeeded(time.monotonic_ns())
    assert one.closed


def test_a_balance_tells_when_an_answer_was_asked_for() -> None:
    balance = Balance([("a:1", None), ("b:1", None)], Resilience(breaker_failures=1))
    replica, before = balance.replicas[0], time.monotonic_ns()
    balance.failed(replica, TransportError("gone"))
    balance.answered(replica, "m", before, before)
    assert replica.breaker.state == "open"
    balance.answered(replica, "m", time.monotonic_ns(), before)
    assert replica.breaker.closed


def test_one_call_tries_it_and_decides() -> None:
    one = breaker()
    for _ in range(3):
        one.failed("x")
    time.sleep(SOON_NS / 1e9)
    now = time.monotonic_ns()
    with ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(lambda _: one.try_again(now, CALL), range(64))) == 1
    assert one.state == "half_open"
    one.failed("x")
    assert one.state == "open"
    time.sleep(SOON_NS / 1e9)
    assert one.try_again(time.monotonic_ns(), CALL)
    one.succeeded()
    assert one.closed


def test_a_trial_that_never_reports_is_given_again() -> None:
    one = breaker()
    for _ in range(3):
        one.failed("x")
    later = time.monotonic_ns() + SOON_NS
    assert one.try_again(later, CALL)
    assert not one.try_again(later + TRIAL_NS - 1, CALL)
    assert one.try_again(later + TRIAL_NS, CALL)


def test_a_cancelled_trial_is_the_next_calls() -> None:
    one = breaker(wait_ns=10**12)
    for _ in range(3):
        one.failed("x")
    assert one.try_again(time.monotonic_ns() + 10**12, CALL)
    one.released(CALL)
    assert one.try_again(time.monotonic_ns(), CALL)


def test_slowness_opens_it_softly_and_failure_hardens() -> None:
    one = breaker()
    for _ in range(3):
        one.struck("9 ms")
    assert (one.state, one.soft) == ("open", True)
    one.failed("x")
    assert not one.soft


def test_waits_double_to_the_cap_with_jitter_and_begin_again() -> None:
    backoff = Backoff(100, 1_000)
    spans = [100, 200, 400, 800, 1_000, 1_000]
    for span in spans:
        assert span / 2 <= backoff.next_ns() <= span
    backoff.reset()
    assert backoff.next_ns() <= 100
    assert len({Backoff(10**6, 10**6).next_ns() for _ in range(20)}) > 10


def test_hedges_stay_inside_their_share() -> None:
    bucket = TokenBucket(10, 0.05)
    taken = 0
    for _ in range(10_000):
        bucket.earn()
        taken += bucket.take_if_enough()
    assert 0.05 * 10_000 - 1 <= taken <= 0.05 * 10_000 + 10


def test_retries_stop_at_half_of_the_tokens_and_come_back_with_successes() -> None:
    bucket = TokenBucket(10, 0.1, floor=5)
    assert [bucket.take() for _ in range(7)] == [True] * 5 + [False] * 2
    for _ in range(31):
        bucket.earn()
    assert bucket.take()


@pytest.mark.parametrize(
    ("error", "again", "speaks_against"),
    [
        (TransportError, True, True),
        (CertificateError, True, True),
        (UnavailableError, True, True),
        (OverloadedError, True, True),
        (ProtocolError, True, True),
        (ModelNotFoundError, True, False),
        (DeadlineExceededError, False, True),
        (ServerRejectedError, False, False),
        (InputRejectedError, False, False),
    ],
)
def test_what_is_asked_elsewhere_and_what_speaks_against_a_replica(
    error: type[Any], again: bool, speaks_against: bool
) -> None:
    assert elsewhere(error("x")) is again
    assert harmful(error("x")) is speaks_against


def test_the_quantile_follows_the_last_values() -> None:
    running = RunningQuantile(0.95)
    for value in range(REFRESH - 1):
        running.add(value)
    assert running.value is None
    for _ in range(WINDOW):
        running.add(1_000)
    assert running.value == 1_000
    for number in range(2 * WINDOW):
        running.add(number % 100)
    assert running.value is not None
    assert 90 <= running.value <= 99


def balance(count: int = 3, **options: Any) -> Balance[None]:
    return Balance([(f"r{number}", None) for number in range(count)], Resilience(**options))


def test_the_least_busy_is_chosen() -> None:
    chosen = balance()
    calls = [Call[None]() for _ in range(9)]
    taken = [chosen.first(call) for call in calls]
    assert [replica.in_flight for replica in chosen.replicas] == [3, 3, 3]
    idle = taken[4]
    chosen.ended(calls[4])
    assert chosen.first(calls[4]) is not idle  # it asks nobody twice
    chosen.ended(calls[4])
    assert chosen.first(Call()) is idle
    del calls, taken
    assert [replica.in_flight for replica in chosen.replicas] == [0, 0, 0]


def test_a_trial_whose_call_is_gone_is_the_next_calls_and_one_under_way_is_said() -> None:
    chosen = balance(1, breaker_failures=1, backoff_ms=1, max_backoff_ms=1)
    one = chosen.replicas[0].breaker
    one.failed("x")
    time.sleep(0.01)
    lost: Call[None] | None = Call()
    assert one.try_again(time.monotonic_ns(), lost)
    with pytest.raises(UnavailableError, match="one call is trying it") as caught:
        chosen.check_trial(Call())
    assert "next trial" not in str(caught.value)
    lost = None  # as when an exception ended it between two lines
    chosen.check_trial(CALL)
    chosen.replicas[0].breaker.released(Call())
    assert one.state == "half_open"


def test_the_last_one_that_is_only_slow_is_still_used() -> None:
    chosen = balance(2, breaker_failures=1, backoff_ms=60_000, max_backoff_ms=60_000)
    slow, dead = chosen.replicas
    slow.breaker.struck("9 ms")
    dead.breaker.failed("x")
    assert chosen.first(Call()) is slow
    slow.breaker.failed("x")
    with pytest.raises(UnavailableError):
        chosen.first(Call())


def test_slow_beside_another_and_not_by_itself() -> None:
    chosen = balance(2, breaker_failures=3)
    fast, slow = chosen.replicas

    def answer(replica: Any, ms: float) -> None:
        began = time.monotonic_ns() - int(ms * 1e6)
        chosen.answered(replica, "m", began, began)

    for _ in range(20):
        answer(slow, 20)
    assert slow.breaker.closed  # nobody is known to be faster
    for _ in range(3):
        answer(fast, 2)
        answer(slow, 20)
    assert slow.breaker.state == "open"
    assert fast.breaker.closed


def test_a_trial_has_the_time_that_connecting_takes() -> None:
    chosen = balance(2, breaker_failures=1, backoff_ms=1, max_backoff_ms=1)
    back, warm = chosen.replicas
    now = time.monotonic_ns()
    half = now + 500_000_000

    def patience(replica: Any) -> int:
        return chosen.patience_ns(replica, "m", now, now + 1_000_000_000)

    assert patience(back) == half  # the usual time is not known yet
    for _ in range(WINDOW):
        chosen.answered(warm, "m", time.monotonic_ns() - 1_000_000, time.monotonic_ns() - 1_000_000)
    usual = patience(back) - now
    assert 1_000_000 <= usual < CONNECT_FLOOR_NS
    back.breaker.failed("x")
    time.sleep(0.01)
    trial = Call[None]()
    assert chosen.first(trial) is back
    assert patience(back) - now == max(CONNECT_FLOOR_NS, CONNECT_ANSWERS * usual)
    assert patience(warm) - now == usual
    # Never more than half of what is left.
    assert chosen.patience_ns(back, "m", now, now + 2_000_000) == now + 1_000_000
    # One that takes connections and does not answer, or slowly, holds up few calls.
    long = []
    for slow in (False, False, False, True, False, False):
        if slow:
            chosen.answered(back, "m", time.monotonic_ns() - 900_000_000, now)
        else:
            chosen.overtaken(back, now)
        time.sleep(0.005)
        trial = Call()
        assert chosen.first(trial) is back
        long.append(patience(back) - now > usual)
    assert long == [False, False, False, True, False, False]


def test_every_change_is_one_line_and_no_call_waits_for_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER.name)
    one = breaker(replica="told:1")
    for _ in range(20):
        one.failed("TransportError")

    def told() -> list[logging.LogRecord]:  # the reporter is the process's: lines of other tests may still come
        return [record for record in caplog.records if "told:1" in record.getMessage()]

    until = time.monotonic() + 5
    while not told() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    assert [record.getMessage() for record in told()] == [
        "replica told:1: closed -> open: 3 failures in a row, the last: TransportError"
    ]
    assert told()[0].threadName == "tickserve-log"


class Hanging(logging.Handler):
    """A sink that takes one line and blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.freed = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.freed.wait(30)


class Raising(logging.Handler):
    """A sink that is down."""

    def handle(self, record: logging.LogRecord) -> bool:
        raise OSError("no space left on device")


@pytest.mark.parametrize("sink", [Hanging, Raising])
def test_a_log_sink_that_hangs_or_raises_holds_nobody_up(sink: type[logging.Handler]) -> None:
    handler = sink()
    LOGGER.addHandler(handler)
    try:
        began = time.monotonic()
        one = breaker(threshold=1, wait_ns=1)
        for _ in range(2 * MAX_LINES):
            one.failed("x")
            one.succeeded()
        assert time.monotonic() - began < 10
        assert len(REPORTER._lines) <= MAX_LINES
    finally:
        LOGGER.removeHandler(handler)
        if isinstance(handler, Hanging):
            handler.freed.set()
    until = time.monotonic() + 10
    while REPORTER._thread is not None and time.monotonic() < until:
        time.sleep(0.01)
    assert REPORTER._thread is None  # it ends when there is nothing to say


def test_the_configuration_has_the_same_defaults() -> None:
    assert Resilience.of(ClientSettings()) == Resilience()
    changed = ClientSettings(attempts=1, hedge_budget=0.0, backoff_ms=20.0)
    assert Resilience.of(changed) == Resilience(attempts=1, hedge_budget=0.0, backoff_ms=20.0)

"""Several replicas behind one client: the real Triton, reached through relays that misbehave on demand."""

from __future__ import annotations

import os
import signal as signals
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.relay import Relay
from tickserve.client import Client, Resilience
from tickserve.errors import DeadlineExceededError, TransportError, UnavailableError, UsageError

MODEL = "hand-l1-gbdt"
SECONDS_MS = 5_000


@pytest.fixture
def relays(triton: Any) -> Iterator[list[Relay]]:
    with Relay(triton.http) as one, Relay(triton.http) as other:
        yield [one, other]


@pytest.fixture
def client(triton: Any, relays: list[Relay]) -> Iterator[Client]:
    with Client([relay.address for relay in relays], manifest=triton.folder, deadline_ms=SECONDS_MS) as opened:
        yield opened


def expected(triton: Any, rows: np.ndarray) -> np.ndarray:
    with Client(triton.http, manifest=triton.folder, deadline_ms=SECONDS_MS) as plain:
        answer = plain.score(MODEL, rows).probabilities
    assert answer is not None
    return answer


def test_both_answer_and_the_signal_says_who(
    client: Client, relays: list[Relay], triton: Any, rows: np.ndarray
) -> None:
    right = expected(triton, rows)
    who: Counter[str | None] = Counter()
    for _ in range(60):
        signal = client.score(MODEL, rows)
        assert np.array_equal(signal.probabilities, right)
        assert signal.attempts in (1, 2)
        who[signal.replica] += 1
    assert set(who) == {relay.address for relay in relays}
    assert min(who.values()) > 5
    counted = client.statistics()
    assert counted["signals"] == {"OK": 60}
    assert counted["failures"] == {}
    assert {one["breaker"] for one in counted["replicas"].values()} == {"closed"}
    assert {one["in_flight"] for one in counted["replicas"].values()} == {0}


def test_one_address_is_told_too(triton: Any, rows: np.ndarray) -> None:
    with Client(triton.http, manifest=triton.folder, deadline_ms=SECONDS_MS) as client:
        signal = client.score(MODEL, rows)
        assert (signal.replica, signal.attempts) == (triton.http, 1)
        assert client.statistics()["replicas"][triton.http]["breaker"] == "closed"


def test_addresses_with_commas(triton: Any, relays: list[Relay], rows: np.ndarray) -> None:
    url = ", ".join(relay.address for relay in relays)
    with Client(url, manifest=triton.folder, deadline_ms=SECONDS_MS) as client:
        assert client.score(MODEL, rows).ok
        assert len(client.statistics()["replicas"]) == 2


@pytest.mark.parametrize(
    ("url", "field"),
    [
        ([], "url"),
        (["127.0.0.1:1", "127.0.0.1:1"], "url"),
        ("127.0.0.1:1,", "url"),
        (["127.0.0.1:1", "grpc://127.0.0.1:2"], "url"),
        (["127.0.0.1:1", "local:///tmp"], "url"),
        ([f"127.0.0.1:{port}" for port in range(1, 70)], "url"),
        (7, "url"),
        ([7], "url"),
    ],
)
def test_addresses_that_are_refused(url: Any, field: str, make_manifest: Any) -> None:
    with pytest.raises(UsageError) as caught:
        Client(url, manifest=make_manifest())
    assert caught.value.field == field


@pytest.mark.parametrize(
    "options",
    [
        {"attempts": 0},
        {"attempts": True},
        {"retry_tokens": 1},
        {"retry_ratio": -0.1},
        {"hedge_quantile": 1.0},
        {"hedge_budget": float("nan")},
        {"breaker_failures": 0},
        {"backoff_ms": 0},
        {"max_backoff_ms": 50},
        {"slow_factor": 1},
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        Resilience(**options)
    assert caught.value.field == next(iter(options))


def test_what_is_no_resilience_is_refused(make_manifest: Any) -> None:
    with pytest.raises(UsageError, match="resilience"):
        Client("127.0.0.1:1", manifest=make_manifest(), resilience={"attempts": 2})  # type: ignore[arg-type]


def test_a_refusing_replica_costs_nobody_an_answer(
    client: Client, relays: list[Relay], triton: Any, rows: np.ndarray
) -> None:
    right = expected(triton, rows)
    assert client.score(MODEL, rows).ok
    relays[0].order("refuse")
    for _ in range(60):
        signal = client.score(MODEL, rows)
        assert np.array_equal(signal.probabilities, right)
        assert signal.replica == relays[1].address
    counted = client.statistics()
    assert counted["retries"] > 0
    assert counted["replicas"][relays[0].address]["breaker"] != "closed"
    relays[0].order("clear")
    until = time.monotonic() + 10
    while client.statistics()["replicas"][relays[0].address]["breaker"] != "closed":
        assert client.score(MODEL, rows).ok
        assert time.monotonic() < until, "it does not come back by itself"
        time.sleep(0.01)


def test_one_that_comes_back_is_not_overtaken_for_ever(
    client: Client, relays: list[Relay], triton: Any, rows: np.ndarray
) -> None:
    """Its trial has to connect, by a path that is slow with a new connection, beside one that is warm."""
    for _ in range(100):
        assert client.score(MODEL, rows).ok
    relays[0].order("refuse")
    while client.statistics()["replicas"][relays[0].address]["breaker"] == "closed":
        assert client.score(MODEL, rows).ok
    relays[0].order("cold 12")
    until = time.monotonic() + 10
    while client.statistics()["replicas"][relays[0].address]["breaker"] != "closed":
        assert client.score(MODEL, rows).ok
        assert time.monotonic() < until, "every trial is overtaken"
        time.sleep(0.002)


def test_an_answer_that_is_reset_is_asked_elsewhere(
    client: Client, relays: list[Relay], triton: Any, rows: np.ndarray
) -> None:
    right = expected(triton, rows)
    relays[0].order("cut 120")  # inside the head of the answer
    for _ in range(40):
        signal = client.score(MODEL, rows)
        assert np.array_equal(signal.probabilities, right)
        assert signal.replica == relays[1].address
    assert client.statistics()["replicas"][relays[0].address]["failures"] > 0


def test_sixty_four_threads_through_a_replica_that_goes(
    client: Client, relays: list[Relay], triton: Any, rows: np.ndarray
) -> None:
    right = expected(triton, rows)
    calls = threading.Semaphore(0)

    def one(_: int) -> bool:
        signal = client.score(MODEL, rows)
        calls.release()
        return np.array_equal(signal.probabilities, right)

    with ThreadPoolExecutor(64) as threads:
        done = threads.map(one, range(2_000))
        for _ in range(500):
            calls.acquire()
        relays[0].order("refuse")
        assert all(done)
    assert {one["in_flight"] for one in client.statistics()["replicas"].values()} == {0}


def test_no_retry_without_budget(triton: Any, relays: list[Relay], rows: np.ndarray) -> None:
    relays[0].order("refuse")
    relays[1].order("refuse")
    settings = Resilience(retry_tokens=4, retry_ratio=0, breaker_failures=1_000_000)
    addresses = [relay.address for relay in relays]
    with Client(addresses, manifest=triton.folder, deadline_ms=SECONDS_MS, resilience=settings) as client:
        attempts = []
        for _ in range(20):
            with pytest.raises(TransportError) as caught:
                client.score(MODEL, rows)
            attempts.append(caught.value.attempts)
        assert attempts[0] == 2
        assert attempts[-10:] == [1] * 10  # the budget is spent: trouble is not doubled
        assert client.statistics()["retries"] == 1  # each failure costs a token, the first call had two


def test_a_bad_request_is_sent_once(client: Client, rows: np.ndarray) -> None:
    for _ in range(10):
        with pytest.raises(Exception, match="version 99") as caught:
            client.score(MODEL, rows, version=99)
        assert caught.value.attempts == 2  # type: ignore[attr-defined]  # a rollout reaches replicas one by one
    assert {one["breaker"] for one in client.statistics()["replicas"].values()} == {"closed"}


def test_a_replica_that_goes_dark_costs_no_answer(
    client: Client, relays: list[Relay], triton: Any, rows: np.ndarray
) -> None:
    right = expected(triton, rows)
    for _ in range(100):
        client.score(MODEL, rows)
    relays[0].order("dark")
    for _ in range(60):
        began = time.monotonic()
        signal = client.score(MODEL, rows)
        assert np.array_equal(signal.probabilities, right)
        assert time.monotonic() - began < SECONDS_MS / 1e3
    assert client.statistics()["hedges_won"] > 0


def test_a_spent_hedge_budget_is_no_call_lost(triton: Any, relays: list[Relay], rows: np.ndarray) -> None:
    """With half of its deadline gone a call is sent elsewhere as a retry would be."""
    settings = Resilience(hedge_budget=1e-9, breaker_failures=1_000_000)
    addresses = [relay.address for relay in relays]
    with Client(addresses, manifest=triton.folder, deadline_ms=SECONDS_MS, resilience=settings) as client:
        for _ in range(100):
            client.score(MODEL, rows)
        client._transport._balance._hedge_budget._tokens = 0.0  # type: ignore[attr-defined]
        relays[0].order("dark")
        for _ in range(6):
            assert client.score(MODEL, rows, deadline_ms=2_000).ok
        assert client.statistics()["replicas"][relays[0].address]["requests"] > 0


def test_everything_down_is_said_without_asking(triton: Any, relays: list[Relay], rows: np.ndarray) -> None:
    settings = Resilience(backoff_ms=60_000, max_backoff_ms=60_000)
    addresses = [relay.address for relay in relays]
    with Client(addresses, manifest=triton.folder, deadline_ms=SECONDS_MS, resilience=settings) as client:
        for relay in relays:
            relay.order("refuse")
        # A call asks each of them, so five calls open every breaker; a few more where the machine drops a connection.
        for _ in range(4 * settings.breaker_failures):
            with pytest.raises(TransportError) as caught:
                client.score(MODEL, rows)
            if isinstance(caught.value, UnavailableError):
                break
        assert isinstance(caught.value, UnavailableError), "no breaker opens"
        asked = [one["requests"] for one in client.statistics()["replicas"].values()]
        taken = []
        for _ in range(50):
            began = time.monotonic_ns()
            with pytest.raises(UnavailableError, match="nothing was sent") as caught:
                client.score(MODEL, rows)
            taken.append(time.monotonic_ns() - began)
            assert caught.value.attempts == 0
        assert [one["requests"] for one in client.statistics()["replicas"].values()] == asked
        assert min(taken) < 1_000_000  # under 1 ms, when the machine lets it


def test_a_stopped_server_opens_the_breaker_and_comes_back(triton: Any, rows: np.ndarray) -> None:
    settings = Resilience(breaker_failures=3, backoff_ms=1_000, max_backoff_ms=1_000)
    with Client(triton.http, manifest=triton.folder, deadline_ms=50, resilience=settings) as client:
        assert client.score(MODEL, rows, deadline_ms=SECONDS_MS).ok
        os.kill(triton.pid, signals.SIGSTOP)
        try:
            for _ in range(3):
                with pytest.raises(DeadlineExceededError):
                    client.score(MODEL, rows)
            with pytest.raises(UnavailableError):
                client.score(MODEL, rows)
        finally:
            os.kill(triton.pid, signals.SIGCONT)
        time.sleep(0.1)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            try:
                if client.score(MODEL, rows, deadline_ms=SECONDS_MS).ok:
                    break
            except UnavailableError:
                time.sleep(0.01)
        assert client.statistics()["replicas"][triton.http]["breaker"] == "closed"


def test_descriptors_and_threads_come_back(client: Client, relays: list[Relay], rows: np.ndarray) -> None:
    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    for _ in range(50):
        client.score(MODEL, rows)
    before = held()
    for order in ("cut 100", "clear", "dark", "clear", "refuse", "clear"):
        relays[0].order(order)
        for _ in range(20):
            client.score(MODEL, rows)
    time.sleep(0.2)  # the thread of the log lines ends by itself
    after = held()
    assert after[0] <= before[0] + 4
    assert after[1] <= before[1]

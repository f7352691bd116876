"""Hedging: a second replica is asked after the usual time, the first answer wins, and nobody gets another's answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from benchmarks.relay import Relay
from tickserve.client import Client, Resilience
from tickserve.client import _h2 as h2
from tickserve.client._h2_line import Stream
from tickserve.client._socket import DisconnectedError, MalformedError
from tickserve.errors import DeadlineExceededError

MODEL = "hand-l1-gbdt"
SECONDS_MS = 5_000
TRANSPORTS = ("http", "grpc")


@pytest.fixture(params=TRANSPORTS)
def relays(request: pytest.FixtureRequest, triton: Any) -> Iterator[tuple[str, list[Relay]]]:
    target = triton.http if request.param == "http" else triton.grpc
    with Relay(target) as one, Relay(target) as other:
        yield request.param, [one, other]


def connect(triton: Any, relays: tuple[str, list[Relay]], **options: Any) -> Client:
    transport, both = relays
    options = {"deadline_ms": SECONDS_MS} | options
    return Client([relay.address for relay in both], manifest=triton.folder, transport=transport, **options)


def warm(client: Client, rows: np.ndarray, calls: int = 100) -> None:
    for _ in range(calls):
        assert client.score(MODEL, rows).ok


def test_a_slow_replica_is_hedged_then_left_alone(
    triton: Any, relays: tuple[str, list[Relay]], rows: np.ndarray
) -> None:
    slow, fast = relays[1]
    with connect(triton, relays) as client:
        warm(client, rows)
        slow.order("slow 100")
        replicas, hedged = [], 0
        for _ in range(100):
            signal = client.score(MODEL, rows)
            assert signal.ok
            replicas.append(signal.replica)
        counted = client.statistics()
        assert replicas[-30:].count(fast.address) >= 25
        assert counted["hedges_won"] > 0
        hedged = counted["hedges"]
        slow.order("clear")
        until = time.monotonic() + 20
        while client.statistics()["replicas"][slow.address]["breaker"] != "closed":
            assert client.score(MODEL, rows).ok
            assert time.monotonic() < until, "it does not come back by itself"
            time.sleep(0.002)
        assert hedged <= 100


def test_threads_never_get_a_losers_answer(triton: Any, relays: tuple[str, list[Relay]]) -> None:
    slow, _ = relays[1]
    settings = Resilience(hedge_budget=1, breaker_failures=1_000_000)  # hedge all the time, never settle
    with connect(triton, relays, resilience=settings) as client:
        many = [np.full((1, 4), number / 100, np.float32) for number in range(100)]
        right = [client.score(MODEL, one).probabilities for one in many]
        slow.order("slow 20")

        def right_again(number: int) -> bool:
            place = number % 100
            return np.array_equal(client.score(MODEL, many[place]).probabilities, right[place])

        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(right_again, range(600)))
        counted = client.statistics()
        assert counted["hedges_won"] > 10
        assert {one["in_flight"] for one in counted["replicas"].values()} == {0}


def test_hedges_are_a_small_share(triton: Any, relays: tuple[str, list[Relay]], rows: np.ndarray) -> None:
    with connect(triton, relays) as client:
        warm(client, rows, 600)
        assert client.statistics()["hedges"] <= 0.05 * 600 + 10


def test_no_hedge_when_there_is_no_budget_for_any(
    triton: Any, relays: tuple[str, list[Relay]], rows: np.ndarray
) -> None:
    slow = relays[1][0]
    with connect(triton, relays, resilience=Resilience(hedge_budget=0)) as client:
        warm(client, rows)
        slow.order("slow 20")
        for _ in range(200):
            assert client.score(MODEL, rows).ok
            if client.statistics()["replicas"][slow.address]["breaker"] != "closed":
                break
        else:
            pytest.fail("slow answers alone do not show it")
        assert client.statistics()["hedges"] == 0


def test_both_silent_is_the_deadline(triton: Any, relays: tuple[str, list[Relay]], rows: np.ndarray) -> None:
    with connect(triton, relays) as client:
        warm(client, rows)
        for relay in relays[1]:
            relay.order("dark")
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError) as caught:
            client.score(MODEL, rows, deadline_ms=300)
        taken = time.monotonic() - began
        assert caught.value.attempts in (1, 2)  # one, when the other was just left alone for being slow
        assert 0.28 < taken < 0.6  # deadline + 10 % on an idle machine; these share theirs
        assert {one["in_flight"] for one in client.statistics()["replicas"].values()} == {0}


@pytest.mark.parametrize("unasked", ["settings", "ping", "window"])
def test_what_a_peer_says_of_itself_is_no_answer(unasked: str) -> None:
    said = {
        "settings": h2.frame(h2.SETTINGS, 0, 0),
        "ping": h2.frame(h2.SETTINGS, 0, 0) + h2.frame(h2.PING, 0, 0, bytes(8)),
        "window": h2.frame(h2.SETTINGS, 0, 0) + h2.frame(h2.WINDOW_UPDATE, 0, 0, (9).to_bytes(4, "big")),
    }[unasked]
    here, there = socket.socketpair()
    here.setblocking(False)
    with there:
        line = Stream(here, set())
        line.send(b"", b"request", time.monotonic_ns() + 10**9)
        there.sendall(said)
        assert not line.readable(time.monotonic_ns() + 20_000_000)
        assert not line.readable(0)
        there.sendall(h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 1, b"\x88"))
        assert line.readable(time.monotonic_ns() + 10**9)
        assert line.readable(0)
        assert line.receive(time.monotonic_ns() + 10**9).headers == {":status": "200"}
        line.close()


def test_the_end_and_nonsense_are_told_by_whoever_receives() -> None:
    for said, problem in ((b"", DisconnectedError), (h2.frame(h2.PING, 0, 0, bytes(8)), MalformedError)):
        here, there = socket.socketpair()
        here.setblocking(False)
        line = Stream(here, set())
        line.send(b"", b"request", time.monotonic_ns() + 10**9)
        there.sendall(said)
        there.shutdown(socket.SHUT_WR)
        assert line.readable(time.monotonic_ns() + 10**9)
        with pytest.raises(problem):
            line.receive(time.monotonic_ns() + 10**9)
        line.close()
        there.close()

"""Calls that decide nothing: before the first one, and while an engine is idle."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.relay import Relay
from tests.tickserve.conftest import MakeManifest
from tickserve.client import AsyncClient, Client, Decision, Hold
from tickserve.client import _warm as warming
from tickserve.client._check import Contract
from tickserve.client._local import LocalTransport
from tickserve.errors import (
    DeadlineExceededError,
    InputRejectedError,
    ModelNotFoundError,
    ProtocolError,
    TransportError,
    UsageError,
)
from tickserve.manifest import Provenance
from tickserve.testing import make_manifest as make_mock_manifest

MODEL = "hand-l1-gbdt"
SECONDS_MS = 5_000


class Heard:
    """An observer, and a fallback that remembers."""

    def __init__(self) -> None:
        self.decisions, self.remembered = list[Decision](), list[Any]()

    def decided(self, decision: Decision) -> None:
        self.decisions.append(decision)

    def answer(self, *_: Any) -> None:
        return None

    def remember(self, signal: Any) -> None:
        self.remembered.append(signal)


class Counted:
    """When the calls of this process's models began, how long each takes, and how many run at once."""

    def __init__(self) -> None:
        self.began, self.threads, self.slow_s = list[float](), set[str](), 0.0
        self.running = self.most = 0

    def wait_for(self, count: int) -> None:
        until(lambda: len(self.began) >= count)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def relays(triton: Any) -> Iterator[list[Relay]]:
    with Relay(triton.http) as one, Relay(triton.http) as other:
        yield [one, other]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counts, infer = Counted(), LocalTransport.infer

    def counting(self: LocalTransport, request: Any, deadline_ns: int) -> Any:
        counts.began.append(time.monotonic())
        counts.threads.add(threading.current_thread().name)
        counts.running += 1
        counts.most = max(counts.most, counts.running)
        try:
            time.sleep(counts.slow_s)
            return infer(self, request, deadline_ns)
        finally:
            counts.running -= 1

    monkeypatch.setattr(LocalTransport, "infer", counting)
    return counts


def nothing_counted(client: Any) -> None:
    told = client.statistics()
    assert (told["signals"], told["failures"], told["observer_errors"]) == ({}, {}, 0)
    for replica in told.get("replicas", {}).values():
        assert replica == {"breaker": "closed", "requests": 0, "failures": 0, "in_flight": 0}
    assert told.get("hedges", 0) == told.get("retries", 0) == 0


def test_every_replica_is_reached_and_nobody_is_told(triton: Any, relays: list[Relay], rows: np.ndarray) -> None:
    heard, names = Heard(), [relay.address for relay in relays]
    with Client(names, manifest=triton.folder, deadline_ms=SECONDS_MS, observer=heard, fallback=heard) as client:
        found = client.warm(deadline_ms=SECONDS_MS)
        assert [(each.replica, each.model, each.error) for each in found] == [(name, MODEL, None) for name in names]
        assert all(each.latency_us and each.latency_us > 0 for each in found)
        nothing_counted(client)
        assert not heard.decisions
        assert not heard.remembered
        pools = [replica.transport._pool for replica in client._transport.replicas]  # type: ignore[attr-defined]
        assert [len(pool._idle) for pool in pools] == [1, 1]  # the first call finds a connection
        assert client.score(MODEL, rows).ok
        assert (len(heard.decisions), len(heard.remembered)) == (1, 1)


@pytest.mark.parametrize("order", ["refuse", "dark"])
def test_a_replica_that_is_down_is_said_and_keeps_nobody_else_waiting(
    order: str, triton: Any, relays: list[Relay]
) -> None:
    relays[0].order(order)
    with Client([relay.address for relay in relays], manifest=triton.folder, deadline_ms=SECONDS_MS) as client:
        began = time.monotonic()
        down, up = client.warm(MODEL, deadline_ms=2_000)
        assert time.monotonic() - began < 5
        assert isinstance(down.error, TransportError if order == "refuse" else DeadlineExceededError)
        assert (down.latency_us, down.error.model, down.error.replica) == (None, MODEL, relays[0].address)
        assert (up.error, up.replica) == (None, relays[1].address)
        nothing_counted(client)


def test_another_model_than_the_pinned_one_is_found_before_the_session(
    triton: Any, make_manifest: MakeManifest
) -> None:
    manifest = make_manifest(provenance=Provenance(created="2024-01-01T00:00:00Z", seed=8))
    with Client(triton.http, manifest=manifest, deadline_ms=SECONDS_MS) as client:
        (found,) = client.warm(deadline_ms=SECONDS_MS)
        assert isinstance(found.error, ProtocolError)
        nothing_counted(client)


def test_wrong_arguments(triton: Any) -> None:
    with Client(triton.http, manifest=triton.folder) as client:
        for deadline_ms in (0, -1, float("nan"), "soon"):
            with pytest.raises(UsageError, match="deadline_ms"):
                client.warm(deadline_ms=deadline_ms)  # type: ignore[arg-type]
        with pytest.raises(ModelNotFoundError):
            client.warm("another")
        with pytest.raises(InputRejectedError):
            client.warm(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="closed"):
        client.warm()
    with Client(triton.http) as bare, pytest.raises(UsageError, match="no model is pinned"):
        bare.warm()
    for keep_warm_ms in (0, 0.5, -3, True, "often"):
        with pytest.raises(UsageError, match="keep_warm_ms"):
            Client(triton.http, manifest=triton.folder, keep_warm_ms=keep_warm_ms)  # type: ignore[arg-type]


def test_a_stateful_models_zeros_are_all_of_its_inputs() -> None:
    contract = Contract(make_mock_manifest(state=(2, 4)))
    zeros = contract.zeros()
    assert isinstance(zeros, dict)
    assert {name: array.shape for name, array in zeros.items()} == {"features": (1, 3), "hidden": (1, 2, 4)}
    assert contract.check_inputs(zeros).batch == 1


def test_in_process_the_session_is_run(published: Path, counted: Counted) -> None:
    with Client(f"local://{published}") as client:
        (found,) = client.warm()
        assert (found.replica, found.error, len(counted.began)) == ("local", None, warming.CALLS)
        counted.began.clear()
        counted.slow_s = 0.05
        (found,) = client.warm(deadline_ms=20)  # what has begun is not cut short, and nothing begins after it
        assert (found.error, len(counted.began)) == (None, 1)


@pytest.mark.parametrize("scheme", ["", "grpc://"])
def test_asyncio_warms_too(scheme: str, triton: Any, rows: np.ndarray) -> None:
    async def main() -> None:
        url = scheme + (triton.grpc if scheme else triton.http)
        async with AsyncClient(url, manifest=triton.folder, deadline_ms=SECONDS_MS) as client:
            (found,) = await client.warm(deadline_ms=SECONDS_MS)
            assert (found.replica, found.error) == (url.removeprefix("grpc://"), None)
            nothing_counted(client)
            assert (await client.score(MODEL, rows)).ok
        with pytest.raises(UsageError, match="closed"):
            await client.warm()

    asyncio.run(main())


def test_an_idle_client_is_kept_warm_and_nobody_is_told(published: Path, counted: Counted, rows: np.ndarray) -> None:
    heard = Heard()
    client = Client(f"local://{published}", keep_warm_ms=1, observer=heard, fallback=heard)
    counted.wait_for(5)
    nothing_counted(client)
    assert not heard.decisions
    assert not heard.remembered
    assert counted.threads == {"tickserve-keep-warm"}
    assert client.score(MODEL, rows).ok
    assert len(heard.decisions) == 1
    client.close()
    count = len(counted.began)
    assert not [thread for thread in threading.enumerate() if thread.name == "tickserve-keep-warm"]
    time.sleep(0.03)
    assert len(counted.began) == count


def test_a_client_that_is_called_is_left_alone(published: Path, counted: Counted, rows: np.ndarray) -> None:
    with Client(f"local://{published}", keep_warm_ms=2_000) as client:
        for _ in range(20):
            client.score(MODEL, rows)
            time.sleep(0.005)
        assert counted.threads == {"MainThread"}


def test_one_at_a_time_and_a_tenth_of_the_time(published: Path, counted: Counted) -> None:
    counted.slow_s = 0.02
    with Client(f"local://{published}", keep_warm_ms=1, deadline_ms=SECONDS_MS):
        counted.wait_for(3)
    assert counted.most == 1
    assert min(np.diff(counted.began)) > 0.19


def test_a_server_that_is_down_is_left_alone(triton: Any, caplog: pytest.LogCaptureFixture) -> None:
    with Relay(triton.http) as relay:
        relay.order("refuse")
        with Client(relay.address, manifest=triton.folder, keep_warm_ms=1, deadline_ms=SECONDS_MS) as client:
            keeper, tried = client._core.idle, list[float]()
            ask = keeper._ask  # type: ignore[union-attr]
            keeper._ask = lambda *given: tried.append(time.monotonic()) or ask(*given)  # type: ignore[union-attr]
            time.sleep(0.5)
            assert 1 <= len(tried) <= 6
            nothing_counted(client)
            assert not caplog.records
            relay.order("clear")
            pool = client._transport.replicas[0].transport._pool  # type: ignore[attr-defined]
            until(lambda: len(pool._idle) == 2)  # one for the next of these calls, one for the engine's meanwhile


@pytest.mark.parametrize("closed", [True, False])
def test_a_replica_whose_breaker_is_open_is_not_asked(closed: bool, triton: Any) -> None:
    with Client(triton.http, manifest=triton.folder, deadline_ms=SECONDS_MS) as client:
        breaker = client._transport.replicas[0].breaker  # type: ignore[attr-defined]
        for _ in range(0 if closed else 5):
            breaker.failed("a test")
        keeper = warming_keeper(client)
        (place,) = keeper.places
        assert keeper.wants(place, time.monotonic_ns()) is closed
        keeper.close()


def warming_keeper(client: Client) -> Any:
    from tickserve.client._keep_warm import Keeper

    return Keeper(client._core, client._transport, 3_000_000)


def test_a_round_stops_where_a_call_begins_and_takes_the_engines_models_in_turn(published: Path) -> None:
    with Client(f"local://{published}") as client:
        keeper = warming_keeper(client)
        assert keeper.begin()[0] == MODEL  # nothing was called yet
        for model in ("a", "b"):
            keeper.called(model, time.monotonic_ns())
        assert {keeper.begin()[0], keeper.begin()[0]} == {"a", "b"}
        _, began_ns = keeper.begin()
        assert keeper.wants(keeper.places[0], began_ns)
        keeper.called("a", time.monotonic_ns())
        assert not keeper.wants(keeper.places[0], began_ns)
        keeper.close()


def test_a_client_that_is_dropped_ends_its_thread(published: Path, counted: Counted) -> None:
    Client(f"local://{published}", keep_warm_ms=1)
    counted.wait_for(1)

    def gone() -> bool:
        gc.collect()  # while a call is under way, the thread holds the client
        return not [thread for thread in threading.enumerate() if thread.name == "tickserve-keep-warm"]

    until(gone)


CHILD = """
import os, sys, threading, time
import numpy as np
from tickserve.client import Client
from tickserve.client._local import LocalTransport

def kept(): return [thread for thread in threading.enumerate() if thread.name == "tickserve-keep-warm"]

client = Client("local://" + sys.argv[1], keep_warm_ms=1, deadline_ms=5_000)
time.sleep(0.05)
assert kept()
for _ in range(20):
    child = os.fork()
    if not child:
        ok = not kept() and client.score("hand-l1-gbdt", np.zeros((1, 4), np.float32)).ok and len(kept()) == 1
        time.sleep(0.01)
        client.close()
        os._exit(0 if ok and not kept() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert kept()
print("the end")
"""


def test_a_forked_child_has_its_own_and_none_keeps_a_process_alive(published: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(published)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONWARNINGS": ""})
    assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")


ENDING = """
import atexit, sys, threading, time

started, under_way = threading.Event(), []
atexit.register(lambda: print("under way" if under_way else "nothing is under way"))  # after what is registered later
from tickserve.client import Client
from tickserve.client._local import LocalTransport

infer = LocalTransport.infer

def slow(self, request, deadline_ns):
    under_way.append(1)
    started.set()
    time.sleep(0.1)
    try:
        return infer(self, request, deadline_ns)
    finally:
        under_way.pop()

LocalTransport.infer = slow
client = Client("local://" + sys.argv[1], keep_warm_ms=1, deadline_ms=5_000)
assert started.wait(10)
"""


def test_an_interpreter_that_ends_lets_the_call_end_that_is_under_way(published: Path) -> None:
    """One that did not was ended by ONNX Runtime (SIGABRT) when the thread was cut off inside it."""
    done = subprocess.run([sys.executable, "-c", ENDING, str(published)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing is under way\n", "")


def test_no_process_is_forked_while_a_call_is_under_way(published: Path, counted: Counted) -> None:
    counted.slow_s = 0.03
    with Client(f"local://{published}", keep_warm_ms=1, deadline_ms=SECONDS_MS):
        for _ in range(2):  # and it goes on after the first
            until(lambda: counted.running == 1)
            child = os.fork()
            if not child:
                os._exit(counted.running)  # a lock that this call held would be held for ever here
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_asyncio_is_kept_warm_too(published: Path, counted: Counted, rows: np.ndarray) -> None:
    async def idle(client: AsyncClient) -> None:
        counted.began.clear()
        end = time.monotonic() + 10
        while len(counted.began) < 4:
            assert time.monotonic() < end
            await asyncio.sleep(0.002)

    async def first() -> AsyncClient:
        async with AsyncClient(f"local://{published}", keep_warm_ms=1) as client:
            await idle(client)  # from the start, without a call
            nothing_counted(client)
        counted.began.clear()
        await asyncio.sleep(0.02)
        assert not counted.began
        return AsyncClient(f"local://{published}", keep_warm_ms=1)

    async def again(client: AsyncClient) -> None:
        assert (await client.score(MODEL, rows)).ok
        await idle(client)

    client = asyncio.run(first())
    for _ in range(2):  # another loop, where the first call begins it anew
        asyncio.run(again(client))
    client.close()


def test_asyncio_keeps_a_connection_for_a_call_meanwhile(triton: Any) -> None:
    async def main() -> None:
        async with AsyncClient(triton.http, manifest=triton.folder, keep_warm_ms=1, deadline_ms=SECONDS_MS) as client:
            line = client._transport.replicas[0].transport  # type: ignore[union-attr]
            end = time.monotonic() + 10
            while len(line._idle) < 2:  # type: ignore[attr-defined]
                assert time.monotonic() < end
                await asyncio.sleep(0.002)
            nothing_counted(client)

    asyncio.run(main())


def test_what_is_held_is_not_a_warm_call(triton: Any, relays: list[Relay]) -> None:
    held = Hold(ttl_ms=60_000)
    with Client(relays[0].address, manifest=triton.folder, deadline_ms=300, fallback=held) as client:
        assert client.warm(deadline_ms=SECONDS_MS)[0].error is None
        relays[0].order("refuse")
        assert client.score(MODEL, np.ones((1, 4), np.float32)).status == "UNAVAILABLE"

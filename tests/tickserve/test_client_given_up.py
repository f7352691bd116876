"""Calls that were given up: no server sees a cancel, nothing of them reaches the next call, and none is counted."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from tickserve.client import InferRequest, Resilience, Tensor, _parked
from tickserve.client._async_grpc import AsyncGrpcTransport
from tickserve.client._async_replicas import AsyncReplicas
from tickserve.client._grpc import GrpcTransport
from tickserve.client._latency import REFRESH
from tickserve.client._replicas import Replicas
from tickserve.client._url import parse_endpoint
from tickserve.errors import DeadlineExceededError, RequestError

PATIENCE_S = 10


class Server:
    """A server of gRPC's own. Requests whose identity begins with "slow" are answered once `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun: set[str] = set()
        self.active: dict[str, bool] = {}  # by slow request: whether its call still stood when it was answered
        self.connections: set[str] = set()
        self._threads = grpc.server(ThreadPoolExecutor(80))
        method = grpc.unary_unary_rpc_method_handler(
            self._answer,
            request_deserializer=service_pb2.ModelInferRequest.FromString,
            response_serializer=service_pb2.ModelInferResponse.SerializeToString,
        )
        service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": method})
        self._threads.add_generic_rpc_handlers((service,))
        self.authority = f"127.0.0.1:{self._threads.add_insecure_port('127.0.0.1:0')}"
        self._threads.start()
        self.transport = GrpcTransport(parse_endpoint(f"grpc://{self.authority}", None))

    def _answer(self, message: Any, context: grpc.ServicerContext) -> Any:
        self.connections.add(context.peer())
        self.begun.add(message.id)
        if message.id.startswith("slow"):
            self.go.wait(PATIENCE_S)
            self.active[message.id] = context.is_active()
        answer = service_pb2.ModelInferResponse(model_name="m", model_version="2", id=message.id)
        answer.outputs.add(name="p", datatype="FP32", shape=(1, 3))
        answer.raw_output_contents.append(bytes(12))
        return answer

    def ask(self, identity: str, ms: float = 5_000) -> str:
        return self.transport.infer(request(identity), time.monotonic_ns() + int(ms * 1e6)).request_id

    def stop(self) -> None:
        self.go.set()
        self.transport.close()
        self._threads.stop(0).wait(PATIENCE_S)


def within(seconds: float) -> int:
    return time.monotonic_ns() + int(seconds * 1e9)


def request(identity: str) -> InferRequest:
    return InferRequest("m", None, identity, 100_000, (Tensor("x", "FP32", (1, 4), bytes(16)),))


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    both = [Server(), Server()]
    yield both
    for one in both:
        one.stop()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_deadline_cancels_nothing_and_its_line_is_used_again(servers: list[Server]) -> None:
    one = servers[0]
    with pytest.raises(DeadlineExceededError):
        one.ask("slow", 100)
    assert one.ask("next") == "next"  # on a line of its own
    assert len(one.connections) == 2
    one.go.set()
    until(lambda: "slow" in one.active)
    assert one.active["slow"], "the server saw it cancelled"
    until(lambda: one.ask("again") == "again" and not one.transport._pool.parked)
    assert len(one.transport._pool._idle) == 2
    assert [one.ask(str(number)) for number in range(20)] == [str(number) for number in range(20)]
    assert len(one.connections) == 2


@pytest.mark.system
def test_a_lost_hedge_cancels_nothing(servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parked, "PARK_NS", 60 * 10**9)
    slow, fast = servers
    fast.go.set()
    settings = Resilience(hedge_budget=1, breaker_failures=1_000)
    both = Replicas([(one.authority, one.transport) for one in servers], settings)
    for number in range(REFRESH):  # how long a call usually takes is known from here on
        both.infer(request(f"warm{number}"), within(PATIENCE_S))
    for number in range(16):
        answer = both.infer(request(f"slow{number}"), within(PATIENCE_S))
        assert (answer.request_id, answer.replica) == (f"slow{number}", fast.authority)
    assert both.statistics()["hedges_won"] > 0
    slow.go.set()
    until(lambda: len(slow.active) == len(slow.transport._pool.parked) > 0)
    assert all(slow.active.values())
    assert slow.ask("next") == "next"


def test_parked_lines_are_bounded_and_end(servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    one, parked = servers[0], servers[0].transport._pool.parked
    monkeypatch.setattr(_parked, "MAX_PARKED", 4)
    monkeypatch.setattr(_parked, "PARK_NS", 60 * 10**9)
    for number in range(7):
        with pytest.raises(DeadlineExceededError):
            one.ask(f"slow{number}", 30)
        assert len(parked) <= 4
    assert len(parked) == 4
    monkeypatch.setattr(_parked, "PARK_NS", 50_000_000)
    with pytest.raises(DeadlineExceededError):
        one.ask("slow", 100)
    line = parked._lines[-1][0]
    until(lambda: one.ask("next") == "next" and line.fileno() == -1)
    assert len(parked) == 3  # whose time is longer
    one.transport.close()
    assert not parked


async def asked(transport: AsyncGrpcTransport, identity: str, ms: float = 5_000) -> str:
    return (await transport.infer(request(identity), time.monotonic_ns() + int(ms * 1e6))).request_id


async def parted(transport: AsyncGrpcTransport, identity: str) -> None:
    with pytest.raises(DeadlineExceededError):
        await asked(transport, identity, 100)


def test_over_asyncio_a_deadline_cancels_nothing_and_its_line_is_used_again(servers: list[Server]) -> None:
    one = servers[0]

    async def main() -> None:
        transport = AsyncGrpcTransport(parse_endpoint(f"grpc://{one.authority}", None))
        await parted(transport, "slow")
        cancelled = asyncio.create_task(asked(transport, "slow too"))
        async with asyncio.timeout(PATIENCE_S):
            while not {"slow", "slow too"} <= one.begun:
                await asyncio.sleep(0.005)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await asked(transport, "next") == "next"  # on a line of its own
        assert (len(one.connections), len(transport._parked)) == (3, 2)
        one.go.set()
        while transport._parked:
            await asyncio.sleep(0.005)
        assert one.active["slow"], "the server saw it cancelled"
        assert one.active["slow too"], "the server saw it cancelled"
        assert len(transport._idle) == 3
        names = [str(number) for number in range(60)]
        assert await asyncio.gather(*(asked(transport, name) for name in names[:3])) == names[:3]
        assert len(one.connections) == 3
        assert await asyncio.gather(*(asked(transport, name) for name in names)) == names
        transport.close()

    asyncio.run(main())


def test_over_asyncio_a_lost_hedge_cancels_nothing(servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parked, "PARK_NS", 60 * 10**9)
    slow, fast = servers
    fast.go.set()

    async def main() -> None:
        transports = [AsyncGrpcTransport(parse_endpoint(f"grpc://{one.authority}", None)) for one in servers]
        settings = Resilience(hedge_budget=1, breaker_failures=1_000)
        pairs = [(one.authority, transport) for one, transport in zip(servers, transports, strict=True)]
        both = AsyncReplicas(pairs, settings)
        for number in range(REFRESH):
            await both.infer(request(f"warm{number}"), within(PATIENCE_S))
        number = 0
        while both.statistics()["hedges_won"] < 2:  # who is asked first is drawn by lot
            number += 1
            assert number < 40
            answer = await both.infer(request(f"slow{number}"), within(PATIENCE_S))
            assert (answer.request_id, answer.replica) == (f"slow{number}", fast.authority)
        owed = len(transports[0]._parked)
        assert owed > 0
        slow.go.set()
        while transports[0]._parked:
            await asyncio.sleep(0.005)
        assert len(slow.active) == owed
        assert all(slow.active.values())
        both.close()

    asyncio.run(main())


def test_over_asyncio_parked_lines_are_bounded_and_end(servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    one = servers[0]
    monkeypatch.setattr(_parked, "MAX_PARKED", 4)
    monkeypatch.setattr(_parked, "PARK_NS", 60 * 10**9)

    async def main() -> None:
        transport = AsyncGrpcTransport(parse_endpoint(f"grpc://{one.authority}", None))
        await asyncio.gather(*(parted(transport, f"slow{number}") for number in range(7)))
        assert len(transport._parked) == 4
        monkeypatch.setattr(_parked, "PARK_NS", 50_000_000)
        await parted(transport, "slow")
        line = list(transport._parked)[-1]
        await asyncio.sleep(0.2)
        assert not line.open
        assert len(transport._parked) == 3  # whose time is longer
        transport.close()
        assert not transport._parked

    asyncio.run(main())


class BoomError(BaseException):
    """What the handler raises."""


# A socket that nobody held yet is closed as garbage, which Python remarks on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_a_handler_that_raises_anywhere_leaves_no_count_and_no_trial(servers: list[Server]) -> None:
    settings = Resilience(hedge_budget=1, breaker_failures=2, backoff_ms=1, max_backoff_ms=2)
    both = Replicas([(one.authority, one.transport) for one in servers], settings)

    armed = booms = number = 0

    def boom(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = 0
            raise BoomError

    before, end = signal.signal(signal.SIGALRM, boom), time.monotonic() + 2
    while time.monotonic() < end or (booms <= 20 and time.monotonic() < end + 60):
        number += 1
        left = 100_000 if number % 50 < 4 else 5 * 10**9  # some deadlines, for breakers to open and be tried
        one_call = request(str(number))
        try:
            armed = 1
            signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-5, 2e-3))
            with suppress(RequestError):
                assert both.infer(one_call, time.monotonic_ns() + left).request_id == one_call.request_id
            armed = 0
        except BoomError:
            booms += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert booms > 20
    assert {one["in_flight"] for one in both.statistics()["replicas"].values()} == {0}
    assert [len(one.transport._pool.busy) for one in servers] == [0, 0]

    def closed() -> bool:
        assert both.infer(request("after"), time.monotonic_ns() + 5 * 10**9).request_id == "after"
        return {one["breaker"] for one in both.statistics()["replicas"].values()} == {"closed"}

    time.sleep(0.01)
    until(closed)

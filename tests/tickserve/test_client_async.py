"""AsyncClient against the real Triton: the synchronous client's numbers, errors and resilience, and safe to cancel."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest

from benchmarks.relay import Relay
from tickserve.client import AsyncClient, Client, Hold, InferRequest, Resilience, Tensor
from tickserve.client._async_grpc import AsyncGrpcTransport
from tickserve.client._url import parse_endpoint
from tickserve.client._wire import MalformedError, whole_reply
from tickserve.errors import (
    CertificateError,
    DeadlineExceededError,
    InputRejectedError,
    ModelNotFoundError,
    ProtocolError,
    RequestError,
    TransportError,
    UnavailableError,
    UsageError,
)

MODEL = "hand-l1-gbdt"
SECONDS_MS = 5_000
TRANSPORTS = ("http", "grpc")


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(triton: Any, transport: str) -> str:
    return str(triton.urls[TRANSPORTS.index(transport)])


@pytest.fixture
def relays(triton: Any, transport: str) -> Iterator[list[Relay]]:
    target = triton.http if transport == "http" else triton.grpc
    with Relay(target) as one, Relay(target) as other:
        yield [one, other]


def client_of(triton: Any, relays: list[Relay], transport: str, **options: Any) -> AsyncClient:
    addresses = [relay.address for relay in relays]
    options = {"deadline_ms": SECONDS_MS} | options
    return AsyncClient(addresses, manifest=triton.folder, transport=transport, **options)  # type: ignore[arg-type]


def many(count: int = 64) -> list[np.ndarray]:
    return [np.full((1, 4), number / count, np.float32) for number in range(count)]


def test_the_same_bits_as_the_synchronous_client(triton: Any, url: str, rows: np.ndarray) -> None:
    with Client(url, manifest=triton.folder, deadline_ms=SECONDS_MS) as plain:
        right = plain.score(MODEL, rows)

    async def main() -> Any:
        async with AsyncClient(url, manifest=triton.folder, deadline_ms=SECONDS_MS) as client:
            return await client.score(MODEL, rows, newest_event_ns=time.time_ns())

    signal = asyncio.run(main())
    assert np.array_equal(signal.probabilities, right.probabilities)
    assert (signal.status, signal.version, signal.attempts) == ("OK", 1, 1)
    assert list(signal.stage_us) == list(right.stage_us)
    assert signal.replica == right.replica


def test_many_tasks_get_their_own_answers(triton: Any, url: str) -> None:
    async def main() -> None:
        async with AsyncClient(url, manifest=triton.folder, deadline_ms=SECONDS_MS) as client:
            right = [(await client.score(MODEL, one)).probabilities for one in many()]
            for _ in range(5):
                signals = await asyncio.gather(*(client.score(MODEL, one) for one in many()))
                assert all(np.array_equal(s.probabilities, r) for s, r in zip(signals, right, strict=True))

    asyncio.run(main())


def test_a_cancelled_call_poisons_nothing(triton: Any, url: str) -> None:
    async def main() -> None:
        async with AsyncClient(url, manifest=triton.folder, deadline_ms=SECONDS_MS) as client:
            right = [(await client.score(MODEL, one)).probabilities for one in many()]
            for turn in range(20):
                tasks = [asyncio.create_task(client.score(MODEL, one)) for one in many()]
                await asyncio.sleep(turn * 0.0003)
                for task in tasks[::2]:
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
                for signal, answer in zip(ended, right, strict=True):
                    if isinstance(signal, asyncio.CancelledError):
                        continue
                    assert not isinstance(signal, BaseException), signal
                    assert np.array_equal(signal.probabilities, answer)
            assert client.statistics()["failures"] == {}
            assert {one["breaker"] for one in client.statistics()["replicas"].values()} == {"closed"}

    asyncio.run(main())


def test_cancelled_among_replicas(triton: Any, relays: list[Relay], transport: str) -> None:
    async def main() -> None:
        settings = Resilience(hedge_budget=1)
        async with client_of(triton, relays, transport, resilience=settings) as client:
            right = [(await client.score(MODEL, one)).probabilities for one in many()]
            relays[0].order("slow 10")
            for turn in range(10):
                tasks = [asyncio.create_task(client.score(MODEL, one)) for one in many()]
                await asyncio.sleep(turn * 0.0005)
                for task in tasks[::2]:
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
                for signal, answer in zip(ended, right, strict=True):
                    if isinstance(signal, asyncio.CancelledError):
                        continue
                    assert not isinstance(signal, BaseException), signal
                    assert np.array_equal(signal.probabilities, answer)
            assert {one["in_flight"] for one in client.statistics()["replicas"].values()} == {0}

    asyncio.run(main())


def test_a_cancelled_grpc_call_is_not_cancelled_on_the_server() -> None:
    """Triton may die of it."""

    async def main() -> None:
        began, ended = asyncio.Queue[None](), []

        async def slow(_: bytes, context: Any) -> bytes:
            began.put_nowait(None)
            try:
                await asyncio.sleep(0.2)
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise
            ended.append("answered")
            return b""

        server = grpc.aio.server()
        method = grpc.unary_unary_rpc_method_handler(slow)
        name = "inference.GRPCInferenceService"
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"ModelInfer": method}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        transport = AsyncGrpcTransport(parse_endpoint(f"127.0.0.1:{port}", "grpc"))
        request = InferRequest("m", None, "abc", 2_000_000, (Tensor("x", "FP32", (1, 4), bytes(16)),))
        deadline_ns = time.monotonic_ns() + 5 * 10**9
        lone = asyncio.create_task(transport.infer(request, deadline_ns))
        beside = await transport.begin(request, deadline_ns, deadline_ns)
        for _ in range(2):
            await asyncio.wait_for(began.get(), 5)
        lone.cancel()
        beside.abandon()
        gc.collect()
        with pytest.raises(asyncio.CancelledError):
            await lone
        for _ in range(200):
            if len(ended) == 2:
                break
            await asyncio.sleep(0.02)
        assert ended == ["answered", "answered"]
        transport.close()
        await server.stop(1)

    asyncio.run(main())


def test_typed_errors_are_the_same(triton: Any, url: str, rows: np.ndarray, make_manifest: Any) -> None:
    async def main() -> None:
        client = AsyncClient(url, manifest=triton.folder, deadline_ms=SECONDS_MS)
        with pytest.raises(ModelNotFoundError) as caught:
            await client.score(MODEL, rows, version=99, request_id="r1")
        assert (caught.value.model, caught.value.request_id) == (MODEL, "r1")
        with pytest.raises(InputRejectedError):
            await client.score(MODEL, rows.astype(np.float64))
        with pytest.raises(DeadlineExceededError):
            await client.score(MODEL, rows, deadline_ms=0.001)
        client.repin(make_manifest(family="lstm"))
        with pytest.raises(ProtocolError, match="another model than the pinned one"):
            await client.score(MODEL, rows)
        client.close()
        client.close()
        with pytest.raises(UsageError, match="closed"):
            await client.score(MODEL, rows)

    asyncio.run(main())


def test_one_client_through_two_event_loops(triton: Any, url: str, rows: np.ndarray) -> None:
    client = AsyncClient(url, manifest=triton.folder, deadline_ms=SECONDS_MS)
    with warnings.catch_warnings():
        # Nobody closed the client before its loop went; asyncio says so of the connection that went with it.
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(2):
            assert asyncio.run(client.score(MODEL, rows)).ok
        client.close()
        del client
        gc.collect()


def test_a_refusing_replica_costs_nobody_an_answer(
    triton: Any, relays: list[Relay], transport: str, rows: np.ndarray
) -> None:
    async def main() -> None:
        async with client_of(triton, relays, transport) as client:
            assert (await client.score(MODEL, rows)).ok
            relays[0].order("refuse")
            for _ in range(10):
                signals = await asyncio.gather(*(client.score(MODEL, rows) for _ in range(16)))
                assert all(signal.ok for signal in signals)
            relays[0].order("clear")
            until = time.monotonic() + 10
            while client.statistics()["replicas"][relays[0].address]["breaker"] != "closed":
                assert (await client.score(MODEL, rows)).ok
                assert time.monotonic() < until, "it does not come back by itself"
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_replica_that_goes_dark_is_hedged(triton: Any, relays: list[Relay], transport: str, rows: np.ndarray) -> None:
    async def main() -> None:
        async with client_of(triton, relays, transport) as client:
            for _ in range(100):
                await client.score(MODEL, rows)
            relays[0].order("dark")
            for _ in range(40):
                assert (await client.score(MODEL, rows)).ok
            assert client.statistics()["hedges_won"] > 0

    asyncio.run(main())


def test_the_deadline_holds_when_nobody_answers(
    triton: Any, relays: list[Relay], transport: str, rows: np.ndarray
) -> None:
    async def main() -> None:
        async with client_of(triton, relays, transport) as client:
            for _ in range(40):
                await client.score(MODEL, rows)
            for relay in relays:
                relay.order("dark")
            began = time.monotonic()
            with pytest.raises(DeadlineExceededError):
                await client.score(MODEL, rows, deadline_ms=300)
            assert 0.28 < time.monotonic() - began < 0.6

    asyncio.run(main())


def test_all_down_is_said_at_once_and_has_its_fallback(make_manifest: Any, rows: np.ndarray) -> None:
    async def main() -> None:
        plain = AsyncClient(["127.0.0.1:1", "127.0.0.1:2"], manifest=make_manifest())
        errors = []
        for _ in range(12):
            with pytest.raises(TransportError) as caught:
                await plain.score(MODEL, rows)
            errors.append(type(caught.value))
        assert errors[0] is TransportError
        assert errors[-1] is UnavailableError
        flat = AsyncClient("127.0.0.1:1", manifest=make_manifest(), fallback="flat")
        assert (await flat.score(MODEL, rows)).fallback == "flat"
        hold = AsyncClient("127.0.0.1:1", manifest=make_manifest(), fallback=Hold(ttl_ms=100))
        assert (await hold.score(MODEL, rows)).status == "UNAVAILABLE"

    asyncio.run(main())


@pytest.mark.parametrize(
    "url", ["127.0.0.1:1", "localhost:1", "grpc://127.0.0.1:1", "no-such-host.invalid:1", "http->grpc", "grpc->http"]
)
def test_what_cannot_be_reached_is_said_in_the_words_of_the_synchronous_client(
    triton: Any, make_manifest: Any, rows: np.ndarray, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def look_up(host: Any, *others: Any, **named: Any) -> Any:
        if host == "no-such-host.invalid":  # a network may answer for any name, or not at all
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *others, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    url = {"http->grpc": triton.grpc, "grpc->http": f"grpc://{triton.http}"}.get(url, url)
    with Client(url, manifest=make_manifest(), deadline_ms=SECONDS_MS) as plain, pytest.raises(RequestError) as told:
        plain.score(MODEL, rows)

    async def main() -> None:
        async with AsyncClient(url, manifest=make_manifest(), deadline_ms=SECONDS_MS) as client:
            with pytest.raises(type(told.value)) as caught:
                await client.score(MODEL, rows)
            assert caught.value.args == told.value.args
            assert str(caught.value) == str(told.value)

    asyncio.run(main())
    if url == triton.grpc:
        assert "is this the server's gRPC port?" in str(told.value)


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_a_server_without_tls_is_a_certificate_error(
    triton: Any, make_manifest: Any, rows: np.ndarray, scheme: str
) -> None:
    async def main() -> None:
        for server in triton.urls:
            async with AsyncClient(f"{scheme}://{server.removeprefix('grpc://')}", manifest=make_manifest()) as client:
                with pytest.raises(CertificateError, match="no TLS with"):
                    await client.score(MODEL, rows, deadline_ms=SECONDS_MS)

    asyncio.run(main())


def test_two_event_loops_at_once_are_refused(triton: Any, url: str, rows: np.ndarray) -> None:
    client = AsyncClient(url, manifest=triton.folder, deadline_ms=SECONDS_MS)
    held, let_go = threading.Event(), threading.Event()

    async def first() -> None:
        assert (await client.score(MODEL, rows)).ok
        held.set()
        await asyncio.to_thread(let_go.wait, 10)
        assert (await client.score(MODEL, rows)).ok
        client.close()

    thread = threading.Thread(target=lambda: asyncio.run(first()))
    thread.start()
    assert held.wait(10)
    with pytest.raises(UsageError, match="two event loops"):
        asyncio.run(client.score(MODEL, rows))
    let_go.set()
    thread.join(10)


def test_local_in_the_loop(triton: Any, rows: np.ndarray) -> None:
    async def main() -> None:
        async with AsyncClient(f"local://{triton.repository}", deadline_ms=SECONDS_MS) as client:
            assert (await client.score(MODEL, rows)).ok

    asyncio.run(main())


def test_descriptors_come_back(triton: Any, url: str, rows: np.ndarray) -> None:
    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    async def main() -> None:
        async with AsyncClient(url, manifest=triton.folder, deadline_ms=SECONDS_MS) as client:
            await asyncio.gather(*(client.score(MODEL, rows) for _ in range(32)))
        await asyncio.sleep(0.05)

    asyncio.run(main())
    before = held()
    for _ in range(3):
        asyncio.run(main())
    after = held()
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 1


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (HEAD + b"hello", b"hello"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"hello", b"hello"),
        (CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
        (CHUNKED + b"2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nTrailer: z\r\n\r\n", b"hello"),
    ],
)
def test_a_reply_is_whole_with_its_last_byte_and_not_before(data: bytes, body: bytes) -> None:
    for size in range(len(data)):
        assert whole_reply(data[:size]) is None
    reply = whole_reply(data)
    assert reply is not None
    assert reply.data[reply.start :] == body
    with pytest.raises(MalformedError):
        whole_reply(data + b"x")


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 20_000,
        CHUNKED + b"zz\r\n",
        CHUNKED + b"5\r\nhelloXX",
        CHUNKED + b"7" * 20_000,
        CHUNKED + b"FFFFFFFF\r\n",
        CHUNKED + b"0\r\n" + b"t" * 20_000,
    ],
)
def test_what_can_never_become_a_reply_is_refused_at_once(data: bytes) -> None:
    with pytest.raises(MalformedError):
        whole_reply(data)

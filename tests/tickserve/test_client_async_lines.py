"""Connections of an event loop: whose answer is whose, what a call that was given up leaves, and what closes when."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.tickserve.http2_peer import BEGIN, Peer, Script, answer
from tickserve.client import InferRequest, Tensor, _parked
from tickserve.client import _h2 as h2
from tickserve.client._async_grpc import AsyncGrpcTransport
from tickserve.client._async_http import AsyncHttpTransport
from tickserve.client._h2_line import Stream
from tickserve.client._url import parse_endpoint
from tickserve.errors import DeadlineExceededError, TransportError

REQUEST = InferRequest("m", None, "abc", 2_000_000, (Tensor("x", "FP32", (1, 4), bytes(16)),))
GOODBYE = h2.frame(h2.GOAWAY, 0, 0, (1).to_bytes(4, "big") + bytes(4))


@pytest.fixture
def peer() -> Iterator[Callable[[Script], tuple[Peer, AsyncGrpcTransport]]]:
    started: list[Peer] = []

    def start(script: Script) -> tuple[Peer, AsyncGrpcTransport]:
        server = Peer(script)
        started.append(server)
        return server, AsyncGrpcTransport(parse_endpoint(server.url, "grpc"))

    yield start
    for server in started:
        server.close()


async def ask(transport: Any, ms: float = 5_000) -> str:
    return str((await transport.infer(REQUEST, time.monotonic_ns() + int(ms * 1e6))).request_id)


async def give_up(transport: Any, ms: float = 300) -> None:
    with pytest.raises(DeadlineExceededError):
        await ask(transport, ms)


async def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def when(*gates: threading.Event) -> Script:
    """Answer the requests one after another, each once its gate is open."""
    left = list(gates)

    def script(peer: Peer, sock: socket.socket, stream: int) -> None:
        left.pop(0).wait(10)
        sock.sendall((BEGIN if stream == 1 else b"") + answer(stream))

    return script


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


def test_a_line_that_was_parked_serves_again_past_its_time(peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parked, "PARK_NS", 10**9)
    first, second = threading.Event(), threading.Event()
    server, transport = peer(when(first, second))

    async def main() -> None:
        await give_up(transport)
        parked = time.monotonic()
        first.set()
        await until(lambda: len(transport._idle) == 1)
        call = asyncio.create_task(ask(transport))
        await asyncio.sleep(parked + 1.2 - time.monotonic())
        second.set()
        assert await call == "abc"  # answered when the first call's place would long have ended
        transport.close()

    run(main)
    assert server.connections == 1


def test_the_deadline_of_a_cancelled_call_ends_no_later_call_on_its_line(peer: Any) -> None:
    gates = threading.Event(), threading.Event()
    server, transport = peer(when(*gates))

    async def main() -> None:
        began = time.monotonic()
        first = asyncio.create_task(ask(transport, ms=1_000))
        await until(lambda: server.requests == 1)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        gates[0].set()
        await until(lambda: len(transport._idle) == 1)
        call = asyncio.create_task(ask(transport))
        await asyncio.sleep(began + 1.2 - time.monotonic())
        gates[1].set()
        assert await call == "abc"
        transport.close()

    run(main)
    assert server.connections == 1


def test_a_parked_line_that_is_closed_as_it_is_used_again_costs_no_call(peer: Any) -> None:
    go = threading.Event()

    def script(peer: Peer, sock: socket.socket, stream: int) -> None:
        if stream == 1 and peer.connections == 1:
            go.wait(10)
        if stream > 1:
            sock.shutdown(socket.SHUT_RDWR)
        else:
            sock.sendall(BEGIN + answer(stream))

    server, transport = peer(script)

    async def main() -> None:
        await give_up(transport)
        go.set()
        await until(lambda: len(transport._idle) == 1)
        assert await ask(transport) == "abc"
        transport.close()

    run(main)
    assert server.connections == 2


def test_a_parked_line_that_ends_is_nobodys_next_connection(peer: Any) -> None:
    """The end of one and the answer of another come in one look of the loop, and whoever is answered asks again."""
    silent: list[socket.socket] = []

    def script(peer: Peer, sock: socket.socket, stream: int) -> None:
        if peer.connections == 1:
            silent.append(sock)
        elif peer.connections == 2 and silent:
            time.sleep(0.05)
            sock.sendall(BEGIN + answer(stream) + GOODBYE)
            silent.pop().shutdown(socket.SHUT_RDWR)
        else:
            sock.sendall((BEGIN if stream == 1 else b"") + answer(stream))

    _, transport = peer(script)

    async def main() -> None:
        await give_up(transport)

        async def twice() -> list[str]:
            return [await ask(transport), await ask(transport)]

        task = asyncio.create_task(twice())
        await asyncio.sleep(0.02)
        time.sleep(0.1)
        assert await task == ["abc", "abc"]
        transport.close()

    run(main)


def test_a_first_connection_that_breaks_is_an_error(peer: Any) -> None:
    server, transport = peer(lambda peer, sock, stream: sock.shutdown(socket.SHUT_RDWR))

    async def main() -> None:
        with pytest.raises(TransportError):
            await ask(transport)
        transport.close()

    run(main)
    assert (server.connections, server.requests) == (1, 1)


def test_a_silent_deadline_drops_the_idle_neighbours(peer: Any) -> None:
    dark = threading.Event()

    def script(peer: Peer, sock: socket.socket, stream: int) -> None:
        if not dark.is_set():
            data = (BEGIN if stream == 1 else b"") + answer(stream)
            time.sleep(0.02)
            sock.sendall(data[:-5])
            time.sleep(0.02)
            sock.sendall(data[-5:])

    _, transport = peer(script)

    async def main() -> None:
        await asyncio.gather(*(ask(transport) for _ in range(3)))
        assert len(transport._idle) == 3
        dark.set()
        await give_up(transport)
        assert not transport._idle
        transport.close()

    run(main)


def test_a_slow_answer_that_began_drops_nobody(peer: Any) -> None:
    slow = threading.Event()

    def script(peer: Peer, sock: socket.socket, stream: int) -> None:
        data = (BEGIN if stream == 1 else b"") + answer(stream)
        if slow.is_set():
            data = data[:-5]
        else:
            time.sleep(0.02)
        sock.sendall(data)

    _, transport = peer(script)

    async def main() -> None:
        await asyncio.gather(*(ask(transport) for _ in range(3)))
        slow.set()
        await give_up(transport, ms=1_000)
        assert len(transport._idle) == 2
        transport.close()

    run(main)


def test_what_ends_after_the_close_is_closed(peer: Any) -> None:
    first, second = threading.Event(), threading.Event()
    server, transport = peer(when(first, second))

    async def main() -> None:
        call = asyncio.create_task(ask(transport))
        await until(lambda: server.requests == 1)
        transport.close()
        first.set()
        assert await call == "abc"
        assert not transport._idle
        await give_up(transport)
        assert not transport._parked

    run(main)
    second.set()


def test_an_http_connection_that_owes_an_answer_is_closed_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parked, "PARK_NS", 60 * 10**9)
    ended = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError), listener.accept()[0] as sock:
            while sock.recv(65_536):
                pass
            ended.set()

    thread = threading.Thread(target=serve)
    thread.start()
    transport = AsyncHttpTransport(parse_endpoint(f"127.0.0.1:{listener.getsockname()[1]}", "http"))

    async def main() -> None:
        await give_up(transport)
        assert not transport._parked
        assert await asyncio.to_thread(ended.wait, 10)

    run(main)
    thread.join(5)
    listener.close()


def test_a_line_that_was_torn_is_never_settled() -> None:
    """By a signal's handler that raises, for example, while bytes were on their way into the conversation."""
    here, there = socket.socketpair()
    here.setblocking(False)
    with there:
        line = Stream(here, set())
        line.send(b"", b"request", time.monotonic_ns() + 10**9)
        feed = line._talk.feed
        line._talk = _Torn(line._talk)  # type: ignore[assignment]
        there.sendall(BEGIN + answer(1)[:20])
        with pytest.raises(KeyboardInterrupt):
            line.receive(time.monotonic_ns() + 10**9)
        line._talk = feed.__self__  # type: ignore[attr-defined]
        there.sendall(answer(1)[20:])
        assert not line.settled()
        assert line.owed
        line.close()


class _Torn:
    """A conversation whose feeding is interrupted."""

    def __init__(self, talk: h2.Conversation) -> None:
        self._talk = talk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._talk, name)

    def feed(self, data: bytes) -> None:
        raise KeyboardInterrupt

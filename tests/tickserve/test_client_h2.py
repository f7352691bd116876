"""HTTP/2 that no good server speaks: a raw socket that says what the test tells it to, frame by frame.

What a thread makes of it and what an event loop makes of it is held to the same.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from tests.tickserve.http2_peer import BEGIN, GOOD_END, HEAD, VALUES, Peer, Script, answer, message
from tickserve.client import InferRequest, InferResponse, Tensor
from tickserve.client import _h2 as h2
from tickserve.client._async_grpc import AsyncGrpcTransport
from tickserve.client._grpc import GrpcTransport
from tickserve.client._hpack import literal
from tickserve.client._url import parse_endpoint
from tickserve.errors import DeadlineExceededError, ProtocolError, RequestError, ServerRejectedError, TransportError


class OnALoop:
    """The transport of asyncio behind the calls of the other one; its loop turns while a call is under way."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._transport = AsyncGrpcTransport(parse_endpoint(url, "grpc"))

    def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        return self._loop.run_until_complete(self._transport.infer(request, deadline_ns))

    def idle(self) -> int:
        return sum(line.open for line in self._transport._idle)

    def turn(self, seconds: float) -> None:
        self._loop.run_until_complete(asyncio.sleep(seconds))

    def close(self) -> None:
        self._transport.close()
        self.turn(0.01)
        self._loop.close()


class OnAThread(GrpcTransport):
    def __init__(self, url: str) -> None:
        super().__init__(parse_endpoint(url, "grpc"))

    def idle(self) -> int:
        return len(self._pool._idle)


Transport = OnAThread | OnALoop


@pytest.fixture(params=[OnAThread, OnALoop], ids=["thread", "loop"])
def peer(request: pytest.FixtureRequest) -> Iterator[Callable[[Script], tuple[Peer, Transport]]]:
    opened: list[Any] = []

    def start(script: Script) -> tuple[Peer, Transport]:
        server = Peer(script)
        transport = request.param(server.url)
        opened.extend((transport, server))
        return server, transport

    yield start
    for item in opened:
        item.close()


def ask(transport: Transport, ms: float = 2_000) -> InferResponse:
    request = InferRequest("m", None, "abc", 2_000_000, (Tensor("x", "FP32", (1, 4), bytes(16)),))
    return transport.infer(request, time.monotonic_ns() + int(ms * 1e6))


def good(response: InferResponse) -> bool:
    return response.request_id == "abc" and np.array_equal(response.outputs["p"], VALUES)


def says(*parts: bytes) -> Script:
    return lambda peer, sock, stream: sock.sendall((BEGIN if stream == 1 else b"") + b"".join(parts))


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_a_good_answer_in_any_pieces(peer: Any, size: int) -> None:
    def drip(peer: Peer, sock: socket.socket, stream: int) -> None:
        data = (BEGIN if stream == 1 else b"") + answer(stream)
        for at in range(0, len(data), size):
            sock.sendall(data[at : at + size])
            time.sleep(0.0005)

    server, transport = peer(drip)
    for _ in range(3):
        assert good(ask(transport))
    assert (server.connections, server.requests) == (1, 3)


def test_a_large_answer_in_pieces_is_joined_once(peer: Any) -> None:
    values = np.arange(100_000, dtype=np.float32)[None]
    large = service_pb2.ModelInferResponse(model_name="m", model_version="2", id="abc")
    large.outputs.add(name="p", datatype="FP32", shape=values.shape)
    large.raw_output_contents.append(values.tobytes())
    data = large.SerializeToString()

    def drip(peer: Peer, sock: socket.socket, stream: int) -> None:
        whole = (BEGIN if stream == 1 else b"") + answer(stream, b"\0" + len(data).to_bytes(4, "big") + data)
        for at in range(0, len(whole), 7_777):
            sock.sendall(whole[at : at + 7_777])
            time.sleep(0.0002)

    server, transport = peer(drip)
    for _ in range(3):
        assert np.array_equal(ask(transport).outputs["p"], values)
    assert server.connections == 1


def test_what_else_may_come_between_changes_nothing(peer: Any) -> None:
    def chatty(peer: Peer, sock: socket.socket, stream: int) -> None:
        data = message()
        sock.sendall(
            (BEGIN if stream == 1 else b"")
            + h2.frame(h2.PING, 0, 0, b"12345678")
            + h2.frame(h2.WINDOW_UPDATE, 0, 0, (100).to_bytes(4, "big"))
            + h2.frame(0xEE, 0xFF, stream, b"of a later protocol")
            + h2.frame(h2.HEADERS, h2.END_HEADERS, stream, literal(":status", "103"))
            + h2.frame(h2.HEADERS, h2.PADDED | h2.WITH_PRIORITY, stream, b"\x02" + bytes(5) + HEAD[:3] + b"\0\0")
            + h2.frame(h2.CONTINUATION, h2.END_HEADERS, stream, HEAD[3:])
            + h2.frame(h2.DATA, h2.PADDED, stream, b"\x03" + data[:10] + bytes(3))
            + h2.frame(h2.SETTINGS, 0, 0, h2.settings({h2.MAX_FRAME_SIZE: 2**20, 0xFF: 1}))
            + h2.frame(h2.DATA, 0, stream, data[10:])
            + h2.frame(h2.DATA, 0, stream)
            + h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, stream, b"\x20" + GOOD_END)
        )

    server, transport = peer(chatty)
    for _ in range(3):
        assert good(ask(transport))
    assert server.connections == 1
    pings = [each for each in server.frames if each[0] == h2.PING]
    assert pings[:2] == [(h2.PING, h2.ACK, 0, b"12345678")] * 2


MALFORMED = {
    "http/1": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "no settings": h2.frame(h2.HEADERS, h2.END_HEADERS, 1, HEAD),
    "huge frame": BEGIN + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
    "data first": BEGIN + h2.frame(h2.DATA, 0, 1, message()),
    "another stream": BEGIN + answer(3),
    "push": BEGIN + h2.frame(h2.PUSH_PROMISE, h2.END_HEADERS, 1, bytes(4) + HEAD),
    "interrupted": BEGIN + h2.frame(h2.HEADERS, 0, 1, HEAD) + h2.frame(h2.PING, 0, 0, bytes(8)),
    "continuation of nothing": BEGIN + h2.frame(h2.CONTINUATION, h2.END_HEADERS, 1, HEAD),
    "two heads": BEGIN + h2.frame(h2.HEADERS, h2.END_HEADERS, 1, HEAD) * 2,
    "trailers that do not end": BEGIN
    + h2.frame(h2.HEADERS, h2.END_HEADERS, 1, HEAD)
    + h2.frame(h2.HEADERS, h2.END_HEADERS, 1, GOOD_END),
    "no status": BEGIN + h2.frame(h2.HEADERS, h2.END_HEADERS, 1, GOOD_END),
    "dynamic table": BEGIN + h2.frame(h2.HEADERS, h2.END_HEADERS, 1, b"\xbe"),
    "table asked for": BEGIN + h2.frame(h2.HEADERS, h2.END_HEADERS, 1, b"\x3f\xe1\x1f" + HEAD),
    "cut block": BEGIN + h2.frame(h2.HEADERS, h2.END_HEADERS, 1, HEAD[:-3]),
    "endless length": BEGIN + h2.frame(h2.HEADERS, h2.END_HEADERS, 1, b"\x00\x7f" + b"\xff" * 9),
    "large block": BEGIN + h2.frame(h2.HEADERS, 0, 1, bytes(10_000)) + h2.frame(h2.CONTINUATION, 0, 1, bytes(10_000)),
    "padding": BEGIN + h2.frame(h2.HEADERS, h2.END_HEADERS | h2.PADDED, 1, b"\xff" + HEAD),
    "ping of seven": BEGIN + h2.frame(h2.PING, 0, 0, bytes(7)),
    "settings of seven": h2.frame(h2.SETTINGS, 0, 0, bytes(7)),
    "window": h2.frame(h2.SETTINGS, 0, 0, h2.settings({h2.INITIAL_WINDOW_SIZE: 2**31})),
    "window of nothing": BEGIN + h2.frame(h2.WINDOW_UPDATE, 0, 0, bytes(4)),
    "window overflow": BEGIN + h2.frame(h2.WINDOW_UPDATE, 0, 0, (2**31 - 1).to_bytes(4, "big")) * 2,
    "frame size": h2.frame(h2.SETTINGS, 0, 0, h2.settings({h2.MAX_FRAME_SIZE: 100})),
    "flood": BEGIN * (h2.MAX_FRAMES + 10),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=list(MALFORMED))
def test_what_is_no_http2_is_a_protocol_error_at_once(peer: Any, data: bytes) -> None:
    server, transport = peer(lambda peer, sock, stream: sock.sendall(data))
    began = time.monotonic()
    with pytest.raises(ProtocolError):
        ask(transport, ms=5_000)
    assert time.monotonic() - began < 4
    assert not transport.idle()
    assert server.requests == 1


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", ProtocolError),
        (message()[:-1], ProtocolError),
        (message() * 2, ProtocolError),
        (message() + b"\xa0\x01\x05", ProtocolError),  # a field of a later schema, beyond the length
        (b"\1" + message()[1:], ProtocolError),
        (message()[:5] + bytes(len(message()) - 5), ProtocolError),
    ],
    ids=["none", "cut", "two", "more", "compressed", "zeros"],
)
def test_what_is_no_grpc_message(peer: Any, data: bytes, kind: type) -> None:
    _, transport = peer(lambda peer, sock, stream: sock.sendall(BEGIN + answer(stream, data)))
    with pytest.raises(kind):
        ask(transport)


@pytest.mark.parametrize(
    ("trailers", "kind"),
    [
        (b"\x88" + literal("grpc-status", "4"), DeadlineExceededError),
        (b"\x88" + literal("grpc-status", "13") + literal("grpc-message", "b%C3%B6se%0a x"), ServerRejectedError),
        (b"\x88" + literal("grpc-status", "99"), ServerRejectedError),
        (b"\x88" + literal("grpc-status", "-1"), ServerRejectedError),
        (b"\x88" + literal("grpc-status", "9" * 5_000), ServerRejectedError),
        (b"\x88", ProtocolError),
        (literal(":status", "502"), RequestError),
    ],
)
def test_answers_that_are_only_a_status(peer: Any, trailers: bytes, kind: type) -> None:
    whole = h2.END_HEADERS | h2.END_STREAM
    _, transport = peer(lambda peer, sock, stream: sock.sendall(BEGIN + h2.frame(h2.HEADERS, whole, stream, trailers)))
    with pytest.raises(kind):
        ask(transport)


def test_a_connection_the_server_leaves_is_replaced_and_the_call_made_once_more(peer: Any) -> None:
    """The server's goodbye may lie unread in an idle connection: it says that it has not looked at the call."""
    heard, gone = threading.Semaphore(0), threading.Semaphore(0)

    def leave(peer: Peer, sock: socket.socket, stream: int) -> None:
        if stream == 1:
            goodbye = h2.frame(h2.PING, 0, 0, bytes(8)) + h2.frame(h2.GOAWAY, 0, 0, (1).to_bytes(4, "big") + bytes(4))
            sock.sendall(BEGIN + answer(stream))
            heard.acquire(timeout=10)
            with suppress(OSError):
                sock.sendall(goodbye)
                sock.shutdown(socket.SHUT_RDWR)
            gone.release()

    server, transport = peer(leave)
    for _ in range(3):
        assert good(ask(transport))
        heard.release()
        assert gone.acquire(timeout=10)
    assert (server.connections, server.requests) == (3, 3)


def test_between_calls_a_loop_answers_pings_and_hears_a_goodbye() -> None:
    goodbye = h2.frame(h2.GOAWAY, 0, 0, (1).to_bytes(4, "big") + bytes(4))
    heard, pong = threading.Semaphore(0), (h2.PING, h2.ACK, 0, b"12345678")

    def ping(peer: Peer, sock: socket.socket, stream: int) -> None:
        sock.sendall((BEGIN if stream == 1 else b"") + answer(stream))
        heard.acquire(timeout=10)
        sock.sendall(h2.frame(h2.PING, 0, 0, b"12345678"))

    server = Peer(ping)
    transport = OnALoop(server.url)

    def turn_until(true: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not true() and time.monotonic() < end:
            transport.turn(0.01)

    try:
        assert good(ask(transport))
        heard.release()
        turn_until(lambda: pong in server.frames)
        assert pong in server.frames
        server.script = lambda peer, sock, stream: None
        assert transport.idle() == 1
        with pytest.raises(DeadlineExceededError):
            ask(transport, ms=100)

        def leave(peer: Peer, sock: socket.socket, stream: int) -> None:
            sock.sendall(BEGIN + answer(stream))
            heard.acquire(timeout=10)
            sock.sendall(goodbye)

        server.script = leave
        assert good(ask(transport))
        assert transport.idle() == 1
        heard.release()
        turn_until(lambda: transport.idle() == 0)
        assert transport.idle() == 0
    finally:
        transport.close()
        server.close()


def test_a_goodbye_behind_an_answer_ends_the_connection(peer: Any) -> None:
    goodbye = h2.frame(h2.GOAWAY, 0, 0, (1).to_bytes(4, "big") + bytes(4))
    server, transport = peer(lambda peer, sock, stream: sock.sendall(BEGIN + answer(stream) + goodbye))
    for calls in range(1, 4):
        assert good(ask(transport))
        assert (server.connections, transport.idle()) == (calls, 0)


@pytest.mark.parametrize(
    ("data", "closes", "requests"),
    [
        (h2.frame(h2.RST_STREAM, 0, 3, (2).to_bytes(4, "big")), False, 2),  # in the middle of it: not sent twice
        (h2.frame(h2.HEADERS, h2.END_HEADERS, 3, HEAD), True, 2),
        (h2.frame(h2.RST_STREAM, 0, 3, (7).to_bytes(4, "big")), False, 3),  # refused before it was looked at
        (h2.frame(h2.GOAWAY, 0, 0, (1).to_bytes(4, "big") + bytes(4)), False, 3),
        (h2.frame(h2.PING, 0, 0, bytes(8)), True, 3),
        (b"", True, 3),
    ],
    ids=["reset", "cut", "refused", "goodbye", "closed after a ping", "closed"],
)
def test_what_may_have_been_scored_is_not_sent_again(peer: Any, data: bytes, closes: bool, requests: int) -> None:
    def script(peer: Peer, sock: socket.socket, stream: int) -> None:
        if peer.connections == 1 and stream > 1:
            sock.sendall(data)
            if closes:
                sock.shutdown(socket.SHUT_RDWR)
        else:
            sock.sendall(BEGIN + answer(stream))

    server, transport = peer(script)
    assert good(ask(transport))
    if requests == 2:
        with pytest.raises(TransportError):
            ask(transport)
    else:
        assert good(ask(transport))
    assert server.requests == requests


def test_the_deadline_holds_against_a_peer_that_drips_frames(peer: Any) -> None:
    def drip(peer: Peer, sock: socket.socket, stream: int) -> None:
        sock.sendall(BEGIN)
        for _ in range(1_000):
            sock.sendall(h2.frame(h2.PING, 0, 0, bytes(8)))
            time.sleep(0.005)

    _, transport = peer(drip)
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        ask(transport, ms=200)
    assert 0.2 <= time.monotonic() - began < 1


def large(size: int, seconds: float = 2) -> tuple[InferRequest, int]:
    """A request of so many bytes, and its deadline."""
    tensors = (Tensor("x", "FP32", (1, size // 4), bytes(size)),)
    return InferRequest("m", None, "abc", 10**7, tensors), time.monotonic_ns() + int(seconds * 1e9)


def wider(stream: int, size: int) -> bytes:
    return h2.frame(h2.WINDOW_UPDATE, 0, stream, size.to_bytes(4, "big"))


def test_a_small_window_is_kept_to(peer: Any) -> None:
    """The peer takes 1000 bytes at a time; a request larger than that goes out as its windows open."""
    received: list[int] = []

    def say(stream: int, flags: int, size: int) -> bytes:
        received.append(size)
        return answer(stream) if flags & h2.END_STREAM else wider(stream, 1_000)

    server, transport = peer(says())
    server.keep_window(1_000, say)
    assert good(ask(transport))  # learns the settings
    received.clear()
    assert good(transport.infer(*large(10_000)))
    assert len(received) > 10
    assert max(received) <= 1_000
    assert sum(received) > 10_000


def test_an_answer_before_the_whole_request_ends_the_connection(peer: Any) -> None:
    """The server has not heard the rest, and does not wait for it: nothing more may be said to it."""
    server, transport = peer(says())
    server.keep_window(1_000, lambda stream, flags, size: answer(stream))
    for _ in range(4):  # the first on a connection is sent before the peer's window is known, and is heard to its end
        assert good(transport.infer(*large(10_000)))
    assert (server.connections, transport.idle()) == (2, 0)


def test_updates_of_a_window_byte_by_byte_are_no_flood(peer: Any) -> None:
    def say(stream: int, flags: int, size: int) -> bytes:
        return answer(stream) if flags & h2.END_STREAM else wider(stream, 1) + h2.frame(h2.PING, 0, 0, bytes(8))

    server, transport = peer(says())
    server.keep_window(1, say)
    for _ in range(2):  # the first learns of the window
        assert good(transport.infer(*large(6_000, seconds=20)))


def test_a_part_of_an_answer_is_an_answer_that_began(peer: Any) -> None:
    """Whatever the pieces: what may have been scored is not asked for again."""

    def script(peer: Peer, sock: socket.socket, stream: int) -> None:
        if stream == 1:
            sock.sendall(BEGIN + answer(stream))
        else:
            sock.sendall(h2.frame(h2.PING, 0, 0, bytes(8)) + answer(stream)[:12])
            sock.shutdown(socket.SHUT_RDWR)

    server, transport = peer(script)
    assert good(ask(transport))
    with pytest.raises(TransportError):
        ask(transport)
    assert server.requests == 2


@pytest.mark.parametrize("pause_s", [0.0, 0.02])
def test_a_deadline_that_the_server_tells_twice(peer: Any, pause_s: float) -> None:
    def twice(peer: Peer, sock: socket.socket, stream: int) -> None:
        if peer.requests > 1:
            sock.sendall((BEGIN if stream == 1 else b"") + answer(stream))
            return
        end = h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, stream, HEAD + literal("grpc-status", "4"))
        sock.sendall(BEGIN + end)
        time.sleep(pause_s)
        sock.sendall(end)

    _, transport = peer(twice)
    with pytest.raises(DeadlineExceededError):
        ask(transport)
    time.sleep(2 * pause_s)
    assert good(ask(transport))

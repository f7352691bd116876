"""Answers no good server gives: a raw socket that says what the test tells it to, byte by byte."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickserve.client import InferRequest, InferResponse, Tensor
from tickserve.client._http import HttpTransport, decode
from tickserve.client._url import parse_endpoint
from tickserve.client._wire import MalformedError, Reply, parse_head
from tickserve.errors import (
    DeadlineExceededError,
    ModelNotFoundError,
    OverloadedError,
    ProtocolError,
    RequestError,
    ServerRejectedError,
    TransportError,
)

Script = Callable[[socket.socket, int], None]
ID = "abc"


class Peer:
    """Reads a whole request on each connection, then runs the script; counts connections and requests."""

    def __init__(self, script: Script) -> None:
        self._script, self.connections, self.requests = script, 0, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                self._open.append(sock)
                thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with suppress(OSError):
            while read_request(sock):
                self.requests += 1
                self._script(sock, self.requests)
        sock.close()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)


def read_request(sock: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = sock.recv(65_536)
        if not chunk:
            return b""
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
    while len(body) < length:
        body += sock.recv(65_536)
    return head + b"\r\n\r\n" + body


@pytest.fixture
def peer() -> Iterator[Callable[[Script], tuple[Peer, HttpTransport]]]:
    opened: list[Any] = []

    def start(script: Script) -> tuple[Peer, HttpTransport]:
        server = Peer(script)
        transport = HttpTransport(parse_endpoint(server.url, "http"))
        opened.extend((transport, server))
        return server, transport

    yield start
    for item in opened:
        item.close()


def ask(transport: HttpTransport, ms: float = 2_000, data: bytes = bytes(16)) -> InferResponse:
    request = InferRequest("m", None, ID, 1_000, (Tensor("x", "FP32", (1, len(data) // 4), data),))
    return transport.infer(request, time.monotonic_ns() + int(ms * 1e6))


def body(header: Any, *arrays: np.ndarray) -> tuple[bytes, bytes]:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return text, text + b"".join(array.tobytes() for array in arrays)


def header(**changes: Any) -> dict[str, Any]:
    output = {"name": "p", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": 12}}
    return {"id": ID, "model_name": "m", "model_version": "2", "outputs": [output]} | changes


VALUES = np.array([[0.25, 0.25, 0.5]], np.float32)


def answer(extra: bytes = b"", status: bytes = b"200 OK", value: Any = None) -> bytes:
    text, whole = body(header() if value is None else value, VALUES)
    head = b"HTTP/1.1 %b\r\nInference-Header-Content-Length: %d\r\nContent-Length: %d\r\n%b\r\n"
    return head % (status, len(text), len(whole), extra) + whole


def chunked(sizes: int = 7) -> bytes:
    text, whole = body(header(), VALUES)
    chunks = b"".join(
        b"%x;note=1\r\n%b\r\n" % (len(part), part)
        for part in (whole[at : at + sizes] for at in range(0, len(whole), sizes))
    )
    head = b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(text)
    return head + chunks + b"0\r\nTrailer: x\r\n\r\n"


def good(response: InferResponse) -> bool:
    return (response.model, response.version, response.request_id) == ("m", 2, ID) and np.array_equal(
        response.outputs["p"], VALUES
    )


@pytest.mark.parametrize("data", [answer(), chunked(), chunked(1), b"HTTP/1.1 100 Continue\r\n\r\n" + answer()])
@pytest.mark.parametrize("step", [1, 50, 10_000])
def test_a_good_answer_however_it_is_cut(peer: Any, data: bytes, step: int) -> None:
    def drip(sock: socket.socket, _: int) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(data), step):
            sock.sendall(data[at : at + step])

    server, transport = peer(drip)
    assert good(ask(transport))
    assert good(ask(transport))
    assert (server.connections, server.requests) == (1, 2)


@pytest.mark.parametrize("identity", [None, "", "other"])
def test_the_id_is_the_servers_not_ours(peer: Any, identity: str | None) -> None:
    value = header(id=identity)
    if identity is None:
        del value["id"]
    _, transport = peer(lambda sock, _: sock.sendall(answer(value=value)))
    assert ask(transport).request_id == (identity or "")


def test_a_second_id_is_not_overlooked(peer: Any) -> None:
    text = b'{"id":"abc",' + json.dumps(header(id="other")).encode()[1:]
    _, transport = peer(lambda sock, _: sock.sendall(answer(value=text)))
    assert ask(transport).request_id == "other"


def once(data: bytes, *, close: bool = True) -> Script:
    def script(sock: socket.socket, _: int) -> None:
        sock.sendall(data)
        if close:
            sock.shutdown(socket.SHUT_RDWR)

    return script


MALFORMED = {
    "not http": b"SSH-2.0-OpenSSH_9.2\r\n",
    "http/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + b"\x00" * 20,
    "random": bytes(range(256)),
    "status": b"HTTP/1.1 two OK\r\nContent-Length: 0\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: 2\r\n\r\n{}",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    "signed length": b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "length and chunked": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
    "enormous": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"X-A: " + b"a" * 40_000,
    "nameless header": b"HTTP/1.1 200 OK\r\n: 1\r\nContent-Length: 0\r\n\r\n",
    "folded header": b"HTTP/1.1 200 OK\r\nA: 1\r\n b\r\nContent-Length: 0\r\n\r\n",
    "more than its length": answer() + b"X",
    "chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    "chunk end": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhello\r\n0\r\n\r\n",
    "chunk too big": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n",
    "after the chunks": chunked() + b"X",
    "json answer": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    "absurd json length": b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: 999999\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("name", sorted(MALFORMED))
def test_malformed_answers_are_protocol_errors_at_once(peer: Any, name: str) -> None:
    _, transport = peer(once(MALFORMED[name], close=False))
    began = time.monotonic()
    with pytest.raises(ProtocolError) as caught:
        ask(transport, ms=4_000)
    assert time.monotonic() - began < 2
    assert len(str(caught.value)) < 300


def test_plaintext_to_a_tls_port_says_what_to_use(peer: Any) -> None:
    _, transport = peer(once(b"\x15\x03\x01\x00\x02\x02\x16", close=False))
    with pytest.raises(TransportError, match=r"speaks TLS \(https:// or grpcs://\)"):
        ask(transport, ms=4_000)


@pytest.mark.parametrize("cut", [1, 12, 60, len(answer()) - 1])
def test_an_answer_cut_short_is_no_answer_and_not_asked_again(peer: Any, cut: int) -> None:
    server, transport = peer(lambda sock, n: once(answer() if n == 1 else answer()[:cut], close=n > 1)(sock, n))
    assert good(ask(transport))
    with pytest.raises(TransportError, match="inside the answer"):
        ask(transport)
    assert server.requests == 2


def test_a_reset_inside_the_answer(peer: Any) -> None:
    def script(sock: socket.socket, _: int) -> None:
        sock.sendall(answer()[:40])
        time.sleep(0.05)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    _, transport = peer(script)
    with pytest.raises(TransportError, match="inside the answer"):
        ask(transport)


def test_a_stale_connection_is_replaced_once(peer: Any) -> None:
    server, transport = peer(lambda sock, n: once(answer() if n != 2 else b"", close=n in (1, 2))(sock, n))
    assert good(ask(transport))  # the server closes after this answer
    time.sleep(0.05)
    with pytest.raises(TransportError, match="before the answer"):
        ask(transport)  # sent again on a new connection, which the server closes as well: not a third time
    assert good(ask(transport))
    assert (server.connections, server.requests) == (3, 3)


def test_a_fresh_connection_is_not_sent_twice(peer: Any) -> None:
    server, transport = peer(once(b""))
    with pytest.raises(TransportError, match="before the answer"):
        ask(transport)
    assert server.requests == 1


def test_connection_close_is_honoured(peer: Any) -> None:
    server, transport = peer(once(answer(b"Connection: close\r\n")))
    assert good(ask(transport))
    assert good(ask(transport))
    assert server.connections == 2


def slow_drip(sock: socket.socket, _: int) -> None:
    for byte in answer():
        sock.sendall(bytes((byte,)))
        time.sleep(0.02)


@pytest.mark.parametrize("ms", [0.7, 5, 100])
@pytest.mark.parametrize("script", [lambda sock, n: time.sleep(0.5), slow_drip], ids=["silent", "drip"])
def test_the_deadline_holds_whatever_the_peer_does(peer: Any, script: Script, ms: float) -> None:
    _, transport = peer(script)
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        ask(transport, ms=ms)
    # A busy machine may be late; a peer may not make it so: the answers would take half a second and more.
    assert time.monotonic() - began < ms / 1e3 + 0.1


def test_the_deadline_covers_sending(peer: Any) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        transport = HttpTransport(parse_endpoint(f"127.0.0.1:{listener.getsockname()[1]}", "http"))
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError, match="sending"):
            ask(transport, ms=60, data=bytes(50_000_000))  # nobody reads
        assert time.monotonic() - began < 0.5
        transport.close()


def test_after_a_deadline_the_connection_is_not_used_again(peer: Any) -> None:
    def late(sock: socket.socket, n: int) -> None:
        time.sleep(0.1 if n == 1 else 0)
        sock.sendall(answer())

    server, transport = peer(late)
    with pytest.raises(DeadlineExceededError):
        ask(transport, ms=20)
    assert good(ask(transport))
    assert server.connections == 2


def warm_up(transport: HttpTransport, count: int) -> None:
    """Leave `count` idle connections in the pool."""
    barrier = threading.Barrier(count)

    def call() -> None:
        barrier.wait(5)
        ask(transport)

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(transport._pool._idle) == count


def slow_then(script: Script, silent: threading.Event) -> Script:
    def run(sock: socket.socket, n: int) -> None:
        if silent.is_set():
            script(sock, n)
        else:
            time.sleep(0.1)  # so that calls overlap and each opens a connection
            sock.sendall(answer())

    return run


def test_one_silent_connection_costs_one_deadline_not_one_for_each_idle_one(peer: Any) -> None:
    silent = threading.Event()
    server, transport = peer(slow_then(lambda sock, _: None, silent))
    warm_up(transport, 8)
    silent.set()
    with pytest.raises(DeadlineExceededError):
        ask(transport, ms=150)
    assert len(transport._pool._idle) == 0
    silent.clear()
    assert good(ask(transport))
    assert server.connections == 9


def test_an_answer_that_only_comes_late_leaves_the_other_connections(peer: Any) -> None:
    slow = threading.Event()
    _, transport = peer(slow_then(lambda sock, _: sock.sendall(answer()[:40]), slow))
    warm_up(transport, 4)
    slow.set()
    with pytest.raises(DeadlineExceededError):
        ask(transport, ms=2_500)  # its beginning came: the path lives
    assert len(transport._pool._idle) == 3


def test_a_vanished_peer_is_noticed_within_13_seconds(peer: Any) -> None:
    _, transport = peer(lambda sock, _: sock.sendall(answer()))
    ask(transport)
    sock = transport._pool._idle[0]._sock
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 1
    idle = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
    assert idle + sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 13
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 13_000


FULL = """
import resource, sys, time
from tickserve.client._http import HttpTransport
from tickserve.client import InferRequest, Tensor
from tickserve.client._url import parse_endpoint
from tickserve.errors import TransportError

tensor = Tensor("x", "FP32", (1,), bytes(4))
transport = HttpTransport(parse_endpoint(sys.argv[1], None))
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
files = []
try:
    while True:
        files.append(open("/dev/null"))
except OSError:
    pass
try:
    transport.infer(InferRequest("m", None, "i", 1, (tensor,)), time.monotonic_ns() + 10**9)
except TransportError as error:
    print("typed:", error)
"""


def test_no_descriptor_left_is_a_typed_error(peer: Any) -> None:
    server, _ = peer(once(answer()))
    done = subprocess.run([sys.executable, "-c", FULL, server.url], capture_output=True, text=True, timeout=30)
    assert "typed: cannot connect" in done.stdout, done.stderr
    assert "Too many open files" in done.stdout


def test_large_requests_and_answers(peer: Any) -> None:
    big = np.arange(300_000, dtype=np.float32).reshape(1, -1)
    output = {"name": "p", "datatype": "FP32", "shape": list(big.shape), "parameters": {"binary_data_size": big.nbytes}}
    text, whole = body(header(outputs=[output]), big)
    head = b"HTTP/1.1 200 OK\r\ninference-header-content-length: %d\r\ncontent-length: %d\r\n\r\n"
    _, transport = peer(lambda sock, _: sock.sendall(head % (len(text), len(whole)) + whole))
    assert np.array_equal(ask(transport, data=big.tobytes()).outputs["p"], big)


HEADERS = {
    "not json": b"{{{{",
    "list": [1, 2],
    "deep": b"[" * 50_000,
    "no outputs": {"model_name": "m", "model_version": "1"},
    "no model": header(model_name=None) | {"model_version": None},
    "datatype": header(
        outputs=[{"name": "p", "datatype": "FP64", "shape": [1], "parameters": {"binary_data_size": 8}}]
    ),
    "json data": header(outputs=[{"name": "p", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]),
    "negative": header(
        outputs=[{"name": "p", "datatype": "FP32", "shape": [-1, -3], "parameters": {"binary_data_size": 12}}]
    ),
    "size": header(outputs=[{"name": "p", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": 8}}]),
    "short": header(
        outputs=[{"name": "p", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}]
    ),
    "text size": header(
        outputs=[{"name": "p", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": "12"}}]
    ),
    "huge": header(
        outputs=[{"name": "p", "datatype": "FP32", "shape": [0, 10**30], "parameters": {"binary_data_size": 0}}]
    ),
    "hundred dimensions": header(
        outputs=[{"name": "p", "datatype": "FP32", "shape": [1] * 100, "parameters": {"binary_data_size": 4}}]
    ),
    "number as version": header(model_version=2),
    "negative version": header(model_version="-3"),
    "underscore in version": header(model_version="1_0"),
    "twice": header(
        outputs=[
            {"name": "p", "datatype": "FP32", "shape": [s], "parameters": {"binary_data_size": 4 * s}} for s in (1, 2)
        ]
    ),
}


@pytest.mark.parametrize("name", sorted(HEADERS))
def test_answers_whose_description_does_not_fit(peer: Any, name: str) -> None:
    _, transport = peer(once(answer(value=HEADERS[name]), close=False))
    with pytest.raises(ProtocolError):
        ask(transport)


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (b"404 Not Found", "Request for unknown model: 'm' is not found", ModelNotFoundError),
        (b"400 Bad Request", "Request for unknown model: 'm' has no available versions", ModelNotFoundError),
        (b"503 Service Unavailable", "Request for unknown model: 'm' is not at ready state", OverloadedError),
        (b"503 Service Unavailable", "Server is stopping, no new requests", OverloadedError),
        (b"503 Service Unavailable", "Request timeout expired", DeadlineExceededError),
        (b"503 Service Unavailable", "Exceeds maximum queue size", OverloadedError),
        (b"500 Internal Server Error", "failed at /opt/tritonserver/secret/model.py:3\nTraceback", ServerRejectedError),
        (b"400 Bad Request", "x" * 100_000, ServerRejectedError),
    ],
)
def test_the_servers_errors_are_typed_and_show_no_path(peer: Any, status: bytes, message: str, kind: type) -> None:
    text = json.dumps({"error": message}).encode()
    whole = b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(text), text)
    server, transport = peer(once(whole, close=False))
    for _ in range(2):
        with pytest.raises(RequestError) as caught:
            ask(transport)
        assert type(caught.value) is kind
        assert "/opt" not in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
    assert server.connections == 1


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_malformed(data: bytes) -> None:
    for head in (data, b"HTTP/1.1 200 OK\r\n" + data, b"HTTP/1.1 200 OK\r\nContent-Length: " + data):
        with suppress(MalformedError):
            parsed = parse_head(head)
            assert parsed.length is None or parsed.length >= 0


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(answer()) - 1), st.integers(0, 255))
def test_one_changed_byte_never_goes_unnoticed_as_a_crash(position: int, byte: int) -> None:
    data = bytearray(answer())
    data[position] = byte
    head, _, rest = bytes(data).partition(b"\r\n\r\n")
    with suppress(MalformedError, RequestError):
        response = decode(Reply(parse_head(head), rest, 0), ID)
        assert all(array.dtype in (np.float32, np.int64) for array in response.outputs.values())

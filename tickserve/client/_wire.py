"""A kept-alive HTTP/1.1 connection on a bare TCP socket: one exchange at a time, one absolute deadline.

The socket never blocks: it sends, waits with poll for what is left until the deadline, and receives. That is two system
calls a wait cheaper than a socket timeout, which is set again on every change, and it holds against a peer that drips.
"""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Sequence
from functools import lru_cache
from time import monotonic_ns
from typing import Any, NamedTuple

from tickserve.client._transport import MAX_BODY_BYTES

MAX_HEAD_BYTES = 16 * 1024
RECEIVE_BYTES = 16 * 1024
JOIN_BYTES = 64 * 1024
FD_SETSIZE = 1024
NS_PER_MS = 1_000_000
KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 1), ("TCP_USER_TIMEOUT", 13_000))

Address = tuple[Any, ...]  # (host, port), and two numbers more for IPv6


class WireError(Exception):
    """The connection cannot be used any more."""


class DeadlinePassedError(WireError):
    """The deadline passed while connecting, sending or waiting."""


class UnreachableError(WireError):
    """The connection could not be made."""


class DisconnectedError(WireError):
    """The peer went away; `answered` says whether a byte of its answer had arrived."""

    def __init__(self, message: str, *, answered: bool) -> None:
        super().__init__(message)
        self.answered = answered


class MalformedError(WireError):
    """What arrived is not the HTTP that was asked for."""


class Head(NamedTuple):
    """What matters of a response head. `length` None means chunked."""

    status: int
    length: int | None
    inference_header: int | None
    keep_alive: bool


class Reply(NamedTuple):
    """A whole response: the body is `data[start:]`."""

    head: Head
    data: bytes
    start: int


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise MalformedError(f"{name}: expected a number, was {text[:40]!r}")
    return int(text)


def _headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, separator, value = line.partition(":")
        name = name.lower()
        if not separator or not name or name != name.strip():
            raise MalformedError(f"a header line without a name: {line[:40]!r}")
        value = value.strip(" \t")
        if name in headers and headers[name] != value and name in ("content-length", "inference-header-content-length"):
            raise MalformedError(f"{name} is given twice")
        headers[name] = value
    return headers


def _status(line: str) -> tuple[int, bool]:
    version, _, rest = line.partition(" ")
    code = rest[:3]
    if version not in ("HTTP/1.1", "HTTP/1.0") or not (code.isascii() and code.isdigit() and len(code) == 3):
        raise MalformedError(f"expected an HTTP/1.1 status line, was {line[:40]!r}")
    return int(code), version == "HTTP/1.1"


@lru_cache(maxsize=64)  # a server answers one shape with the same head, byte for byte
def parse_head(head: bytes) -> Head:
    """The response head, up to and without its empty line. Raises MalformedError."""
    lines = head.decode("latin-1").split("\r\n")
    status, persistent = _status(lines[0])
    headers = _headers(lines[1:])
    encoding = headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise MalformedError(f"content-encoding: expected none, was {encoding[:40]!r}")
    chunked = "transfer-encoding" in headers
    if chunked and (headers["transfer-encoding"].lower() != "chunked" or "content-length" in headers):
        raise MalformedError("transfer-encoding: expected 'chunked' alone")
    length = None
    if not chunked and not 100 <= status < 200:
        if "content-length" not in headers:
            raise MalformedError("content-length: expected a number, was none")
        length = _number("content-length", headers["content-length"])
        if length > MAX_BODY_BYTES:
            raise MalformedError(f"content-length: expected at most {MAX_BODY_BYTES} bytes, was {length}")
    inference = headers.get("inference-header-content-length")
    keep = headers.get("connection", "keep-alive" if persistent else "close").lower() != "close"
    number = None if inference is None else _number("inference-header-content-length", inference)
    return Head(status, length, number, keep)


def _set_options(sock: socket.socket) -> None:
    """Send at once, and notice a peer that vanished: probed after 10 s of silence, given up 3 s later."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE:
        if hasattr(socket, name):  # they differ between systems
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _connect(family: int, address: Address, deadline_ns: int) -> socket.socket:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:  # no descriptor left
        raise UnreachableError(error.strerror or type(error).__name__) from error
    try:
        _set_options(sock)
        code = sock.connect_ex(address)
        if code == errno.EINPROGRESS:
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            _wait(sock, poll, deadline_ns, write=True)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise UnreachableError(errno.errorcode.get(code, str(code)))
    except (OSError, UnicodeError) as error:
        sock.close()
        raise UnreachableError(getattr(error, "strerror", None) or type(error).__name__) from error
    except WireError:
        sock.close()
        raise
    return sock


class Connection:
    """One TCP connection to the first of `addresses` that accepts, before `deadline_ns`. Raises WireError."""

    __slots__ = ("_poll", "_sock", "heard", "used")

    def __init__(self, addresses: Sequence[tuple[int, Address]], deadline_ns: int) -> None:
        problem: WireError = UnreachableError("the host name has no address")
        self.used = False  # whether an exchange has gone well on it
        self.heard = False  # whether a byte has come in the exchange that goes on
        for family, address in addresses:
            try:
                self._sock = _connect(family, address, deadline_ns)
                break
            except UnreachableError as error:
                problem = error
        else:
            raise problem
        self._poll = select.poll()
        self._poll.register(self._sock, select.POLLIN)

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._sock.close()

    def exchange(self, head: bytes, payload: bytes, deadline_ns: int) -> Reply:
        """Send a request, receive its response. Raises WireError; the connection must then be closed."""
        self.send(head, payload, deadline_ns)
        return self.receive(deadline_ns)

    def fileno(self) -> int:
        """The socket's descriptor, to wait for several connections at once."""
        return self._sock.fileno()

    def readable(self, until_ns: int) -> bool:
        """Whether something came (an answer, or the end) before `until_ns`."""
        try:
            _wait(self._sock, self._poll, until_ns, write=False)
        except DeadlinePassedError:
            return False
        return True

    def send(self, head: bytes, payload: bytes, deadline_ns: int) -> None:
        """The first half of an exchange. Raises WireError; the connection must then be closed."""
        self.heard = False
        if len(payload) <= JOIN_BYTES:
            parts: tuple[bytes, ...] = (head + payload,)
        else:
            parts = (head, payload)
        for part in parts:
            try:
                sent = self._sock.send(part)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                raise DisconnectedError("while sending", answered=False) from error
            if sent < len(part):
                self._send_rest(memoryview(part)[sent:], deadline_ns)

    def _send_rest(self, rest: memoryview, deadline_ns: int) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        while rest:
            _wait(self._sock, poll, deadline_ns, write=True)
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise DisconnectedError("while sending", answered=False) from error

    def _more(self, deadline_ns: int, *, answered: bool) -> bytes:
        while True:
            _wait(self._sock, self._poll, deadline_ns, write=False)
            try:
                data = self._sock.recv(RECEIVE_BYTES)
            except BlockingIOError:  # woken without data
                continue
            except OSError as error:
                raise DisconnectedError("while waiting for the answer", answered=answered) from error
            if not data:
                raise DisconnectedError("the server closed the connection", answered=answered)
            return data

    def receive(self, deadline_ns: int) -> Reply:
        """The second half of an exchange. Raises WireError; the connection must then be closed."""
        reply = self._receive(deadline_ns)
        self.used = True
        return reply

    def _receive(self, deadline_ns: int) -> Reply:
        data = self._more(deadline_ns, answered=False)
        self.heard = True
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0 or end > MAX_HEAD_BYTES:
                _check_beginning(data)
                data += self._more(deadline_ns, answered=True)
                continue
            head = parse_head(data[:end])
            if head.status >= 200:
                break
            data = data[end + 4 :] or self._more(deadline_ns, answered=True)  # 100 Continue and its kind
        if head.length is None:
            return Reply(head, self._chunked(data[end + 4 :], deadline_ns), 0)
        total = end + 4 + head.length
        if len(data) < total:
            data = self._until(data, total, deadline_ns)
        if len(data) > total:
            raise MalformedError(f"content-length: expected {head.length} bytes, was more")
        return Reply(head, data, end + 4)

    def _until(self, data: bytes, total: int, deadline_ns: int) -> bytes:
        buffer = bytearray(data)
        while len(buffer) < total:
            buffer += self._more(deadline_ns, answered=True)
        return bytes(buffer)

    def _chunked(self, data: bytes, deadline_ns: int) -> bytes:
        buffer, body = bytearray(data), bytearray()
        while size := self._chunk_size(buffer, deadline_ns):
            if len(body) + size > MAX_BODY_BYTES:
                raise MalformedError(f"chunked body: expected at most {MAX_BODY_BYTES} bytes")
            while len(buffer) < size + 2:
                buffer += self._more(deadline_ns, answered=True)
            if buffer[size : size + 2] != b"\r\n":
                raise MalformedError("a chunk does not end where its size says")
            body += buffer[:size]
            del buffer[: size + 2]
        self._trailer(buffer, deadline_ns)
        return bytes(body)

    def _chunk_size(self, buffer: bytearray, deadline_ns: int) -> int:
        line = self._line(buffer, deadline_ns).partition(b";")[0].strip()
        if not 1 <= len(line) <= 8 or line.strip(b"0123456789abcdefABCDEF"):
            raise MalformedError(f"chunk size: expected hexadecimal digits, was {line[:40]!r}")
        return int(line, 16)

    def _line(self, buffer: bytearray, deadline_ns: int) -> bytes:
        while (end := buffer.find(b"\r\n")) < 0:
            if len(buffer) > MAX_HEAD_BYTES:
                raise MalformedError(f"a line of more than {MAX_HEAD_BYTES} bytes")
            buffer += self._more(deadline_ns, answered=True)
        line = bytes(buffer[:end])
        del buffer[: end + 2]
        return line

    def _trailer(self, buffer: bytearray, deadline_ns: int) -> None:
        for _ in range(64):
            if not self._line(buffer, deadline_ns):
                break
        if buffer:
            raise MalformedError("bytes after the last chunk")


def _check_beginning(data: bytes) -> None:
    """Refuse at once what can never become a response head, rather than at the deadline."""
    if not data.startswith(b"HTTP/1."[: len(data)]):
        raise MalformedError(f"expected an HTTP/1.1 status line, was {data[:40]!r}")
    if len(data) > MAX_HEAD_BYTES:
        raise MalformedError(f"response head: expected at most {MAX_HEAD_BYTES} bytes")


def _wait(sock: socket.socket, poll: select.poll, deadline_ns: int, *, write: bool) -> None:
    """Return when `sock` is ready (or broken: the next call tells). Raises DeadlinePassedError."""
    remaining = deadline_ns - monotonic_ns()
    if remaining >= NS_PER_MS:
        if poll.poll(remaining // NS_PER_MS):
            return
        remaining = deadline_ns - monotonic_ns()
    if remaining <= 0:
        raise DeadlinePassedError("sending" if write else "waiting for the answer")
    # poll counts whole milliseconds; select counts microseconds, but only for low descriptors.
    if sock.fileno() >= FD_SETSIZE:
        ready = bool(poll.poll(1))
    else:
        watched = [sock]
        ready = any(select.select([] if write else watched, watched if write else [], [], remaining / 1e9))
    if not ready:
        raise DeadlinePassedError("sending" if write else "waiting for the answer")

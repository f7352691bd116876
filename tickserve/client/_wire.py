"""HTTP/1.1 on a kept-alive connection: one exchange at a time, one absolute deadline."""

from __future__ import annotations

from functools import lru_cache
from socket import socket
from typing import NamedTuple

from tickserve.client._socket import (
    JOIN_BYTES,
    Address,
    DeadlinePassedError,
    DisconnectedError,
    Line,
    MalformedError,
    SecureExpectedError,
    UnreachableError,
    WireError,
)
from tickserve.client._transport import MAX_BODY_BYTES, named

__all__ = [
    "Address",
    "Connection",
    "DeadlinePassedError",
    "DisconnectedError",
    "Head",
    "MalformedError",
    "Reply",
    "UnreachableError",
    "WireError",
    "parse_head",
]

MAX_HEAD_BYTES = 16 * 1024
TLS_ALERT = b"\x15\x03"
HTTP2_SETTINGS = b"\x04"  # the kind of the first frame, behind its length in three bytes


class Head(NamedTuple):
    """What matters of a response head. `length` None means chunked."""

    status: int
    length: int | None
    inference_header: int | None
    keep_alive: bool


class Reply(NamedTuple):
    """A whole response: the body is `data[start:]`."""

    head: Head
    data: bytes | bytearray
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


class Connection(Line):
    """A line that speaks HTTP/1.1."""

    __slots__ = ("_head", "_seen")

    def __init__(self, sock: socket, busy: set[Line]) -> None:
        super().__init__(sock, busy)
        # The head of the last answer with its empty line, as it came and as it was read: the next one's is the same.
        self._seen: bytes | None = None
        self._head = Head(0, 0, None, False)

    def exchange(self, head: bytes, payload: bytes, deadline_ns: int) -> Reply:
        """Send a request, receive its response. Raises WireError; the connection must then be closed."""
        self.send(head, payload, deadline_ns)
        return self.receive(deadline_ns)

    def send(self, head: bytes, payload: bytes, deadline_ns: int) -> None:
        """Send a request. Raises WireError; the connection must then be closed."""
        self.heard = False
        if len(payload) <= JOIN_BYTES:
            self.put(head + payload, deadline_ns)
        else:
            self.put(head, deadline_ns)
            self.put(payload, deadline_ns)

    def receive(self, deadline_ns: int) -> Reply:
        """The response to what was sent. Raises WireError; the connection must then be closed."""
        reply = self._receive(deadline_ns)
        self.used, self.reusable = True, reply.head.keep_alive
        return reply

    def _receive(self, deadline_ns: int) -> Reply:
        data = self.more(deadline_ns)
        seen = self._seen
        if seen is None or not data.startswith(seen):
            data, seen = self._whole_head(data, deadline_ns)
        head, start = self._head, len(seen)
        if head.length is None:
            return Reply(head, self._chunked(data[start:], deadline_ns), 0)
        total = start + head.length
        if len(data) < total:
            return Reply(head, self._until(data, total, deadline_ns), start)
        if len(data) > total:
            raise MalformedError(f"content-length: expected {head.length} bytes, was more")
        return named(Reply, (head, data, start))

    def _whole_head(self, data: bytes, deadline_ns: int) -> tuple[bytes, bytes]:
        """Wait for the head of the answer and read it; what has come with it and after it, and itself."""
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0 or end > MAX_HEAD_BYTES:
                _check_beginning(data)
                data += self.more(deadline_ns)
                continue
            head = parse_head(data[:end])
            if head.status >= 200:
                self._seen, self._head = seen, _ = data[: end + 4], head
                return data, seen
            data = data[end + 4 :] or self.more(deadline_ns)  # 100 Continue and its kind

    def _until(self, data: bytes, total: int, deadline_ns: int) -> bytearray:
        buffer = bytearray(total)
        buffer[: len(data)] = data
        self.fill(memoryview(buffer)[len(data) :], deadline_ns)
        if self.surplus():
            raise MalformedError(f"content-length: expected {total} bytes with the head, was more")
        return buffer

    def _chunked(self, data: bytes, deadline_ns: int) -> bytes:
        buffer, body = bytearray(data), bytearray()
        while size := self._chunk_size(buffer, deadline_ns):
            if len(body) + size > MAX_BODY_BYTES:
                raise MalformedError(f"chunked body: expected at most {MAX_BODY_BYTES} bytes")
            while len(buffer) < size + 2:
                buffer += self.more(deadline_ns)
            if buffer[size : size + 2] != b"\r\n":
                raise MalformedError("a chunk does not end where its size says")
            body += buffer[:size]
            del buffer[: size + 2]
        self._trailer(buffer, deadline_ns)
        return bytes(body)

    def _chunk_size(self, buffer: bytearray, deadline_ns: int) -> int:
        return _size_of_chunk(self._line(buffer, deadline_ns))

    def _line(self, buffer: bytearray, deadline_ns: int) -> bytes:
        while (end := buffer.find(b"\r\n")) < 0:
            if len(buffer) > MAX_HEAD_BYTES:
                raise MalformedError(f"a line of more than {MAX_HEAD_BYTES} bytes")
            buffer += self.more(deadline_ns)
        line = bytes(buffer[:end])
        del buffer[: end + 2]
        return line

    def _trailer(self, buffer: bytearray, deadline_ns: int) -> None:
        for _ in range(64):
            if not self._line(buffer, deadline_ns):
                break
        if buffer:
            raise MalformedError("bytes after the last chunk")


def whole_reply(data: bytes) -> Reply | None:
    """The reply that `data` is; None while a part of it is missing. Raises MalformedError, also for bytes after it."""
    while True:
        end = data.find(b"\r\n\r\n")
        if end < 0 or end > MAX_HEAD_BYTES:
            _check_beginning(data)
            return None
        head = parse_head(data[:end])
        if head.status >= 200:
            break
        data = data[end + 4 :]  # 100 Continue and its kind
    if head.length is None:
        body = _whole_chunked(data[end + 4 :])
        return None if body is None else Reply(head, body, 0)
    total = end + 4 + head.length
    if len(data) > total:
        raise MalformedError(f"content-length: expected {head.length} bytes, was more")
    return Reply(head, data, end + 4) if len(data) == total else None


def _whole_chunked(data: bytes) -> bytes | None:
    """The body of a chunked reply; None while a part of it is missing. Raises MalformedError."""
    body, start = bytearray(), 0
    while True:
        end = data.find(b"\r\n", start)
        if end < 0:
            if len(data) - start > MAX_HEAD_BYTES:
                raise MalformedError(f"a line of more than {MAX_HEAD_BYTES} bytes")
            return None
        size = _size_of_chunk(data[start:end])
        start = end + 2
        if not size:
            return _end_of_chunks(data[start:], bytes(body))
        if len(body) + size > MAX_BODY_BYTES:
            raise MalformedError(f"chunked body: expected at most {MAX_BODY_BYTES} bytes")
        if len(data) < start + size + 2:
            return None
        body += data[start : start + size]
        start += size + 2
        if data[start - 2 : start] != b"\r\n":
            raise MalformedError("a chunk does not end where its size says")


def _end_of_chunks(trailer: bytes, body: bytes) -> bytes | None:
    if len(trailer) > MAX_HEAD_BYTES:
        raise MalformedError(f"trailer: expected at most {MAX_HEAD_BYTES} bytes")
    if trailer == b"\r\n" or trailer.endswith(b"\r\n\r\n"):
        return body
    if trailer.startswith(b"\r\n") or b"\r\n\r\n" in trailer:
        raise MalformedError("bytes after the last chunk")
    return None


def _size_of_chunk(line: bytes) -> int:
    line = line.partition(b";")[0].strip()
    if not 1 <= len(line) <= 8 or line.strip(b"0123456789abcdefABCDEF"):
        raise MalformedError(f"chunk size: expected hexadecimal digits, was {line[:40]!r}")
    return int(line, 16)


def _check_beginning(data: bytes) -> None:
    """Refuse at once what can never become a response head, rather than at the deadline."""
    if data.startswith(TLS_ALERT):
        raise SecureExpectedError("an alert of TLS")
    if data.startswith(b"\0\0") and data[3:4] == HTTP2_SETTINGS:
        raise MalformedError("expected HTTP/1.1, was HTTP/2, which gRPC speaks: is this the server's gRPC port?")
    if not data.startswith(b"HTTP/1."[: len(data)]):
        raise MalformedError(f"expected an HTTP/1.1 status line, was {data[:40]!r}")
    if len(data) > MAX_HEAD_BYTES:
        raise MalformedError(f"response head: expected at most {MAX_HEAD_BYTES} bytes")

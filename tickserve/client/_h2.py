"""HTTP/2 (RFC 9113) as one gRPC call at a time needs it: one stream after another on a kept-alive connection.

Nothing is pushed, nothing is multiplexed, and no header table is kept, so what is left is framing: a request is two
frames sent at once, and the answer's frames are read in order. A connection whose call was given up stays open until
that call's answer has come (`settled`): to close it would be to cancel the call.
"""

from __future__ import annotations

from collections.abc import Callable
from socket import socket
from typing import NamedTuple

from tickserve.client._hpack import decode_block
from tickserve.client._socket import DeadlinePassedError, DisconnectedError, Line, MalformedError, WireError
from tickserve.client._transport import MAX_BODY_BYTES

DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 5, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 2, 4, 5
FRAME_HEAD = 9
MAX_WINDOW = 2**31 - 1
DEFAULT_WINDOW, DEFAULT_FRAME_SIZE = 65_535, 16_384
OUR_FRAME_SIZE = 2**20
MAX_BLOCK_BYTES = 16 * 1024
MAX_STREAM = 2**30  # of 2**31; the connection is then replaced
MAX_FRAMES = 10_000  # of one answer; the largest body is 64 of ours, and 4096 of the default size
REFUSED_STREAM = 7
DEADLINE_EXCEEDED = "4"
REFILL = 2**29


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return b"%b%c%c%b%b" % (len(payload).to_bytes(3, "big"), kind, flags, stream.to_bytes(4, "big"), payload)


def settings(values: dict[int, int]) -> bytes:
    """The payload of a SETTINGS frame."""
    return b"".join(name.to_bytes(2, "big") + value.to_bytes(4, "big") for name, value in values.items())


_OURS = {HEADER_TABLE_SIZE: 0, ENABLE_PUSH: 0, INITIAL_WINDOW_SIZE: MAX_WINDOW, MAX_FRAME_SIZE: OUR_FRAME_SIZE}
PREFACE = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + frame(SETTINGS, 0, 0, settings(_OURS))
    + frame(WINDOW_UPDATE, 0, 0, (MAX_WINDOW - DEFAULT_WINDOW).to_bytes(4, "big"))
)


class Answer(NamedTuple):
    """A whole answer: the headers by name, the trailers among them, and the bytes between them."""

    headers: dict[str, str]
    data: bytes


class _Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


class Stream(Line):
    """A line that speaks HTTP/2, one stream at a time."""

    __slots__ = (
        "_at",
        "_block",
        "_buffer",
        "_ended",
        "_frames",
        "_headers",
        "_parts",
        "_peer",
        "_problem",
        "_received",
        "_sent",
        "_size",
        "_stream",
        "_torn",
    )

    def __init__(self, sock: socket, busy: set[Line]) -> None:
        super().__init__(sock, busy)
        self._stream, self._peer, self._received = -1, _Peer(), 0
        self._buffer, self._at = b"", 0
        self._problem: WireError | None = None
        self._ended, self._sent = True, False  # whether the answer has ended; whether the request was sent to its end
        self._torn = False  # whether reading was cut off inside a frame: what follows cannot be told

    def exchange(self, head: bytes, payload: bytes, deadline_ns: int) -> Answer:
        """Send a request (its header block, its data), receive its answer. Raises WireError: close it then."""
        self.send(head, payload, deadline_ns)
        return self.receive(deadline_ns)

    def send(self, head: bytes, payload: bytes, deadline_ns: int) -> None:
        """Send a request. Raises WireError; the connection must then be closed."""
        first = self._stream < 0
        self._stream += 2
        self.heard = self._ended = self._sent = False
        self._headers: dict[str, str] = {}
        self._parts: list[bytes] = []
        self._block: tuple[int, bytes] | None = None
        self._frames = self._size = 0
        self._problem = None
        peer, size, stream = self._peer, len(payload), self._stream.to_bytes(4, "big")
        peer.stream_window = peer.initial_window
        opening = b"%b\x01\x04%b%b" % (len(head).to_bytes(3, "big"), stream, head)
        if first:
            opening = PREFACE + opening
        if size <= peer.room():
            peer.spend(size)
            self.put(b"%b%b\x00\x01%b%b" % (opening, size.to_bytes(3, "big"), stream, payload), deadline_ns)
        else:
            self.put(opening, deadline_ns)
            self._send_in_parts(memoryview(payload), deadline_ns)
        self._sent = True

    def _send_in_parts(self, rest: memoryview, deadline_ns: int) -> None:
        """Frames as large as the peer takes, as its windows open."""
        peer = self._peer
        while rest and not self._ended:
            size = min(len(rest), peer.room())
            if size <= 0:
                self._step(deadline_ns)
                continue
            peer.spend(size)
            part, rest = bytes(rest[:size]), rest[size:]
            self.put(frame(DATA, 0 if rest else END_STREAM, self._stream, part), deadline_ns)
        if rest:  # answered before it had heard everything
            self.reusable = False

    def receive(self, deadline_ns: int) -> Answer:
        """The answer to what was sent. Raises WireError; the connection must then be closed."""
        if self._problem is not None:
            raise self._problem
        while not self._ended or self._whole():
            self._step(deadline_ns)
        self.used = True
        if self._stream >= MAX_STREAM or self._given_up():
            self.reusable = False
        if self._received > REFILL:
            self._torn = True
            self.put(frame(WINDOW_UPDATE, 0, 0, self._received.to_bytes(4, "big")), deadline_ns)
            self._received, self._torn = 0, False
        parts = self._parts
        return Answer(self._headers, parts[0] if len(parts) == 1 else b"".join(parts))

    def readable(self, until_ns: int) -> bool:
        """Whether the answer has begun, or the connection ended, before `until_ns`; 0 does not wait.

        Settings, pings and window updates come unasked: taken for an answer they would cost a call its hedge.
        """
        while not self._begun():
            if not super().readable(until_ns):
                return False
            try:
                self._take_in(until_ns)
            except WireError as error:
                self._problem = error  # which `receive` raises
        return True

    @property
    def owed(self) -> bool:
        """Whether a request was begun whose answer has not ended."""
        return not self._ended and self._problem is None

    def settled(self) -> bool:
        """Whether nothing is owed any more; reads what has come and waits for nothing. Then `reusable` holds."""
        if self._torn or not self._sent:
            return False  # its answer cannot be read: whoever keeps it ends it in time
        try:
            while not self._ended and super().readable(0):
                self._take(0)
                while self._whole():
                    self._step(0)
                    self._parts.clear()
        except DeadlinePassedError:
            return False
        except WireError:
            self.reusable = False
            return True
        if self._stream >= MAX_STREAM or self._received > REFILL or self._given_up():
            self.reusable = False
        self.used = True
        return self._ended

    def _begun(self) -> bool:
        return self._ended or bool(self._headers) or self._problem is not None

    def _take_in(self, until_ns: int) -> None:
        """Do what the whole frames say that are there, up to the first of the answer."""
        heard = self.heard
        try:
            self._take(until_ns)
        except DeadlinePassedError:  # woken without data
            return
        self.heard = heard
        while self._whole() and not self._begun():
            self._step(until_ns)

    def _take(self, deadline_ns: int) -> None:
        """Put what has come into the buffer, as soon as there is something. Raises WireError."""
        torn, self._torn = self._torn, True  # until it is there, by whatever this may be interrupted
        try:
            came = self.more(deadline_ns)
        except DeadlinePassedError:
            self._torn = torn
            raise
        self._buffer, self._at = self._buffer[self._at :] + came, 0
        self._torn = torn

    def _whole(self) -> bool:
        """Whether another frame lies in the buffer: a ping behind the answer wants its own."""
        buffer, at = self._buffer, self._at
        have = len(buffer) - at
        return have >= FRAME_HEAD and have >= FRAME_HEAD + int.from_bytes(buffer[at : at + 3], "big")

    def _step(self, deadline_ns: int) -> None:
        """Read one frame and do what it says."""
        answered = self.heard and bool(self._headers)
        got = self._read(deadline_ns)
        self._frames += 1
        if self._frames > MAX_FRAMES:
            raise MalformedError(f"more than {MAX_FRAMES} frames in an answer")
        if self._block is not None and got.kind != CONTINUATION:
            raise MalformedError("a header block is interrupted")
        handle = _HANDLERS.get(got.kind)
        if handle is not None:  # what is not known is to be ignored
            handle(self, got, deadline_ns)
        self._torn = False
        # Settings and pings are no answer to this call.
        self.heard = answered or self._ended or bool(self._headers) or self._block is not None

    def _read(self, deadline_ns: int) -> _Frame:
        buffer, at = self._buffer, self._at
        while len(buffer) < at + FRAME_HEAD:
            self._take(deadline_ns)
            buffer, at = self._buffer, self._at
        self._torn = True  # until `_step` is done with this frame
        size, body = int.from_bytes(buffer[at : at + 3], "big"), at + FRAME_HEAD
        kind, flags, stream = buffer[at + 3], buffer[at + 4], int.from_bytes(buffer[at + 5 : body], "big") & MAX_WINDOW
        if not self._peer.known and kind != SETTINGS:
            raise MalformedError("the peer does not begin with HTTP/2's settings")
        if size > OUR_FRAME_SIZE:
            raise MalformedError(f"a frame of {size} bytes: expected at most {OUR_FRAME_SIZE}")
        end = body + size
        if end <= len(buffer):
            self._at = end
            return _Frame(kind, flags, stream, buffer[body:end])
        payload = bytearray(size)
        have = len(buffer) - body
        payload[:have] = buffer[body:]
        self.fill(memoryview(payload)[have:], deadline_ns)
        self._buffer, self._at = b"", 0
        return _Frame(kind, flags, stream, bytes(payload))

    def _on_data(self, got: _Frame, deadline_ns: int) -> None:
        if got.stream != self._stream or not self._headers or self._ended:
            raise MalformedError("data that belongs to no answer")
        self._received += len(got.payload)
        part = _unpadded(got)
        if part:
            self._parts.append(part)
        self._size += len(part)
        if self._size > MAX_BODY_BYTES:
            raise MalformedError(f"an answer of more than {MAX_BODY_BYTES} bytes")
        self._ended = bool(got.flags & END_STREAM)

    def _on_headers(self, got: _Frame, deadline_ns: int) -> None:
        if self._given_up() and got.stream == self._stream:
            return
        if got.stream != self._stream or self._ended:
            raise MalformedError("headers that belong to no answer")
        block = _unpadded(got)
        if got.flags & WITH_PRIORITY:
            block = block[5:]
        self._gather(got.flags & END_STREAM, block, got.flags)

    def _given_up(self) -> bool:
        """Whether the server ended this call at its deadline; Triton may then end it a second time, now or later."""
        return self._ended and self._headers.get("grpc-status") == DEADLINE_EXCEEDED

    def _on_continuation(self, got: _Frame, deadline_ns: int) -> None:
        if self._block is None or got.stream != self._stream:
            raise MalformedError("a continuation of nothing")
        ends, block = self._block
        self._block = None
        self._gather(ends, block + got.payload, got.flags)

    def _gather(self, ends: int, block: bytes, flags: int) -> None:
        if len(block) > MAX_BLOCK_BYTES:
            raise MalformedError(f"headers of more than {MAX_BLOCK_BYTES} bytes")
        if not flags & END_HEADERS:
            self._block = ends, block
            return
        headers = decode_block(block)
        status = headers.get(":status", "")
        if status.startswith("1") and not ends:
            return  # informational
        if bool(status) == bool(self._headers) or (self._headers and not ends):
            raise MalformedError("headers out of order")
        self._headers = {**self._headers, **headers} if self._headers else headers
        self._ended = bool(ends)

    def _on_window(self, got: _Frame, deadline_ns: int) -> None:
        self._peer.widen(int.from_bytes(_sized(got, 4), "big") & MAX_WINDOW, got.stream, self._stream)

    def _on_settings(self, got: _Frame, deadline_ns: int) -> None:
        if got.flags & ACK:
            return
        self._peer.set(got.payload)
        self.put(frame(SETTINGS, ACK, 0), deadline_ns)

    def _on_ping(self, got: _Frame, deadline_ns: int) -> None:
        if not got.flags & ACK:
            self.put(frame(PING, ACK, 0, _sized(got, 8)), deadline_ns)

    def _on_reset(self, got: _Frame, deadline_ns: int) -> None:
        code = int.from_bytes(_sized(got, 4), "big")
        if got.stream == self._stream and not self._ended:
            raise DisconnectedError("the server reset the call", answered=code != REFUSED_STREAM)

    def _on_goaway(self, got: _Frame, deadline_ns: int) -> None:
        self.reusable = False
        last = int.from_bytes(got.payload[:4], "big") & MAX_WINDOW
        if last < self._stream and not self._ended:  # it says that it will not look at this call
            raise DisconnectedError("the server is closing the connection", answered=False)

    def _on_push(self, got: _Frame, deadline_ns: int) -> None:
        raise MalformedError("a push, which was forbidden")


_HANDLERS: dict[int, Callable[[Stream, _Frame, int], None]] = {
    DATA: Stream._on_data,
    HEADERS: Stream._on_headers,
    RST_STREAM: Stream._on_reset,
    SETTINGS: Stream._on_settings,
    PUSH_PROMISE: Stream._on_push,
    PING: Stream._on_ping,
    GOAWAY: Stream._on_goaway,
    WINDOW_UPDATE: Stream._on_window,
    CONTINUATION: Stream._on_continuation,
}


class _Peer:
    """What the peer takes: its frame size and its windows, which it tells in its settings and updates."""

    __slots__ = ("initial_window", "known", "max_frame", "stream_window", "window")

    def __init__(self) -> None:
        self.known, self.max_frame = False, DEFAULT_FRAME_SIZE
        self.initial_window = self.window = self.stream_window = DEFAULT_WINDOW

    def room(self) -> int:
        """How many bytes one frame may hold now."""
        return min(self.max_frame, self.window, self.stream_window)

    def spend(self, size: int) -> None:
        self.window -= size
        self.stream_window -= size

    def widen(self, size: int, stream: int, ours: int) -> None:
        if stream == 0:
            self.window += size
        elif stream == ours:
            self.stream_window += size
        if size == 0 or max(self.window, self.stream_window) > MAX_WINDOW:
            raise MalformedError("a window that cannot be")

    def set(self, payload: bytes) -> None:
        if len(payload) % 6:
            raise MalformedError("settings of no whole number")
        self.known = True
        for at in range(0, len(payload), 6):
            name, value = int.from_bytes(payload[at : at + 2], "big"), int.from_bytes(payload[at + 2 : at + 6], "big")
            if name == INITIAL_WINDOW_SIZE:
                if value > MAX_WINDOW:
                    raise MalformedError("a window that cannot be")
                self.stream_window += value - self.initial_window
                self.initial_window = value
            elif name == MAX_FRAME_SIZE:
                if not DEFAULT_FRAME_SIZE <= value < 2**24:
                    raise MalformedError(f"a largest frame of {value} bytes")
                self.max_frame = value


def _sized(got: _Frame, size: int) -> bytes:
    if len(got.payload) != size:
        raise MalformedError(f"a frame of {len(got.payload)} bytes: expected {size}")
    return got.payload


def _unpadded(got: _Frame) -> bytes:
    payload = got.payload
    if not got.flags & PADDED:
        return payload
    padding = payload[0] if payload else 1
    if padding >= len(payload):
        raise MalformedError("a frame is nothing but padding")
    return payload[1 : len(payload) - padding]

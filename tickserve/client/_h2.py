"""HTTP/2 (RFC 9113) as one gRPC call at a time needs it, without the socket: one stream after another on a connection.

Nothing is pushed, nothing is multiplexed, and no header table is kept, so what is left is framing: a request is two
frames sent at once, and the answer's frames are read in order. A thread drives it (_h2_line.py) or an event loop
(_async_grpc.py): what comes is fed to it, and what it wants sent is taken from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tickserve.client._hpack import decode_block
from tickserve.client._socket import DisconnectedError, MalformedError
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


class Conversation:
    """One connection's side of HTTP/2. What `out` holds after a step is to be sent, in order, before anything else."""

    __slots__ = (
        "_at",
        "_block",
        "_buffer",
        "_frames",
        "_headers",
        "_late",
        "_parts",
        "_peer",
        "_received",
        "_size",
        "_stream",
        "ended",
        "left",
        "out",
        "rest",
        "short",
    )

    def __init__(self) -> None:
        self._stream, self._peer, self._received = -1, _Peer(), 0
        self._buffer, self._at = b"", 0
        self.short = 0  # how many bytes are still missing of the frame that began
        self._late: list[bytes] = []  # what came of it since: joined once, when it is whole
        self._headers: dict[str, str] = {}
        self._parts: list[bytes] = []
        self._block: tuple[int, bytes] | None = None
        self._frames = self._size = 0
        self.out = b""
        self.rest: memoryview | None = None  # of the request: what the peer's windows have no room for yet
        self.ended = True  # whether the answer has ended
        self.left = False  # whether no other call may follow: the peer says goodbye, or the numbers run out

    @property
    def begun(self) -> bool:
        """Whether a frame of the answer has come."""
        return self.ended or bool(self._headers)

    @property
    def heard(self) -> bool:
        """Whether anything of the answer may have come: whole settings and pings are nothing of it, a part may be."""
        return self.begun or self._block is not None or self._at < len(self._buffer)

    def request(self, head: bytes, payload: bytes) -> bytes:
        """Begin a call (its header block, its data): what to send now. `part` has the rest, if there is one."""
        first = self._stream < 0
        self._stream += 2
        self.ended = False
        self._headers, self._parts, self._block = {}, [], None
        self._frames = self._size = 0
        peer, size, stream = self._peer, len(payload), self._stream.to_bytes(4, "big")
        peer.stream_window = peer.initial_window
        opening = b"%b\x01\x04%b%b" % (len(head).to_bytes(3, "big"), stream, head)
        if first:
            opening = PREFACE + opening
        if size <= peer.room():
            peer.spend(size)
            self.rest = None
            return b"%b%b\x00\x01%b%b" % (opening, size.to_bytes(3, "big"), stream, payload)
        self.rest = memoryview(payload)
        return opening

    def part(self) -> bytes | None:
        """The next frame of the request, as large as the peer takes now; None when nothing is left, or no room."""
        rest, peer = self.rest, self._peer
        size = 0 if rest is None or self.ended else min(len(rest), peer.room())
        if rest is None or size <= 0:
            return None
        peer.spend(size)
        self._frames = 0  # the peer's updates of its windows do get the call on
        now, after = bytes(rest[:size]), rest[size:]
        self.rest = after or None
        return frame(DATA, 0 if after else END_STREAM, self._stream, now)

    def answer(self) -> Answer:
        """The answer that has ended. It may leave something to send in `out`."""
        # No more calls: the numbers run out, a second end of this call may come, or not all of it was sent.
        if self._stream >= MAX_STREAM or self._given_up() or self.rest is not None:
            self.left = True
        if self._at == len(self._buffer):
            self._buffer, self._at = b"", 0  # an idle connection holds none of its last answer
        if self._received > REFILL:
            self.out += frame(WINDOW_UPDATE, 0, 0, self._received.to_bytes(4, "big"))
            self._received = 0
        parts, self._parts = self._parts, []
        return Answer(self._headers, parts[0] if len(parts) == 1 else b"".join(parts))

    def forget(self) -> None:
        """Let go of what has come of an answer that nobody wants."""
        self._parts.clear()

    def feed(self, data: bytes) -> None:
        """Take in what has come."""
        if self.short > len(data):
            self._late.append(data)
            self.short -= len(data)
            return
        if self._late:
            data = b"".join((*self._late, data))
            self._late = []
        self._buffer, self._at, self.short = self._buffer[self._at :] + data, 0, 0

    def whole(self) -> bool:
        """Whether a frame can be read: a ping behind the answer wants its own. Raises MalformedError."""
        buffer, at = self._buffer, self._at
        have = len(buffer) - at
        if self.short or have < FRAME_HEAD:
            return False
        if not self._peer.known and buffer[at + 3] != SETTINGS:
            raise MalformedError("the peer does not begin with HTTP/2's settings")
        size = int.from_bytes(buffer[at : at + 3], "big")
        if size > OUR_FRAME_SIZE:
            raise MalformedError(f"a frame of {size} bytes: expected at most {OUR_FRAME_SIZE}")
        self.short = max(0, FRAME_HEAD + size - have)
        return not self.short

    def step(self) -> None:
        """Read the frame that is whole and do what it says. Raises WireError: close the connection then."""
        buffer, at = self._buffer, self._at
        body = at + FRAME_HEAD
        self._at = end = body + int.from_bytes(buffer[at : at + 3], "big")
        kind, stream = buffer[at + 3], int.from_bytes(buffer[at + 5 : body], "big") & MAX_WINDOW
        self._frames += 1
        if self._frames > MAX_FRAMES:
            raise MalformedError(f"more than {MAX_FRAMES} frames in an answer")
        if self._block is not None and kind != CONTINUATION:
            raise MalformedError("a header block is interrupted")
        handle = _HANDLERS.get(kind)
        if handle is not None:  # what is not known is to be ignored
            handle(self, _Frame(kind, buffer[at + 4], stream, buffer[body:end]))

    def _on_data(self, got: _Frame) -> None:
        if got.stream != self._stream or not self._headers or self.ended:
            raise MalformedError("data that belongs to no answer")
        self._received += len(got.payload)
        part = _unpadded(got)
        if part:
            self._parts.append(part)
        self._size += len(part)
        if self._size > MAX_BODY_BYTES:
            raise MalformedError(f"an answer of more than {MAX_BODY_BYTES} bytes")
        self.ended = bool(got.flags & END_STREAM)

    def _on_headers(self, got: _Frame) -> None:
        if self._given_up() and got.stream == self._stream:
            return
        if got.stream != self._stream or self.ended:
            raise MalformedError("headers that belong to no answer")
        block = _unpadded(got)
        if got.flags & WITH_PRIORITY:
            block = block[5:]
        self._gather(got.flags & END_STREAM, block, got.flags)

    def _given_up(self) -> bool:
        """Whether the server ended this call at its deadline; Triton may then end it a second time, now or later."""
        return self.ended and self._headers.get("grpc-status") == DEADLINE_EXCEEDED

    def _on_continuation(self, got: _Frame) -> None:
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
        self.ended = bool(ends)

    def _on_window(self, got: _Frame) -> None:
        self._peer.widen(int.from_bytes(_sized(got, 4), "big") & MAX_WINDOW, got.stream, self._stream)

    def _on_settings(self, got: _Frame) -> None:
        if got.flags & ACK:
            return
        self._peer.set(got.payload)
        self.out += frame(SETTINGS, ACK, 0)

    def _on_ping(self, got: _Frame) -> None:
        if not got.flags & ACK:
            self.out += frame(PING, ACK, 0, _sized(got, 8))

    def _on_reset(self, got: _Frame) -> None:
        code = int.from_bytes(_sized(got, 4), "big")
        if got.stream == self._stream and not self.ended:
            raise DisconnectedError("the server reset the call", answered=code != REFUSED_STREAM)

    def _on_goaway(self, got: _Frame) -> None:
        self.left = True
        last = int.from_bytes(got.payload[:4], "big") & MAX_WINDOW
        if last < self._stream and not self.ended:  # it says that it will not look at this call
            raise DisconnectedError("the server is closing the connection", answered=False)

    def _on_push(self, got: _Frame) -> None:
        raise MalformedError("a push, which was forbidden")


_HANDLERS: dict[int, Callable[[Conversation, _Frame], None]] = {
    DATA: Conversation._on_data,
    HEADERS: Conversation._on_headers,
    RST_STREAM: Conversation._on_reset,
    SETTINGS: Conversation._on_settings,
    PUSH_PROMISE: Conversation._on_push,
    PING: Conversation._on_ping,
    GOAWAY: Conversation._on_goaway,
    WINDOW_UPDATE: Conversation._on_window,
    CONTINUATION: Conversation._on_continuation,
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

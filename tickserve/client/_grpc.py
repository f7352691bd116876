"""The same request over gRPC, on the same lean connection as HTTP: Python's gRPC library costs more than the server.

A call is one stream of HTTP/2 on a kept-alive connection of its own, so its deadline is as sharp as HTTP's, and it
needs no other package. Pings of the peer are answered while a call is under way, not between calls.
"""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import unquote

from tickserve.client._h2 import Answer
from tickserve.client._h2_line import Stream
from tickserve.client._hedge_line import LinePending, begin_on
from tickserve.client._hpack import literal
from tickserve.client._pool import Pool, as_error
from tickserve.client._proto import decode as decode_message
from tickserve.client._proto import encode as encode_message
from tickserve.client._socket import WireError
from tickserve.client._transport import InferRequest, InferResponse, refused
from tickserve.client._url import Endpoint
from tickserve.errors import DeadlineExceededError, ProtocolError, RequestError, TransportError

METHOD = "/inference.GRPCInferenceService/ModelInfer"
PREFIX = 5  # a message begins with whether it is compressed, and its length in four bytes
# The server is told of a deadline far behind the client's: one that it keeps itself is a cancel, which may meet the
# answer (see _parked.py). How long a request may queue is said in the request.
SLACK_US = 60_000_000
MAX_TIMEOUT = 10**8  # grpc-timeout has at most eight digits
STATUS = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS"),
    *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED"),
    *("INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"),
)
# What is said of a connection further on (by a proxy, by a server that closes), as against a server's own refusal.
_CONNECTION = re.compile(
    r"\b(connect(ion)?|socket|stream removed|goaway|transport|channel|keepalive|ping timeout|too_many_pings|eof"
    r"|endpoint clos|broken pipe|(name|dns) resolution)",
    re.IGNORECASE,
)


class GrpcTransport:
    """One server over gRPC. Safe for threads and after a fork."""

    def __init__(self, endpoint: Endpoint, max_idle: int = 64) -> None:
        self._authority = endpoint.authority
        self._pool = Pool(endpoint, Stream, max_idle)

    def close(self) -> None:
        """Close idle connections; those in use are closed when their call ends."""
        self._pool.closed = True
        self._pool.end()

    def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """One request, one response. Raises RequestError."""
        head, payload = encode(request, self._authority)
        try:
            answer: Answer = self._pool.exchange(head, payload, deadline_ns)
        except WireError as error:
            raise as_error(error, self._authority) from error
        return decode(answer)

    def spare(self, deadline_ns: int) -> None:
        """Have a connection left for whoever calls beside the next call. Raises RequestError."""
        try:
            self._pool.spare(deadline_ns)
        except WireError as error:
            raise as_error(error, self._authority) from error

    def begin(self, request: InferRequest, deadline_ns: int, connect_by_ns: int) -> LinePending[Answer]:
        """The first half of `infer`: what is given waits and receives. Raises RequestError."""
        return begin_on(
            self._pool, self._authority, encode(request, self._authority), decode, deadline_ns, connect_by_ns
        )


@lru_cache(maxsize=16)
def header_block(authority: str, method: str = METHOD) -> bytes:
    """The constant headers: POST and http are entries of HTTP/2's static table."""
    names = (
        (":path", method),
        (":authority", authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "tickserve"),
    )
    return b"\x83\x86" + b"".join(literal(name, value) for name, value in names)


def _timeout(microseconds: int) -> str:
    """`microseconds` as the value of grpc-timeout."""
    return f"{microseconds}u" if microseconds < MAX_TIMEOUT else f"{-(-microseconds // 1_000)}m"


def encode(request: InferRequest, authority: str) -> tuple[bytes, bytes]:
    """The request as (header block, data)."""
    message = encode_message(request)
    head = header_block(authority) + literal("grpc-timeout", _timeout(request.timeout_us + SLACK_US))
    return head, b"\x00%b%b" % (len(message).to_bytes(4, "big"), message)


def decode(answer: Answer) -> InferResponse:
    """The response an answer carries. Raises the server's error, or ProtocolError."""
    headers, data = answer
    if headers.get("grpc-status") != "0":
        raise _server_error(headers)
    if len(data) < PREFIX:
        raise ProtocolError("expected a message", field="ModelInferResponse", was=f"{len(data)} bytes")
    if data[0]:
        raise ProtocolError(
            "expected no compression", field="grpc-encoding", was=headers.get("grpc-encoding", "?")[:40]
        )
    size = int.from_bytes(data[1:PREFIX], "big")
    if size != len(data) - PREFIX:
        raise ProtocolError("expected one message", expected=f"{size} bytes", was=f"{len(data) - PREFIX} bytes")
    return decode_message(data, PREFIX)


def _server_error(headers: dict[str, str]) -> RequestError:
    status, code = headers.get(":status", ""), headers.get("grpc-status")
    if code is None:
        if status == "200":
            return ProtocolError("the answer has no status", field="grpc-status", was="none")
        return refused(
            f"content-type {headers.get('content-type', 'none')[:60]}", f"HTTP {status}", may_be_unknown=False
        )
    known = code.isascii() and code.isdigit() and len(code) <= 2 and int(code) < len(STATUS)
    name = STATUS[int(code)] if known else code[:20]
    details = unquote(headers.get("grpc-message", ""))
    if name == "DEADLINE_EXCEEDED":
        return DeadlineExceededError("the server gave the request up at its deadline")
    # UNAVAILABLE is both a server that refuses (a full queue, a stop) and a proxy that did not reach one.
    if name in ("UNAVAILABLE", "CANCELLED", "UNKNOWN") and _CONNECTION.search(details):
        return TransportError("the connection failed on the server's side", hint="is the server up?")
    return refused(details, f"gRPC {name}", may_be_unknown=name in ("NOT_FOUND", "INVALID_ARGUMENT"))

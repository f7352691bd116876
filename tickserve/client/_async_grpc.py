"""gRPC over asyncio: `grpc.aio` with messages of our own making; loaded where it is used, with the `grpc` extra.

A call that nobody waits for any more is not cancelled: it runs on, unheard, to its answer or its deadline. Some Triton
versions die of a cancel that meets an answer (server issues 7368 and 8034), and with them every call of every client.
"""

from __future__ import annotations

import asyncio
import re
from time import monotonic_ns
from typing import Any

from tickserve.client._proto import decode, encode
from tickserve.client._transport import MAX_BODY_BYTES, InferRequest, InferResponse, refused
from tickserve.client._url import Endpoint
from tickserve.errors import CertificateError, DeadlineExceededError, MissingExtraError, RequestError, TransportError

METHOD = "/inference.GRPCInferenceService/ModelInfer"
SILENT_CALLS = 2
GRACE_S = 10.0  # for calls that are on a channel that was left
LATE_S = 0.002  # gRPC's timer fires this much late and more, so it is set as much earlier
# What gRPC itself says of a connection, as against a server's own "is stopping".
_CONNECTION = re.compile(
    r"\b(connect(ion)?|socket|stream removed|goaway|transport|channel|keepalive|ping timeout|too_many_pings|eof"
    r"|endpoint clos|broken pipe|(name|dns) resolution)",
    re.IGNORECASE,
)
_TLS = re.compile(r"ssl|handshake|certificate|peer name", re.IGNORECASE)
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_BODY_BYTES),
    ("grpc.max_send_message_length", MAX_BODY_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
)


def _load() -> Any:
    try:
        import grpc.aio
    except ImportError as error:
        raise MissingExtraError.of("grpc", "grpc") from error
    return grpc


class AsyncGrpcTransport:
    """One server over gRPC, for one event loop at a time."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._grpc, self._authority, self._tls = _load(), endpoint.authority, endpoint.tls
        self._credentials = None if endpoint.tls is None else endpoint.tls.credentials(self._grpc)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._channel: Any = None
        self._call: Any = None
        self._silent = 0
        self._unheard: set[Any] = set()  # gRPC cancels a call that is garbage

    def close(self) -> None:
        """Close the channel; calls in flight end with an error."""
        self._leave_channel(None)

    def heard(self, *, silent: bool) -> None:
        """A call ended. After some in a row without an answer the next opens another channel.

        gRPC keeps a dead path for as long as TCP takes its bytes. Calls that are on the old one may end on it.
        """
        self._silent = self._silent + 1 if silent else 0
        if self._silent >= SILENT_CALLS:
            self._silent = 0
            self._leave_channel(GRACE_S)

    def _leave_channel(self, grace_s: float | None) -> None:
        channel, loop, self._channel = self._channel, self._loop, None
        if channel is not None and loop is not None and loop.is_running():
            task = loop.create_task(channel.close(grace_s))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """One request, one response. Raises RequestError."""
        call = self._send(request, deadline_ns)
        # No task of its own: that is for calls that are waited for beside others.
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        call.add_done_callback(lambda _: None if done.done() else done.set_result(None))
        try:
            await done
        except asyncio.CancelledError:
            self.let_go(call)
            raise
        try:
            data = await call
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # not the caller: the channel was closed under the call
                raise self.as_error(None) from None
            raise
        except Exception as error:
            raise self.failed(error) from error
        self.heard(silent=False)
        return decode(data)

    async def begin(self, request: InferRequest, deadline_ns: int, connect_by_ns: int) -> GrpcCall:
        """Send; the channel connects in the background. Raises RequestError."""
        call = self._send(request, deadline_ns)
        return GrpcCall(self, asyncio.ensure_future(_answer(call)))

    def let_go(self, call: Any) -> None:
        """Have `call` (or its future) run on without anybody who waits for it."""
        if not call.done():
            self._unheard.add(call)
            call.add_done_callback(self._unheard.discard)

    def failed(self, error: Exception) -> RequestError:
        """The typed error of a call that ended with what gRPC raised."""
        typed = self.as_error(error)
        self.heard(silent=isinstance(typed, DeadlineExceededError))
        return typed

    def _send(self, request: InferRequest, deadline_ns: int) -> Any:
        remaining_s = (deadline_ns - monotonic_ns()) / 1e9
        remaining_s -= min(LATE_S, remaining_s / 5)
        if remaining_s <= 0:
            raise DeadlineExceededError("the deadline passed before the request was sent")
        return self._method()(encode(request), timeout=remaining_s)

    def as_error(self, error: Any) -> RequestError:
        """The typed error of what gRPC raised."""
        if not isinstance(error, self._grpc.RpcError):
            return TransportError(f"the call to {self._authority} was cut off", hint="is the server up?")
        code, details = error.code(), str(error.details() or "")
        status = self._grpc.StatusCode
        if code is status.DEADLINE_EXCEEDED:
            return DeadlineExceededError("no answer inside the deadline, while waiting for the answer")
        if code is status.UNAVAILABLE and self._tls is not None and _TLS.search(details):
            return CertificateError(f"no TLS with {self._authority}: {details[-200:]}")
        if code in (status.UNAVAILABLE, status.CANCELLED, status.UNKNOWN) and _CONNECTION.search(details):
            return TransportError(f"the connection to {self._authority} failed", hint="is the server up?")
        unknown = code in (status.NOT_FOUND, status.INVALID_ARGUMENT)
        return refused(details, f"gRPC {code.name}", may_be_unknown=unknown)

    def _method(self) -> Any:
        loop = asyncio.get_running_loop()
        if self._channel is None or loop is not self._loop:
            self._loop = loop
            self._channel = self._open()
            self._call = self._channel.unary_unary(METHOD, request_serializer=None, response_deserializer=None)
        return self._call

    def _open(self) -> Any:
        if self._tls is None or self._credentials is None:
            return self._grpc.aio.insecure_channel(self._authority, options=OPTIONS)
        name = self._tls.server_name
        options = OPTIONS if name is None else (*OPTIONS, ("grpc.ssl_target_name_override", name))
        return self._grpc.aio.secure_channel(self._authority, self._credentials, options=options)


def _unheard(done: asyncio.Future[bytes]) -> None:
    if not done.cancelled():
        done.exception()  # looked at: asyncio would complain of one that nobody took


async def _answer(call: Any) -> bytes:
    data: bytes = await call
    return data


class GrpcCall:
    """A call that is under way. `done` is its future."""

    __slots__ = ("_transport", "done")

    def __init__(self, transport: AsyncGrpcTransport, done: asyncio.Future[bytes]) -> None:
        self._transport, self.done = transport, done

    def abandon(self) -> None:
        """Let the call run on, unheard."""
        self.done.add_done_callback(_unheard)
        self._transport.let_go(self.done)

    async def receive(self) -> InferResponse:
        """The answer. Raises RequestError; a cancelled wait lets the call go."""
        try:
            data = await asyncio.shield(self.done)
        except asyncio.CancelledError:
            given_up = self.done.cancelled()
            self.abandon()
            if given_up:  # not the caller: the channel was closed under the call
                raise self._transport.as_error(None) from None
            raise
        except Exception as error:
            raise self._transport.failed(error) from error
        self._transport.heard(silent=False)
        return decode(data)

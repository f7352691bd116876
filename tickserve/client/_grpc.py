"""The same request over gRPC, for engines that want it: a raw channel, without tritonclient's per-call objects.

All of a request but its id, its timeout and its tensors' bytes is the same for every call of one shape. It is
serialised once; since protobuf messages merge when their bytes are joined, those are appended as more fields.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from functools import lru_cache
from time import monotonic_ns
from typing import Any

import numpy as np

from tickserve.client._transport import (
    MAX_BODY_BYTES,
    Array,
    InferRequest,
    InferResponse,
    parse_version,
    refused,
    sized,
)
from tickserve.client._url import Endpoint
from tickserve.errors import (
    ComponentError,
    DeadlineExceededError,
    ProtocolError,
    RequestError,
    TransportError,
    UsageError,
)

METHOD = "/inference.GRPCInferenceService/ModelInfer"
# Length-delimited fields of ModelInferRequest: (field number << 3) | 2.
ID_TAG = b"\x1a"  # id = 3
PARAMETER_TAG = b"\x22"  # parameters = 4, a map: an entry has key = 1 and value = 2, an InferParameter
RAW_INPUT_TAG = b"\x3a"  # raw_input_contents = 7
TIMEOUT_KEY = b"\x0a\x07timeout\x12"
INT64_TAG = b"\x10"  # InferParameter.int64_param = 2

LATE_S = 0.002  # gRPC's timer fires this much late and more, so it is set as much earlier
SILENT_CALLS = 2
REOPEN_NS = 1_000_000_000
# What gRPC itself says of a connection, as against a server's own "is stopping".
_CONNECTION = re.compile(
    r"\b(connect(ion)?|socket|stream removed|goaway|transport|channel|keepalive|ping timeout|too_many_pings|eof"
    r"|endpoint clos|broken pipe|(name|dns) resolution)",
    re.IGNORECASE,
)

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_BODY_BYTES),
    ("grpc.max_send_message_length", MAX_BODY_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    # Pings on an idle channel would be struck by a server with default settings.
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.enable_retries", 0),
    # gRPC's own backoff grows to two minutes: an engine must find its server again sooner.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
)


def _load() -> tuple[Any, Any]:
    try:
        import grpc
        from tritonclient.grpc import service_pb2
    except ImportError as error:
        raise ComponentError(
            f"the gRPC transport needs {error.name or 'grpc'}", hint="pip install 'tickserve[grpc]'"
        ) from error
    return grpc, service_pb2


class _Line:
    """One channel, the calls on it, and how many of them in a row had no answer by their deadline."""

    __slots__ = ("call", "channel", "opened_ns", "silent", "users")

    def __init__(self, channel: Any, call: Callable[..., Any]) -> None:
        self.channel, self.call, self.opened_ns = channel, call, monotonic_ns()
        self.users = self.silent = 0


class GrpcTransport:
    """One server over gRPC. Safe for threads; a forked child must open a client of its own."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._grpc, self._pb = _load()
        self._authority, self._pid = endpoint.authority, os.getpid()
        self._lock, self._closed = threading.Lock(), False
        self._line = self._open()

    def _open(self) -> _Line:
        channel = self._grpc.insecure_channel(self._authority, options=OPTIONS)
        # Bytes go out as they are; the answer is parsed by protobuf's C implementation.
        call = channel.unary_unary(
            METHOD, request_serializer=None, response_deserializer=self._pb.ModelInferResponse.FromString
        )
        return _Line(channel, call)

    def close(self) -> None:
        """Close the channel; calls in flight end with an error."""
        self._closed = True
        if self._pid == os.getpid():
            self._line.channel.close()

    def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """One request, one response. Raises RequestError, and UsageError once closed."""
        self._check_process()
        message = encode(request)
        remaining_s = (deadline_ns - monotonic_ns()) / 1e9
        remaining_s -= min(LATE_S, remaining_s / 5)
        if remaining_s <= 0:
            raise DeadlineExceededError("the deadline passed before the request was sent")
        line, silent = self._enter(), False
        try:
            answer = line.call(message, timeout=remaining_s)
        except self._grpc.RpcError as error:
            silent = error.code() is self._grpc.StatusCode.DEADLINE_EXCEEDED
            raise self._typed(error) from error
        except ValueError as error:  # "Cannot invoke RPC on closed channel!"
            raise self._cut("the channel was closed during the call") from error
        finally:
            self._leave(line, silent=silent)
        return decode(answer)

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise UsageError(
                "gRPC channels do not survive a fork",
                field="transport",
                hint="open the Client in the child, or use http",
            )

    def _enter(self) -> _Line:
        with self._lock:
            line = self._line
            line.users += 1
            return line

    def _leave(self, line: _Line, *, silent: bool) -> None:
        """Open another channel after some silence: gRPC keeps a dead path for as long as TCP takes its bytes.

        Calls that are on the old one keep it until they end.
        """
        with self._lock:
            line.users -= 1
            line.silent = line.silent + 1 if silent else 0
            old_enough = monotonic_ns() - line.opened_ns > REOPEN_NS  # or short deadlines would never see it connect
            if line.silent >= SILENT_CALLS and old_enough and line is self._line and not self._closed:
                self._line = self._open()
            unused = line is not self._line and line.users == 0
        if unused:
            line.channel.close()

    def _typed(self, error: Any) -> RequestError | UsageError:
        code, details = error.code(), str(error.details() or "")
        status = self._grpc.StatusCode
        if code is status.DEADLINE_EXCEEDED:
            return DeadlineExceededError("no answer inside the deadline, while waiting for the answer")
        # UNAVAILABLE is both a server that refuses (a full queue, a stop) and one that is not there.
        lost = code in (status.UNAVAILABLE, status.CANCELLED, status.UNKNOWN)
        if lost and _CONNECTION.search(details):
            return self._cut(f"the connection to {self._authority} failed")
        may_be_unknown = code in (status.NOT_FOUND, status.INVALID_ARGUMENT)
        return refused(details, f"gRPC {code.name}", may_be_unknown=may_be_unknown)

    def _cut(self, message: str) -> RequestError | UsageError:
        if self._closed:
            return UsageError("the client is closed", hint="open another one")
        return TransportError(message, hint="is the server up?")


@lru_cache(maxsize=256)
def _template(model: str, version: int | None, signature: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    _, pb = _load()
    message = pb.ModelInferRequest(model_name=model, model_version="" if version is None else str(version))
    for name, dtype, shape in signature:
        message.inputs.add(name=name, datatype=dtype, shape=shape)
    return bytes(message.SerializeToString())


def varint(value: int) -> bytes:
    """`value` in protobuf's base-128 encoding."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode(request: InferRequest) -> bytes:
    """The serialised ModelInferRequest."""
    signature = tuple((tensor.name, tensor.dtype, tensor.shape) for tensor in request.tensors)
    identity = request.request_id.encode()
    timeout = varint(request.timeout_us)
    entry = TIMEOUT_KEY + varint(len(timeout) + 1) + INT64_TAG + timeout
    parts = [_template(request.model, request.version, signature), ID_TAG, varint(len(identity)), identity]
    parts += (PARAMETER_TAG, varint(len(entry)), entry)
    for tensor in request.tensors:
        parts += (RAW_INPUT_TAG, varint(len(tensor.data)), tensor.data)
    return b"".join(parts)


def decode(answer: Any) -> InferResponse:
    """The response of a ModelInferResponse. Raises ProtocolError."""
    raw = answer.raw_output_contents
    if len(raw) != len(answer.outputs):
        raise ProtocolError("expected raw outputs", expected=f"{len(answer.outputs)} of them", was=str(len(raw)))
    outputs: dict[str, Array] = {}
    for output, data in zip(answer.outputs, raw, strict=True):
        outputs[output.name] = _array(output.name, output.datatype, tuple(output.shape), data)
    if len(outputs) != len(raw):
        raise ProtocolError("an output is given twice", field="outputs")
    return InferResponse(answer.model_name, parse_version(answer.model_version), answer.id, outputs)


def _array(name: str, datatype: str, shape: tuple[int, ...], data: bytes) -> Array:
    dtype, size = sized(name, datatype, shape)
    if size != len(data):
        raise ProtocolError(
            "bytes do not match the shape", field=name[:100], expected=f"{size} for {shape}", was=str(len(data))
        )
    return np.frombuffer(data, dtype).reshape(shape)

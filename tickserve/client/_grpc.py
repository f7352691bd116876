"""The same request over gRPC, for engines that want it: a raw channel, without tritonclient's per-call objects.

All of a request but its id and its tensors' bytes is the same for every call of one shape. It is serialised once; since
protobuf messages merge when their bytes are joined, id and tensors are appended as two more fields.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import lru_cache
from time import monotonic_ns
from typing import Any

import numpy as np

from tickserve.client._transport import DTYPES, MAX_BODY_BYTES, Array, InferRequest, InferResponse, refused
from tickserve.client._url import Endpoint
from tickserve.errors import (
    ComponentError,
    DeadlineExceededError,
    ProtocolError,
    RequestError,
    ServerRejectedError,
    TransportError,
    UsageError,
)

METHOD = "/inference.GRPCInferenceService/ModelInfer"
# Length-delimited fields of ModelInferRequest: (field number << 3) | 2.
ID_TAG = b"\x1a"  # id = 3
RAW_INPUT_TAG = b"\x3a"  # raw_input_contents = 7

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


class GrpcTransport:
    """One server over gRPC. Safe for threads; a forked child must open a client of its own."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._grpc, self._pb = _load()
        self._authority, self._pid = endpoint.authority, os.getpid()
        self._channel = self._grpc.insecure_channel(endpoint.authority, options=OPTIONS)
        # Bytes go out as they are; the answer is parsed by protobuf's C implementation.
        self._call: Callable[..., Any] = self._channel.unary_unary(
            METHOD, request_serializer=None, response_deserializer=self._pb.ModelInferResponse.FromString
        )

    def close(self) -> None:
        """Close the channel; calls in flight end with an error."""
        if self._pid == os.getpid():
            self._channel.close()

    def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """One request, one response. Raises RequestError."""
        if self._pid != os.getpid():
            raise UsageError(
                "gRPC channels do not survive a fork",
                field="transport",
                hint="open the Client in the child, or use http",
            )
        remaining_s = (deadline_ns - monotonic_ns()) / 1e9
        if remaining_s <= 0:
            raise DeadlineExceededError("the deadline passed before the request was sent")
        try:
            answer = self._call(encode(request), timeout=remaining_s)
        except self._grpc.RpcError as error:
            raise self._typed(error) from error
        except ValueError as error:  # "Cannot invoke RPC on closed channel!"
            raise TransportError("the channel was closed during the call") from error
        return decode(answer)

    def _typed(self, error: Any) -> RequestError:
        code, details = error.code(), str(error.details() or "")
        status = self._grpc.StatusCode
        if code is status.DEADLINE_EXCEEDED:
            return DeadlineExceededError("no answer inside the deadline, while waiting for the answer")
        typed = refused(details, f"gRPC {code.name}")
        # UNAVAILABLE is both a server that refuses (a full queue) and one that is not there.
        lost = code in (status.UNAVAILABLE, status.CANCELLED, status.UNKNOWN)
        if lost and isinstance(typed, ServerRejectedError) and _of_the_connection(details):
            return TransportError(f"the connection to {self._authority} failed", hint="is the server up?")
        return typed


def _of_the_connection(details: str) -> bool:
    lower = details.lower()
    marks = ("connect", "socket", "stream removed", "goaway", "connection", "transport", "channel", "ping", "eof")
    return any(mark in lower for mark in marks)


@lru_cache(maxsize=256)
def _template(
    model: str, version: int | None, timeout_us: int, signature: tuple[tuple[str, str, tuple[int, ...]], ...]
) -> bytes:
    _, pb = _load()
    message = pb.ModelInferRequest(model_name=model, model_version="" if version is None else str(version))
    message.parameters["timeout"].int64_param = timeout_us
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
    parts = [_template(request.model, request.version, request.timeout_us, signature)]
    parts += (ID_TAG, varint(len(identity)), identity)
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
    version = answer.model_version
    if not (version.isascii() and version.isdigit()):
        raise ProtocolError("not a version", field="model_version", expected="a number", was=repr(version)[:40])
    return InferResponse(answer.model_name, int(version), answer.id, outputs)


def _array(name: str, datatype: str, shape: tuple[int, ...], data: bytes) -> Array:
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise ProtocolError("unknown datatype", field=name[:100], expected=" or ".join(DTYPES), was=datatype[:40])
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ProtocolError(
            "bytes do not match the shape", field=name[:100], expected=f"bytes for {shape}", was=f"{len(data)}"
        )
    return np.frombuffer(data, dtype).reshape(shape)

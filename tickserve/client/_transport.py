"""What passes between the client and a transport: one request, one response, one method.

A transport raises branches of `tickserve.errors.RequestError`; the client adds the model and the request id to them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tickserve.client._arguments import shown
from tickserve.errors import (
    DeadlineExceededError,
    ModelNotFoundError,
    OverloadedError,
    ProtocolError,
    RequestError,
    ServerRejectedError,
)

Array = npt.NDArray[Any]  # float32 or int64, as DTYPES
DTYPES: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "INT64": np.dtype("<i8"),
}
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_RANK = 8

_PATH = re.compile(r"(?:[A-Za-z]:)?(?:[\\/][\w.@+~-]+)*[\\/]([\w.@+~-]+)")
_VERSION = re.compile(r"[1-9][0-9]{0,18}")
_UNKNOWN_MODEL = ("unknown model", "is not found", "no available versions")
_QUEUE_TIMEOUT = ("timeout expired", "deadline exceeded")
# What says nothing of the request and all of this one server: its queue is full, it stops, it reloads, it lost a model.
_ELSEWHERE = (
    "exceeds maximum queue size",
    "not at ready state",
    "is stopping",
    "stopped accepting",
    "shutting down",
    "not healthy",
    "server not ready",
)
_ELSEWHERE_STATUS = ("HTTP 429", "HTTP 503", "gRPC UNAVAILABLE", "gRPC RESOURCE_EXHAUSTED")


# `named(Tensor, (...))` is `Tensor(...)` at half its time: the constructor that a NamedTuple is given is Python code.
named = tuple.__new__


# By name: the dtype and the shape of an output, and where it begins.
Places = dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]


class Packed(Mapping[str, Array]):
    """Outputs where they lie in an answer's bytes: an array is made, read-only, when it is asked for.

    `places` is the same object for every answer of one shape, so that what was found true of it holds for all of them.
    """

    __slots__ = ("data", "places", "start")

    def __init__(self, places: Places, data: bytes | bytearray, start: int) -> None:
        self.places, self.data, self.start = places, data, start

    def __getitem__(self, name: str) -> Array:
        dtype, shape, offset = self.places[name]
        return self.array(dtype, shape, offset)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> Array:
        """What lies at `offset`."""
        array: Array = np.ndarray(shape, dtype, self.data, self.start + offset)
        if type(self.data) is not bytes:
            array.flags.writeable = False
        return array


class Tensor(NamedTuple):
    """One input tensor; `data` is its bytes in C order, little endian, and `shape` includes the batch."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class InferRequest(NamedTuple):
    """One request. `timeout_us` tells the server how long it may wait in its queue, `priority` in which lane."""

    model: str
    version: int | None
    request_id: str
    timeout_us: int
    tensors: tuple[Tensor, ...]
    priority: int | None = None


class InferResponse(NamedTuple):
    """One answer as the server gave it: the echoed model, version and request id, and its outputs by name.

    Where there are replicas: which one answered, how many were asked, and whether a second was asked before the first
    had failed.
    """

    model: str
    version: int
    request_id: str
    outputs: Mapping[str, Array]
    replica: str | None = None
    attempts: int = 1
    hedged: bool = False


class Transport(Protocol):
    """Carries one request to one server."""

    def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """Send and receive before `deadline_ns` (absolute, `time.monotonic_ns`). Raises RequestError."""
        ...

    def close(self) -> None:
        """Release connections; idempotent."""
        ...


def refused(message: str, status: str, *, may_be_unknown: bool) -> RequestError:
    """The typed error for a server's `message`: one printable line, the server's paths cut to their last part.

    `may_be_unknown`: whether the status is one of those for an unknown model. A server that stops or reloads says
    "unknown model" too, of one that is only "not at ready state".
    """
    line = (message.strip().splitlines() or ["no message"])[0]
    text = _PATH.sub(r"\1", "".join(c if c.isprintable() else "?" for c in line[:1000]))[:300]
    lower = text.lower()
    if may_be_unknown and any(phrase in lower for phrase in _UNKNOWN_MODEL):
        return ModelNotFoundError(f"the server does not serve this model or version: {text}", field="model")
    if any(phrase in lower for phrase in _QUEUE_TIMEOUT):
        return DeadlineExceededError(f"the server gave the request up in its queue: {text}")
    if status in _ELSEWHERE_STATUS or any(phrase in lower for phrase in _ELSEWHERE):
        return OverloadedError(f"the server cannot take it now ({status}): {text}")
    return ServerRejectedError(f"the server answered {status}: {text}")


def sized(name: str, datatype: str, shape: tuple[Any, ...]) -> tuple[np.dtype[Any], int]:
    """The dtype of an output, and how many bytes its shape stands for. Raises ProtocolError."""
    dtype = DTYPES.get(datatype) if isinstance(datatype, str) else None
    if dtype is None:
        raise ProtocolError("unknown datatype", field=name[:100], expected=" or ".join(DTYPES), was=shown(datatype))
    if len(shape) > MAX_RANK or any(type(size) is not int or not 0 <= size <= MAX_BODY_BYTES for size in shape):
        raise ProtocolError(
            "not a shape", field=name[:100], expected=f"at most {MAX_RANK} whole numbers", was=shown(shape)
        )
    if 0 in shape and math.prod(filter(None, shape)) > MAX_BODY_BYTES:  # numpy makes no such array, empty or not
        raise ProtocolError("too large a shape, if an empty one", field=name[:100], was=shown(shape))
    return dtype, math.prod(shape) * dtype.itemsize


def parse_version(text: object) -> int:
    """The version an answer names: decimal digits without sign, zero in front, or underscore. Raises ProtocolError."""
    if not isinstance(text, str) or not _VERSION.fullmatch(text):
        raise ProtocolError("not a version", field="model_version", expected="a whole number from 1", was=shown(text))
    return int(text)

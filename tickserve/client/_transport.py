"""What passes between the client and a transport: one request, one response, one method.

A transport raises branches of `tickserve.errors.RequestError`; the client adds the model and the request id to them.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tickserve.errors import DeadlineExceededError, ModelNotFoundError, RequestError, ServerRejectedError

Array = npt.NDArray[Any]  # float32 or int64, as DTYPES
DTYPES: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "INT64": np.dtype("<i8"),
}
MAX_BODY_BYTES = 64 * 1024 * 1024

_PATH = re.compile(r"(?:[A-Za-z]:)?(?:[\\/][\w.@+~-]+)*[\\/]([\w.@+~-]+)")
_UNKNOWN_MODEL = ("unknown model", "is not found", "no available versions", "is not ready")
_QUEUE_TIMEOUT = ("timeout expired", "deadline exceeded")


class Tensor(NamedTuple):
    """One input tensor; `data` is its bytes in C order, little endian, and `shape` includes the batch."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class InferRequest(NamedTuple):
    """One request. `timeout_us` tells the server how long the request may wait in its queue."""

    model: str
    version: int | None
    request_id: str
    timeout_us: int
    tensors: tuple[Tensor, ...]


class InferResponse(NamedTuple):
    """One answer as the server gave it: the echoed model, version and request id, and its outputs by name."""

    model: str
    version: int
    request_id: str
    outputs: dict[str, Array]


class Transport(Protocol):
    """Carries one request to one server."""

    def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """Send and receive before `deadline_ns` (absolute, `time.monotonic_ns`). Raises RequestError."""
        ...

    def close(self) -> None:
        """Release connections; idempotent."""
        ...


def refused(message: str, status: str) -> RequestError:
    """The typed error for a server's `message`: one printable line, the server's paths cut to their last part."""
    line = (message.strip().splitlines() or ["no message"])[0]
    text = _PATH.sub(r"\1", "".join(c if c.isprintable() else "?" for c in line[:1000]))[:300]
    lower = text.lower()
    if any(phrase in lower for phrase in _UNKNOWN_MODEL):
        return ModelNotFoundError(f"the server does not serve this model or version: {text}", field="model")
    if any(phrase in lower for phrase in _QUEUE_TIMEOUT):
        return DeadlineExceededError(f"the server gave the request up in its queue: {text}")
    return ServerRejectedError(f"the server answered {status}: {text}")

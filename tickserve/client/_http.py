"""Triton's binary HTTP protocol (KServe v2 with the binary tensor extension) over kept-alive connections.

The JSON part of a request and of a response is the same for every call of one shape and deadline, but for the id. Both
are made or read once; what is left per call is the id, the tensors' bytes, and a comparison with the last answer.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from tickserve.client._arguments import shown
from tickserve.client._hedge_line import LinePending, begin_on
from tickserve.client._pool import Pool, as_error
from tickserve.client._transport import (
    InferRequest,
    InferResponse,
    Packed,
    Places,
    named,
    parse_version,
    refused,
    sized,
)
from tickserve.client._url import Endpoint
from tickserve.client._wire import Connection, Reply, WireError
from tickserve.errors import ProtocolError, RequestError

__all__ = ["HttpTransport", "as_error", "decode", "encode"]

MAX_KNOWN = 256
BEFORE_ID = b'{"id":'

Signature = tuple[tuple[str, str, tuple[int, ...], int], ...]


class _Layout(NamedTuple):
    model: str
    version: int
    request_id: str
    places: Places
    size: int


class _Known(NamedTuple):
    """What follows the id in the JSON part of an answer, and what it says."""

    text: bytes
    layout: _Layout


class HttpTransport:
    """One server over HTTP. Safe for threads and after a fork."""

    def __init__(self, endpoint: Endpoint, max_idle: int = 64) -> None:
        self._authority = endpoint.authority
        self._pool = Pool(endpoint, Connection, max_idle)

    def close(self) -> None:
        """Close idle connections; those in use are closed when their call ends."""
        self._pool.closed = True
        self._pool.drop()

    def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """One request, one response. Raises RequestError."""
        head, payload = encode(request, self._authority)
        try:
            reply: Reply = self._pool.exchange(head, payload, deadline_ns)
        except WireError as error:
            raise as_error(error, self._authority) from error
        return decode(reply, request.request_id)

    def spare(self, deadline_ns: int) -> None:
        """Have a connection left for whoever calls beside the next call. Raises RequestError."""
        try:
            self._pool.spare(deadline_ns)
        except WireError as error:
            raise as_error(error, self._authority) from error

    def begin(self, request: InferRequest, deadline_ns: int, connect_by_ns: int) -> LinePending[Reply]:
        """The first half of `infer`: what is given waits and receives. Raises RequestError."""
        message, identity = encode(request, self._authority), request.request_id
        return begin_on(
            self._pool, self._authority, message, lambda reply: decode(reply, identity), deadline_ns, connect_by_ns
        )


@lru_cache(maxsize=256)
def _template(authority: str, model: str, version: int | None, signature: Signature) -> tuple[bytes, bytes]:
    """The request line with its constant headers, and the constant end of the JSON part."""
    path = f"/v2/models/{quote(model, safe='')}" + (f"/versions/{version}" if version is not None else "") + "/infer"
    head = f"POST {path} HTTP/1.1\r\nHost: {authority}\r\nContent-Type: application/octet-stream\r\n"
    inputs = [
        {"name": name, "shape": list(shape), "datatype": dtype, "parameters": {"binary_data_size": size}}
        for name, dtype, shape, size in signature
    ]
    return head.encode(), json.dumps(inputs, separators=(",", ":")).encode()


@lru_cache(maxsize=256)
def _around(
    authority: str,
    model: str,
    version: int | None,
    signature: Signature,
    timeout_us: int,
    priority: int | None,
    id_bytes: int,
) -> tuple[bytes, bytes]:
    """What comes before the id of a request, and what between it and the tensors."""
    head, inputs = _template(authority, model, version, signature)
    lane = b"" if priority is None else b',"priority":%d' % priority
    rest = b',"parameters":{"timeout":%d%b,"binary_data_output":true},"inputs":%b}' % (timeout_us, lane, inputs)
    size = len(BEFORE_ID) + id_bytes + len(rest)
    total = size + sum(each[3] for each in signature)
    lengths = b"Content-Length: %d\r\nInference-Header-Content-Length: %d\r\n\r\n" % (total, size)
    return head + lengths + BEFORE_ID, rest


def encode(request: InferRequest, authority: str) -> tuple[bytes, bytes]:
    """The request as (head with the JSON part, tensors' bytes)."""
    model, version, request_id, timeout_us, tensors, priority = request
    signature = tuple([(name, dtype, shape, len(data)) for name, dtype, shape, data in tensors])
    payload = tensors[0].data if len(tensors) == 1 else b"".join(tensor.data for tensor in tensors)
    identity = json_string(request_id)
    before, rest = _around(authority, model, version, signature, timeout_us, priority, len(identity))
    return before + identity + rest, payload


def json_string(text: str) -> bytes:
    """`text` as a JSON string."""
    return b'"%b"' % text.encode() if text.isalnum() and text.isascii() else json.dumps(text).encode()


def decode(reply: Reply, request_id: str) -> InferResponse:
    """The response a reply carries. Raises the server's error, or ProtocolError."""
    head, data, start = reply
    if head.status != 200:
        raise _server_error(head.status, bytes(data[start : start + 100_000]))
    if head.inference_header is None:
        raise ProtocolError("expected a binary answer", field="Inference-Header-Content-Length", was="none")
    end = start + head.inference_header
    if end > len(data):
        raise ProtocolError(
            "longer than the body",
            field="Inference-Header-Content-Length",
            expected=f"at most {len(data) - start}",
            was=str(head.inference_header),
        )
    (model, version, identity, places, size), echoed = _layout_of(data, start, end, request_id)
    if end + size != len(data):
        raise ProtocolError(
            "the outputs do not fill the body", expected=f"{size} bytes", was=f"{len(data) - end} bytes"
        )
    return named(InferResponse, (model, version, identity or echoed, Packed(places, data, end), None, 1, False))


# By its length: the JSON part that came last, without the id in front.
_known: dict[int, _Known] = {}


def _layout_of(data: bytes | bytearray, start: int, end: int, request_id: str) -> tuple[_Layout, str]:
    """What the JSON part says; and the id in front of what is remembered, where it is `request_id`."""
    # Triton writes the id first. Without it the text is the same for every answer of one shape, and parsed once.
    prefix = b'{"id":%b,' % json_string(request_id)
    after = start + len(prefix)
    known = _known.get(end - after)
    if known is not None and data.startswith(prefix, start) and data.startswith(known.text, after):
        return known.layout, request_id
    text = bytes(data[start:end])
    if not text.startswith(prefix):
        return _parse_layout.__wrapped__(text), ""
    rest = text[len(prefix) :]
    layout = _parse_layout(b"{" + rest)
    if len(_known) >= MAX_KNOWN:
        _known.clear()
    _known[len(rest)] = _Known(rest, layout)
    return layout, request_id


@lru_cache(maxsize=256)
def _parse_layout(text: bytes) -> _Layout:
    try:
        answer = json.loads(text)
        places, offset = Places(), 0
        for entry in answer["outputs"]:
            name, dtype, shape, size = _parse_output(entry)
            if name in places:
                raise ProtocolError("an output is given twice", field="outputs")
            places[name] = (dtype, shape, offset)
            offset += size
        model, version = str(answer["model_name"]), parse_version(answer["model_version"])
        return _Layout(model, version, str(answer.get("id", "")), places, offset)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProtocolError(
            f"the answer's header is not the protocol's JSON ({type(error).__name__})", expected="model and outputs"
        ) from error


def _parse_output(entry: dict[str, Any]) -> tuple[str, np.dtype[Any], tuple[int, ...], int]:
    name, shape = str(entry["name"]), tuple(entry["shape"])
    dtype, expected = sized(name, entry["datatype"], shape)
    size = entry["parameters"]["binary_data_size"]
    if type(size) is not int or size != expected:
        raise ProtocolError("bytes do not match the shape", field=name[:100], expected=str(expected), was=shown(size))
    return name, dtype, shape, size


def _server_error(status: int, body: bytes) -> RequestError:
    try:
        message = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        message = body[:300].decode("utf-8", "replace")
    return refused(message, f"HTTP {status}", may_be_unknown=status in (400, 404))

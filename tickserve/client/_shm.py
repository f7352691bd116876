"""Shared memory with a server on this machine: tensors stay where they are, HTTP carries the reference.

A call has a region of its own for as long as it lasts. One that ends badly never comes back: the server may still write
into it. Where the outputs go is learned from the first answer of a shape, which comes over the wire.
"""

from __future__ import annotations

import json
from collections import deque
from contextlib import suppress
from functools import lru_cache
from time import monotonic_ns
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from tickserve.client._arguments import shown
from tickserve.client._credential import Credential, header_line, local_credential
from tickserve.client._fork import renew_after_fork
from tickserve.client._http import decode, json_string
from tickserve.client._pool import Pool, as_error
from tickserve.client._region import Place, Region, places
from tickserve.client._transport import Array, InferRequest, InferResponse, parse_version, refused, sized
from tickserve.client._url import Endpoint
from tickserve.client._wire import Connection, Reply, WireError
from tickserve.errors import ComponentError, DeadlineExceededError, ProtocolError, RequestError, UsageError

FORBIDDEN = 403
UNKNOWN_REGION = b"Unable to find shared memory region"
CLOSE_NS = 1_000_000_000
FORGET_NS = 2_000_000  # of a good call
MAX_RETIRED = 1_000


class _Output(NamedTuple):
    name: str
    datatype: str
    shape: tuple[int, ...]


class _Shape(NamedTuple):
    """What is alike in requests that differ in their ids, times and numbers."""

    model: str
    version: int | None
    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]


class _UnknownRegionError(Exception):
    """The server knows nothing of the region: it was started anew, or told to forget."""


class ShmTransport:
    """One server on this machine, whose closed APIs open to `credential`. Safe for threads and after a fork.

    Without one, what the server's run file holds is looked up when the server asks for it, at every start of its anew.
    """

    def __init__(self, endpoint: Endpoint, credential: Credential | None) -> None:
        self._authority, self._closed_apis = endpoint.authority, header_line(credential)
        self._looked_up = credential is None
        self._pool: Pool[Connection] = Pool(endpoint, Connection)
        self._outputs: dict[_Shape, tuple[_Output, ...]] = {}
        self._idle: deque[Region] = deque()
        self._retired: deque[str] = deque(maxlen=MAX_RETIRED)  # what the server is still to forget
        renew_after_fork(self)

    def after_fork(self) -> None:
        """The regions are the parent's."""
        self._idle.clear()
        self._retired.clear()

    def close(self) -> None:
        """Give the regions and connections back; those in use go when their call ends."""
        deadline_ns = monotonic_ns() + CLOSE_NS
        self._pool.closed = False
        while self._idle:
            self._retire(self._idle.pop())
        with suppress(RequestError, WireError):  # a server that is gone has forgotten them
            while self._retired and monotonic_ns() < deadline_ns:
                self._forget(deadline_ns)
        self._pool.closed = True
        self._pool.drop()

    def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """One request, one response. Raises RequestError."""
        try:
            try:
                return self._infer(request, deadline_ns)
            except _UnknownRegionError:
                while self._idle:  # the others are as unknown
                    self._retire(self._idle.pop())
                return self._infer(request, deadline_ns)
        except _UnknownRegionError as error:
            raise ProtocolError("the server forgets the memory it has just been shown") from error
        except WireError as error:
            raise as_error(error, self._authority) from error

    def _infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        tensors = request.tensors
        shape = _Shape(
            request.model, request.version, tuple([(t.name, t.dtype, t.shape, len(t.data)) for t in tensors])
        )
        inputs, outputs, size = _layout(shape, self._outputs.get(shape))
        region = self._take(size, deadline_ns)
        try:
            region.write(tensors, inputs)
            key = shape, outputs is None
            constant = region.requests.get(key)
            if constant is None:
                constant = region.requests[key] = _constant(shape, region.name, inputs, outputs)
            reply = self._ask(request, constant, deadline_ns)
            if outputs is None:
                response = decode(reply, request.request_id)
                self._outputs[shape] = tuple(_described(name, array) for name, array in response.outputs.items())
            else:
                response = _placed(reply, request.request_id, self._outputs[shape], outputs, region)
        except BaseException:
            self._retire(region)
            raise
        self._idle.append(region)
        if self._retired:
            with suppress(RequestError, WireError):  # the answer is here, whatever becomes of old regions
                self._forget(min(deadline_ns, monotonic_ns() + FORGET_NS))
        return response

    def _ask(self, request: InferRequest, constant: bytes, deadline_ns: int) -> Reply:
        text = b'{"id":%b,"parameters":{"timeout":%d%b%b' % (
            json_string(request.request_id),
            request.timeout_us,
            b"" if request.priority is None else b',"priority":%d' % request.priority,
            constant,
        )
        head = _head(self._authority, request.model, request.version)
        reply: Reply = self._pool.exchange(b"%b%d\r\n\r\n" % (head, len(text)), text, deadline_ns)
        if reply.head.status != 200 and UNKNOWN_REGION in bytes(reply.data[reply.start : reply.start + 10_000]):
            raise _UnknownRegionError
        return reply

    def _take(self, size: int, deadline_ns: int) -> Region:
        """An idle region that is large enough, or a new one; small ones make room."""
        with suppress(IndexError):  # another thread may be faster
            while self._idle:
                region = self._idle.pop()
                if region.size >= size:
                    return region
                self._retire(region)
        if monotonic_ns() >= deadline_ns:
            raise DeadlineExceededError("the deadline passed before the request was sent")
        return Region(size, lambda name, key, length: self._register(name, key, length, deadline_ns))

    def _register(self, name: str, key: str, size: int, deadline_ns: int) -> None:
        body = {"key": key, "offset": 0, "byte_size": size}
        reply = self._manage("register", name, body, deadline_ns)
        hint = "is the server on this machine, and is credential= its own?"
        if reply.head.status == FORBIDDEN and self._looked_up:
            try:
                self._closed_apis = header_line(local_credential(self._authority))
            except (ComponentError, UsageError) as error:
                hint = str(error)
            else:
                reply = self._manage("register", name, body, deadline_ns)
        if reply.head.status != 200:
            raise _management_error(reply, hint)

    def _retire(self, region: Region) -> None:
        region.close()
        self._retired.append(region.name)

    def _forget(self, deadline_ns: int) -> None:
        """Have the server forget one retired region; one that it still uses waits for its turn."""
        try:
            name = self._retired.popleft()
        except IndexError:
            return
        try:
            reply = self._manage("unregister", name, {}, deadline_ns)
        except WireError:
            self._retired.append(name)
            raise
        if reply.head.status != 200 and b"in use" in bytes(reply.data[reply.start : reply.start + 10_000]):
            self._retired.append(name)

    def _manage(self, action: str, name: str, body: dict[str, Any], deadline_ns: int) -> Reply:
        text = json.dumps(body).encode()
        head = b"POST /v2/systemsharedmemory/region/%b/%b HTTP/1.1\r\nHost: %b\r\n%bContent-Length: %d\r\n\r\n" % (
            name.encode(),
            action.encode(),
            self._authority.encode(),
            self._closed_apis,
            len(text),
        )
        reply: Reply = self._pool.exchange(head, text, deadline_ns)
        return reply


def _management_error(reply: Reply, hint: str) -> RequestError:
    try:
        message = str(json.loads(bytes(reply.data[reply.start : reply.start + 10_000]))["error"])
    except (ValueError, KeyError, TypeError):
        message = "no reason"
    error = refused(message, f"HTTP {reply.head.status} to shared memory", may_be_unknown=False)
    return type(error)(str(error), hint=hint)


@lru_cache(maxsize=256)
def _head(authority: str, model: str, version: int | None) -> bytes:
    path = f"/v2/models/{quote(model, safe='')}" + (f"/versions/{version}" if version is not None else "") + "/infer"
    return f"POST {path} HTTP/1.1\r\nHost: {authority}\r\nContent-Length: ".encode()


def _layout(shape: _Shape, outputs: tuple[_Output, ...] | None) -> tuple[list[Place], list[Place] | None, int]:
    """Where the inputs go, and the outputs if they are known, and how many bytes that takes."""
    inputs, end = places([(name, size) for name, _, _, size in shape.tensors])
    if outputs is None:
        return inputs, None, end
    placed, end = places([(output.name, sized(*output)[1]) for output in outputs], end)
    return inputs, placed, end


def _constant(shape: _Shape, region: str, inputs: list[Place], outputs: list[Place] | None) -> bytes:
    """What follows the timeout in the request."""

    def reference(place: Place) -> dict[str, Any]:
        names = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")
        return dict(zip(names, (region, place.offset, place.size), strict=True))

    described = [
        {"name": name, "shape": list(size), "datatype": datatype, "parameters": reference(place)}
        for (name, datatype, size, _), place in zip(shape.tensors, inputs, strict=True)
    ]
    text = ',"binary_data_output":true}' if outputs is None else "}"
    text += f',"inputs":{json.dumps(described, separators=(",", ":"))}'
    if outputs is not None:
        wanted = [{"name": place.name, "parameters": reference(place)} for place in outputs]
        text += f',"outputs":{json.dumps(wanted, separators=(",", ":"))}'
    return (text + "}").encode()


def _described(name: str, array: Array) -> _Output:
    return _Output(name, "INT64" if array.dtype == np.int64 else "FP32", array.shape)


def _placed(
    reply: Reply, request_id: str, outputs: tuple[_Output, ...], where: list[Place], region: Region
) -> InferResponse:
    """The answer whose outputs lie in `region`. Raises the server's error, or ProtocolError."""
    if reply.head.status != 200 or reply.head.inference_header is not None:
        decode(reply, "")  # the server's error
        raise ProtocolError("expected the outputs in shared memory", field="outputs", was="on the wire")
    told = _told(bytes(reply.data[reply.start :]), request_id)
    if told.outputs != outputs:
        raise ProtocolError(
            "other outputs than for the same shape before", field="outputs", was=shown(told.outputs, 200)
        )
    arrays: dict[str, Array] = {
        output.name: np.frombuffer(region.read(place), sized(*output)[0]).reshape(output.shape)
        for output, place in zip(outputs, where, strict=True)
    }
    return InferResponse(told.model, told.version, told.request_id, arrays)


class _Told(NamedTuple):
    """What an answer says of itself."""

    model: str
    version: int
    request_id: str
    outputs: tuple[_Output, ...]


def _told(text: bytes, request_id: str) -> _Told:
    # Triton writes the id first; without it the text is the same for every answer of one shape, and parsed once.
    prefix = b'{"id":%b,' % json_string(request_id)
    if not text.startswith(prefix):
        return _parse_told.__wrapped__(text)
    told = _parse_told(b"{" + text[len(prefix) :])
    return told if told.request_id else told._replace(request_id=request_id)


@lru_cache(maxsize=256)
def _parse_told(text: bytes) -> _Told:
    try:
        answer = json.loads(text)
        outputs = [_Output(str(each["name"]), each["datatype"], tuple(each["shape"])) for each in answer["outputs"]]
        for output in outputs:
            sized(*output)
        version = parse_version(answer["model_version"])
        return _Told(str(answer["model_name"]), version, str(answer.get("id", "")), tuple(outputs))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProtocolError(
            f"the answer is not the protocol's JSON ({type(error).__name__})", expected="model and outputs"
        ) from error

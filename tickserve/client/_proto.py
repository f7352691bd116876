"""The messages of ModelInfer and ModelReady of the Open Inference Protocol, in protobuf's own bytes.

All of a request but its id, its timeout and its tensors' bytes is the same for every call of one shape: it is written
once. Of an answer, the descriptions of its outputs are the same for every call of one shape: each is read once. What is
read is refused when a field has another wire type than its schema's, ends early, or comes twice where it may not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from tickserve.client._transport import Array, InferRequest, InferResponse, parse_version, sized
from tickserve.errors import ProtocolError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# Tags of ModelInferRequest: (field number << 3) | wire type.
ID_TAG = b"\x1a"  # id = 3
PARAMETER_TAG = b"\x22"  # parameters = 4, a map: an entry has key = 1 and value = 2, an InferParameter
RAW_INPUT_TAG = b"\x3a"  # raw_input_contents = 7
TIMEOUT_KEY = b"\x0a\x07timeout\x12"
INT64_TAG = b"\x10"  # InferParameter.int64_param = 2
# The whole entry: key, and InferParameter.uint64_param = 5, which is what Triton reads a priority from.
PRIORITY_ENTRY = b"\x22\x0e\x0a\x08priority\x12\x02\x28%c"
# Fields of ModelInferResponse, and of its outputs.
MODEL, VERSION, IDENTITY, PARAMETERS, OUTPUTS, RAW_OUTPUTS = 1, 2, 3, 4, 5, 6
NAME, DATATYPE, SHAPE, CONTENTS = 1, 2, 3, 5
READY = 1  # of ModelReadyResponse
MAX_OUTPUTS = 1_000


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


def _field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | BYTES) + varint(len(data)) + data


@lru_cache(maxsize=256)
def template(model: str, version: int | None, signature: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    """The constant part of a request: model, version, and the inputs' names, datatypes and shapes."""
    parts = [_field(1, model.encode())]
    if version is not None:
        parts.append(_field(2, str(version).encode()))
    for name, datatype, shape in signature:
        dimensions = b"".join(varint(size & 2**64 - 1) for size in shape)
        parts.append(_field(5, _field(1, name.encode()) + _field(2, datatype.encode()) + _field(3, dimensions)))
    return b"".join(parts)


def encode(request: InferRequest) -> bytes:
    """The serialised ModelInferRequest."""
    signature = tuple([(tensor.name, tensor.dtype, tensor.shape) for tensor in request.tensors])
    identity = request.request_id.encode()
    timeout = varint(request.timeout_us)
    entry = TIMEOUT_KEY + varint(len(timeout) + 1) + INT64_TAG + timeout
    parts = [template(request.model, request.version, signature), ID_TAG, varint(len(identity)), identity]
    parts += (PARAMETER_TAG, varint(len(entry)), entry)
    if request.priority is not None:
        parts.append(PRIORITY_ENTRY % request.priority)
    for tensor in request.tensors:
        parts += (RAW_INPUT_TAG, varint(len(tensor.data)), tensor.data)
    return b"".join(parts)


def encode_ready(model: str, version: int) -> bytes:
    """The serialised ModelReadyRequest."""
    return _field(1, model.encode()) + _field(2, str(version).encode())


def decode_ready(data: bytes, at: int = 0) -> bool:
    """Whether the serialised ModelReadyResponse in `data[at:]` says ready. Raises ProtocolError."""
    ready = False
    for number, kind, start, _ in _fields(data, at):
        if number == READY:
            if kind != VARINT:
                raise _odd(f"field {number} of wire type {kind}")
            ready = _number(data, start)[0] != 0
    return ready


def _odd(what: str) -> ProtocolError:
    return ProtocolError(f"the answer is not the protocol's message: {what}", field="ModelInferResponse")


def _number(data: bytes, at: int) -> tuple[int, int]:
    """The varint at `at`, and where it ends. Raises IndexError when it does not."""
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 2**64:
                raise _odd("a number of more than 64 bits")
            return value, at
        shift += 7
        if shift > 63:
            raise _odd("a number of more than 64 bits")


def _fields(data: bytes, at: int) -> Iterator[tuple[int, int, int, int]]:
    """Each field as (number, wire type, start, end); a varint's end is the end of its bytes."""
    end = len(data)
    try:
        while at < end:
            tag = data[at]
            at += 1
            if tag >= 0x80:
                tag, at = _number(data, at - 1)
            number, kind = tag >> 3, tag & 7
            if kind == BYTES:
                size = data[at]
                at += 1
                if size >= 0x80:
                    size, at = _number(data, at - 1)
                stop = at + size
            elif kind == VARINT:
                stop = _number(data, at)[1]
            elif kind in (FIXED64, FIXED32):
                stop = at + (8 if kind == FIXED64 else 4)
            else:
                raise _odd(f"wire type {kind}")
            if stop > end or number == 0:
                raise _odd("a field that ends too early" if number else "a field without a number")
            yield number, kind, at, stop
            at = stop
    except IndexError as error:
        raise _odd("a field that ends too early") from error


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _odd("text that is not UTF-8") from error


def decode(data: bytes, at: int = 0) -> InferResponse:
    """The response of the serialised ModelInferResponse in `data[at:]`. Raises ProtocolError."""
    texts: dict[int, bytes] = {}
    described: list[tuple[str, np.dtype[Any], tuple[int, ...], int]] = []
    raw: list[tuple[int, int]] = []
    for number, kind, start, stop in _fields(data, at):
        if number > RAW_OUTPUTS:
            continue  # of a later schema
        if kind != BYTES:
            raise _odd(f"field {number} of wire type {kind}")
        if number == RAW_OUTPUTS:
            raw.append((start, stop))
        elif number == OUTPUTS:
            described.append(_described(data[start:stop]))
        elif number != PARAMETERS:
            if number in texts:
                raise _odd(f"field {number} is given twice")
            texts[number] = data[start:stop]
        if len(raw) + len(described) > MAX_OUTPUTS:
            raise _odd("too many outputs")
    if len(raw) != len(described):
        raise ProtocolError("expected raw outputs", expected=f"{len(described)} of them", was=str(len(raw)))
    return InferResponse(
        _text(texts.get(MODEL, b"")),
        parse_version(_text(texts.get(VERSION, b""))),
        _text(texts.get(IDENTITY, b"")),
        _arrays(data, described, raw),
    )


def _arrays(
    data: bytes, described: list[tuple[str, np.dtype[Any], tuple[int, ...], int]], raw: list[tuple[int, int]]
) -> dict[str, Array]:
    outputs: dict[str, Array] = {}
    for (name, dtype, shape, size), (start, stop) in zip(described, raw, strict=True):
        if size != stop - start:
            raise ProtocolError(
                "bytes do not match the shape",
                field=name[:100],
                expected=f"{size} for {shape}",
                was=str(stop - start),
            )
        outputs[name] = np.ndarray(shape, dtype, data, start)
    if len(outputs) != len(raw):
        raise ProtocolError("an output is given twice", field="outputs")
    return outputs


@lru_cache(maxsize=256)
def _described(data: bytes) -> tuple[str, np.dtype[Any], tuple[int, ...], int]:
    """An InferOutputTensor as (name, dtype, shape, bytes)."""
    texts: dict[int, bytes] = {}
    shape: list[int] = []
    for number, kind, start, stop in _fields(data, 0):
        if number == SHAPE:
            shape += _dimensions(data, kind, start, stop)
        elif number in (NAME, DATATYPE):
            if kind != BYTES or number in texts:
                raise _odd(f"field {number} of an output is no text, or given twice")
            texts[number] = data[start:stop]
        elif number == CONTENTS:
            raise _odd("an output holds its contents instead of raw bytes")
    name = _text(texts.get(NAME, b""))
    dtype, size = sized(name, _text(texts.get(DATATYPE, b"")), tuple(shape))
    return name, dtype, tuple(shape), size


def _dimensions(data: bytes, kind: int, start: int, stop: int) -> list[int]:
    """The sizes in a packed or a single field; what is negative fails as a size."""
    if kind not in (VARINT, BYTES):
        raise _odd(f"a shape of wire type {kind}")
    sizes, at = [], start
    try:
        while at < stop:
            size, at = _number(data, at)
            sizes.append(size - 2**64 if size >= 2**63 else size)
    except IndexError as error:
        raise _odd("a shape that ends too early") from error
    if at != stop:
        raise _odd("a shape that ends too early")
    return sizes

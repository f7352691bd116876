"""The hand-made protobuf against protobuf itself: what one writes the other reads, and what is odd is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from tickserve.client import InferRequest, Tensor
from tickserve.client._proto import decode, encode, template, varint
from tickserve.errors import ProtocolError

TEXT = st.text(max_size=40)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
TENSOR = st.builds(Tensor, TEXT, st.sampled_from(["FP32", "INT64"]), SHAPES, st.binary(max_size=300))
REQUESTS = st.builds(
    InferRequest,
    TEXT,
    st.none() | st.integers(1, 2**63 - 1),
    TEXT,
    st.integers(1, 2**63 - 1),
    st.lists(TENSOR, max_size=3).map(tuple),
    st.none() | st.sampled_from([1, 2]),
)
RNG = np.random.default_rng(7)


@given(REQUESTS)
@settings(max_examples=200, deadline=None)
def test_protobuf_reads_every_request(request: InferRequest) -> None:
    message = service_pb2.ModelInferRequest.FromString(encode(request))
    version = "" if request.version is None else str(request.version)
    assert (message.model_name, message.model_version, message.id) == (request.model, version, request.request_id)
    lane = {} if request.priority is None else {"priority": request.priority}
    found = {key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in message.parameters.items()}
    assert found == {"timeout": request.timeout_us} | lane
    tensors = [
        Tensor(part.name, part.datatype, tuple(part.shape), raw)
        for part, raw in zip(message.inputs, message.raw_input_contents, strict=True)
    ]
    assert tuple(tensors) == request.tensors


def test_one_template_serves_every_call_of_a_shape() -> None:
    template.cache_clear()
    for count in range(5):
        encode(InferRequest("m", None, str(count), count + 1, (Tensor("x", "FP32", (1, 4), bytes(16)),)))
    assert template.cache_info().currsize == 1


def answer(outputs: list[tuple[str, Any]], **fields: str) -> Any:
    message = service_pb2.ModelInferResponse(**({"model_name": "m", "model_version": "2", "id": "abc"} | fields))
    for name, values in outputs:
        kind = "FP32" if values.dtype == np.float32 else "INT64"
        message.outputs.add(name=name, datatype=kind, shape=values.shape)
        message.raw_output_contents.append(values.tobytes())
    return message


ARRAYS = st.tuples(SHAPES, st.sampled_from([np.float32, np.int64])).map(
    lambda drawn: RNG.integers(-9, 9, drawn[0]).astype(drawn[1])
)


@given(st.dictionaries(TEXT, ARRAYS, max_size=4), TEXT, TEXT, st.integers(1, 10**18))
@settings(max_examples=200, deadline=None)
def test_every_answer_of_protobuf_is_read(outputs: Any, model: str, identity: str, version: int) -> None:
    message = answer(list(outputs.items()), model_name=model, id=identity, model_version=str(version))
    message.parameters["more"].bool_param = True
    data = b"?????" + message.SerializeToString()
    response = decode(data, 5)
    assert (response.model, response.version, response.request_id) == (model, version, identity)
    assert response.outputs.keys() == outputs.keys()
    for name, values in outputs.items():
        assert response.outputs[name].dtype == values.dtype
        assert np.array_equal(response.outputs[name], values)
        assert not response.outputs[name].flags.writeable


GOOD = answer([("p", np.ones((1, 3), np.float32))]).SerializeToString()


@given(st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_an_answer_or_a_typed_error(data: bytes) -> None:
    try:
        decode(data)
    except ProtocolError:
        return


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
@settings(max_examples=500, deadline=None)
def test_a_changed_byte_gives_what_protobuf_gives_or_a_typed_error(at: int, byte: int) -> None:
    data = GOOD[:at] + bytes((byte,)) + GOOD[at + 1 :]
    try:
        response = decode(data)
    except ProtocolError:
        return
    try:
        message = service_pb2.ModelInferResponse.FromString(data)
    except DecodeError:  # of a field that the client skips: then it lacks one that it holds against the contract
        whole = decode(GOOD)
        assert (response.model, response.request_id, [*response.outputs]) != ("m", "abc", [*whole.outputs])
        return
    assert (response.model, str(response.version), response.request_id) == (
        message.model_name,
        message.model_version,
        message.id,
    )
    assert [value.tobytes() for value in response.outputs.values()] == list(message.raw_output_contents)
    assert [list(value.shape) for value in response.outputs.values()] == [list(part.shape) for part in message.outputs]


def field(number: int, data: bytes, kind: int = 2) -> bytes:
    return varint(number << 3 | kind) + (varint(len(data)) if kind == 2 else b"") + data


OUTPUT = field(1, b"p") + field(2, b"FP32") + field(3, b"\x01\x03")
REST = field(1, b"m") + field(2, b"2")


def whole(output: bytes = OUTPUT, raw: bytes = bytes(12), rest: bytes = REST) -> bytes:
    return rest + field(5, output) + field(6, raw)


def test_fields_of_a_later_schema_are_passed_over_and_shapes_may_come_one_by_one() -> None:
    later = field(19, b"x") + varint(20 << 3) + b"\x05" + field(21, bytes(8), 1) + field(22, bytes(4), 5)
    single = field(1, b"p") + field(2, b"FP32") + field(3, b"\x01", 0) + field(3, b"\x03", 0) + field(9, b"later")
    for data in (whole(), whole() + later, whole(single)):
        assert decode(data).outputs["p"].shape == (1, 3)


@pytest.mark.parametrize(
    "data",
    [
        whole()[:-1],
        whole() + b"\x0a",
        whole() + field(1, b"m"),
        whole() + field(6, bytes(12)),
        whole() + b"\x0b",
        whole() + b"\x02\x00",
        whole() + b"\x80" * 11,
        whole() + varint(7 << 3) + b"\xff" * 9 + b"\x02",
        whole(raw=bytes(11)),
        whole(rest=field(1, b"m")),
        whole(rest=field(1, b"\xff") + field(2, b"2")),
        whole(rest=field(1, b"\x01", 0) + field(2, b"2")),
        whole(OUTPUT + field(1, b"p")),
        whole(OUTPUT + field(5, b"")),
        whole(OUTPUT + field(3, bytes(8), 1)),
        whole(field(1, b"p") + field(2, b"FP64") + field(3, b"\x01\x03")),
        whole(field(1, b"p") + field(2, b"FP32") + field(3, b"\x01\x83")),
        whole(field(1, b"p") + field(2, b"FP32") + field(3, b"\xff" * 9 + b"\x01")),
        whole() + field(5, OUTPUT) + field(6, bytes(12)),
        REST + field(5, OUTPUT) * 2_000,
    ],
)
def test_what_is_odd_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)

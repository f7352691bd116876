"""An answer like the last one is read quicker, and is accepted, refused and read just as if it were the first."""

from __future__ import annotations

import itertools
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickserve.client import InferResponse
from tickserve.client import _http as http
from tickserve.client._check import Answer, Contract
from tickserve.client._transport import DTYPES, Packed
from tickserve.client._wire import Connection, Head, MalformedError, Reply, WireError
from tickserve.errors import ProtocolError, RequestError
from tickserve.testing import make_manifest

MANIFEST = make_manifest("m")
ORDERS = tuple(itertools.permutations(("probabilities", "score", "bundle_id")))
NUMBERS = st.one_of(st.sampled_from([0.2, 0.3, 0.5, 0.0, 1.0, -1.0]), st.floats(width=32))


def packed(contract: Contract, values: list[float], told: float, bundle_id: int, order: Any, places: Any) -> Packed:
    arrays = {
        "probabilities": np.array([values], np.float32),
        "score": np.array([[told]], np.float32),
        "bundle_id": np.array([[bundle_id]], np.int64),
    }
    data, start = b"head", 4
    for name in order:
        places.setdefault(name, (DTYPES["INT64" if name == "bundle_id" else "FP32"], arrays[name].shape, len(data) - 4))
        data += arrays[name].tobytes()
    return Packed(places, data, start)


def outcome(contract: Contract, outputs: Any) -> object:
    try:
        answer = contract.check_response(InferResponse("m", 1, "id", outputs), 1, None, "id")
    except ProtocolError as error:
        return str(error)
    assert not answer.probabilities.flags.writeable
    return shown(answer)


def shown(answer: Answer) -> object:
    arrays = (answer.probabilities, answer.score)
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays], answer.decision


@settings(deadline=None)
@given(
    values=st.lists(NUMBERS, min_size=3, max_size=3),
    told=NUMBERS,
    other=st.booleans(),
    order=st.sampled_from(ORDERS),
    mutable=st.booleans(),
)
def test_numbers_in_known_places(values: list[float], told: float, other: bool, order: Any, mutable: bool) -> None:
    contract, places = Contract(MANIFEST), {}
    good = packed(contract, [0.25, 0.25, 0.5], 0.25, contract.bundle_id, order, places)
    expected = outcome(Contract(MANIFEST), dict(good))
    assert outcome(contract, good) == outcome(contract, good) == expected
    assert contract._seen is not None
    for told_id in (contract.bundle_id + other, contract.bundle_id):
        answer = packed(contract, values, told, told_id, order, places)
        if mutable:
            answer = Packed(places, bytearray(answer.data), answer.start)
        assert outcome(contract, answer) == outcome(Contract(MANIFEST), dict(answer))


def test_other_places_are_looked_at_in_full() -> None:
    contract, places = Contract(MANIFEST), {}
    good = packed(contract, [0.25, 0.25, 0.5], 0.25, contract.bundle_id, ORDERS[0], places)
    assert outcome(contract, good) == outcome(contract, Packed(dict(places), good.data, good.start))
    wrong: dict[str, Any] = dict(places) | {"score": (DTYPES["FP32"], (1, 1, 1), 12)}
    assert "wrong output" in str(outcome(contract, Packed(wrong, good.data, good.start)))
    assert outcome(contract, good) == outcome(contract, Packed(places, bytearray(good.data), good.start))
    assert contract._seen is not None
    assert contract._seen.places is places
    with pytest.raises(ProtocolError, match="wrong output"):
        contract.check_response(InferResponse("m", 1, "id", good), 2, None, "id")
    assert outcome(contract, good) == outcome(Contract(MANIFEST), dict(good))


ID = "0123456789abcdef"


def answer(identity: str = ID) -> bytes:
    outputs = [
        {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": size}}
        for name, kind, shape, size in (("p", "FP32", [1, 3], 12), ("n", "INT64", [1, 1], 8))
    ]
    text = {"id": identity, "model_name": "m", "model_version": "2", "outputs": outputs}
    return json.dumps(text, separators=(",", ":")).encode()


def read(text: bytes, identity: str, numbers: bytes = bytes(20), more: int = 0) -> object:
    head = Head(200, len(text) + len(numbers), len(text) + more, True)
    try:
        response = http.decode(Reply(head, b"before" + text + numbers, 6), identity)
    except RequestError as error:
        return str(error)
    arrays = {name: (array.dtype, array.shape, array.tobytes()) for name, array in response.outputs.items()}
    return response._replace(outputs=arrays)


def unknown(*arguments: Any) -> object:
    """What is read of an answer that is the first of its kind."""
    http._known.clear()
    http._parse_layout.cache_clear()
    return read(*arguments)


@settings(deadline=None)
@given(
    position=st.integers(0, len(answer()) - 1),
    byte=st.one_of(st.integers(0, 255), st.sampled_from(b'{}[]",:019 \\')),
    identity=st.sampled_from([ID, ID[::-1], "f" * 16, 'a"b', "", "0" * 15]),
    echoed=st.booleans(),
    more=st.sampled_from([0, 0, 0, 1, -1, 20, 21]),
)
def test_a_text_like_the_last_one(position: int, byte: int, identity: str, echoed: bool, more: int) -> None:
    text = bytearray(answer(identity if echoed else ID))
    text[min(position, len(text) - 1)] = byte
    for changed in (bytes(text), answer(identity)):
        expected = unknown(changed, identity, bytes(range(20)), more)
        http._known.clear()
        assert isinstance(read(answer(), ID), InferResponse)
        assert http._known
        assert read(changed, identity, bytes(range(20)), more) == expected


def test_an_answer_without_an_id_names_none() -> None:
    rest = answer().replace(b'"id":"%b",' % ID.encode(), b"")
    assert read(answer(), ID).request_id == ID  # type: ignore[attr-defined]
    assert read(rest, ID).request_id == ""  # type: ignore[attr-defined]
    twice = answer()[:-1] + b',"id":"another"}'
    assert read(twice, ID).request_id == "another"  # type: ignore[attr-defined]
    assert read(twice, ID).request_id == "another"  # type: ignore[attr-defined]


def test_an_empty_output_too_large_for_numpy_is_refused() -> None:
    empty = answer().replace(b"[1,3]", b"[0,67108864,67108864,67108864]").replace(b'_size":12', b'_size":0')
    assert "too large a shape" in str(read(empty, ID, bytes(8)))


class Replayed(Connection):
    """A connection on which these bytes come, piece by piece."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces, self._seen, self._head = pieces, None, Head(0, 0, None, False)

    def more(self, deadline_ns: int) -> bytes:
        """The next piece."""
        if not self._pieces:
            raise WireError("no more")
        return self._pieces.pop(0)

    def fill(self, buffer: memoryview, deadline_ns: int) -> None:
        """From the next pieces."""
        data = b"".join(self._pieces)
        self._pieces = []
        if len(data) < len(buffer):
            raise WireError("no more")
        buffer[:] = data[: len(buffer)]
        self._pieces = [data[len(buffer) :]] if len(data) > len(buffer) else []

    def surplus(self) -> bool:
        """Whether a piece is left."""
        return bool(self._pieces)


GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"


def received(connection: Replayed) -> object:
    try:
        head, data, start = connection.receive(0)
    except WireError as error:
        return type(error), str(error)
    return head, bytes(data[start:]), connection.reusable


@settings(deadline=None)
@given(
    data=st.one_of(
        st.tuples(st.integers(0, len(GOOD) - 1), st.binary(max_size=2)).map(
            lambda change: GOOD[: change[0]] + change[1] + GOOD[change[0] + 1 :]
        ),
        st.sampled_from([GOOD, GOOD + b"!", GOOD[:-1], GOOD.replace(b"4", b"0", 1), GOOD[:-4] + GOOD]),
        st.sampled_from([GOOD.replace(b"200", b"100")[:-4] + GOOD, GOOD.replace(b"4\r", b"4\r\nConnection: close\r")]),
    ),
    cut=st.integers(0, 60),
)
def test_a_head_like_the_last_one(data: bytes, cut: int) -> None:
    pieces = [piece for piece in (data[:cut], data[cut:]) if piece]
    first = Replayed(list(pieces))
    later = Replayed([GOOD, *pieces])
    assert received(later) == (Head(200, 4, None, True), b"body", True)
    assert received(later) == received(first)


def test_a_head_that_is_new_is_read_and_remembered() -> None:
    other = GOOD.replace(b"4", b"2").replace(b"body", b"it")
    connection = Replayed([GOOD, other, other, GOOD])
    assert [received(connection) for _ in range(4)] == [
        (Head(200, size, None, True), text, True) for size, text in ((4, b"body"), (2, b"it"), (2, b"it"), (4, b"body"))
    ]
    with pytest.raises(MalformedError):
        Replayed([b"\n"]).receive(0)


@pytest.mark.parametrize("order", ORDERS)
def test_the_numbers_are_read_as_they_are_written(order: Any) -> None:
    contract, places = Contract(MANIFEST), {}
    good = packed(contract, [0.25, 0.25, 0.5], 0.25, contract.bundle_id, order, places)
    outcome(contract, good)
    assert contract._seen is not None
    numbers = contract._seen.numbers(good.data, good.start)
    assert contract._seen.ordered(numbers) == (0.25, 0.25, 0.5, 0.25, contract.bundle_id)
    assert struct.calcsize("<3ffq") == len(good.data) - good.start


def test_what_else_lies_between_the_numbers_is_passed_over() -> None:
    contract, places = Contract(MANIFEST), {}
    good = packed(contract, [0.25, 0.25, 0.5], 0.25, contract.bundle_id, ORDERS[0], places)
    apart = {name: (dtype, shape, 3 + 2 * offset) for name, (dtype, shape, offset) in places.items()}
    data = bytearray(b"\xff" * 99)
    for name, (_, _, offset) in apart.items():
        told = good[name].tobytes()
        data[offset + 4 : offset + 4 + len(told)] = told
    assert outcome(contract, Packed(apart, bytes(data), 4)) == outcome(contract, Packed(apart, bytes(data), 4))
    assert outcome(contract, Packed(apart, bytes(data), 4)) == outcome(Contract(MANIFEST), dict(good))
    assert contract._seen is not None
    assert contract._seen.places is apart

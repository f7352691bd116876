"""Answers that are well formed and still not the pinned model's: no number may come out of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tickserve.client import InferResponse
from tickserve.client._check import Contract
from tickserve.client._transport import parse_version, sized
from tickserve.errors import ProtocolError

MODEL = "hand-l1-gbdt"
GOOD = ([0.2, 0.3, 0.5], 0.3)


@pytest.fixture
def contract(make_manifest: Any) -> Contract:
    return Contract(make_manifest())


def response(contract: Contract, *rows: tuple[list[float], float], **changes: Any) -> InferResponse:
    outputs: dict[str, Any] = {
        "probabilities": np.array([row[0] for row in rows], np.float32),
        "score": np.array([[row[1]] for row in rows], np.float32),
        "bundle_id": np.full((len(rows), 1), contract.bundle_id, np.int64),
    }
    return InferResponse(MODEL, 1, "id", outputs)._replace(**changes)


def test_the_decision_is_the_most_probable_class_the_first_of_equals(contract: Contract) -> None:
    rows = (GOOD, ([0.4, 0.2, 0.4], 0.0), ([0.1, 0.8, 0.1], 0.0), ([1.0, 0.0, 0.0], -1.0), ([1 / 3] * 3, 0.0))
    answer = contract.check_response(response(contract, *rows), 5, None, "id")
    assert answer.decision == ("up", "down", "flat", "down", "down")
    assert answer.score.shape == (5,)
    many = contract.check_response(response(contract, *rows * 20), 100, None, "id")
    assert many.decision == answer.decision * 20


@pytest.mark.parametrize("off", [1e-3, -1e-3])
def test_half_precision_rounds(contract: Contract, off: float) -> None:
    row = ([0.2 + off, 0.3, 0.5], 0.3)
    assert contract.check_response(response(contract, row), 1, None, "id").decision == ("up",)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (([-7.0, 90.0, 5.0], 12.0), "no distribution"),
        (([0.2, 0.3, 0.4], 0.2), "no distribution"),
        (([-0.1, 0.6, 0.5], 0.6), "no distribution"),
        (([0.6, -0.1, 0.5], -0.1), "no distribution"),
        (([0.6, 0.5, -0.1], -0.7), "no distribution"),
        (([0.0, 0.0, 0.0], 0.0), "no distribution"),
        (([0.2, 0.3, 0.5], -0.3), "contradicts the probabilities"),
        (([0.5, 0.3, 0.2], 0.3), "contradicts the probabilities"),
        (([0.2, 0.3, 0.5], 0.31), "contradicts the probabilities"),
        (([np.nan, 0.5, 0.5], 0.3), "not finite"),
        (([0.2, np.nan, 0.5], 0.3), "not finite"),
        (([0.2, 0.3, np.inf], 0.3), "not finite"),
        (([0.2, 0.3, 0.5], np.nan), "not finite"),
        (([0.2, 0.3, 0.5], -np.inf), "not finite"),
    ],
)
def test_impossible_numbers_in_any_row(contract: Contract, row: Any, says: str) -> None:
    with pytest.raises(ProtocolError, match=f"row 1 of the answer.*{says}"):
        contract.check_response(response(contract, GOOD, row), 2, None, "id")
    with pytest.raises(ProtocolError, match=f"row 30 of the answer.*{says}"):
        contract.check_response(response(contract, *[GOOD] * 30, row, GOOD), 32, None, "id")


@pytest.mark.parametrize("echo", ["", "other", "ID"])
def test_an_answer_that_does_not_name_its_request(contract: Contract, echo: str) -> None:
    contract.check_response(response(contract, GOOD), 1, 1, "id")
    with pytest.raises(ProtocolError, match="another request id"):
        contract.check_response(response(contract, GOOD, request_id=echo), 1, 1, "id")


@pytest.mark.parametrize("text", ["1", "9", "10", "999999999999999999"])
def test_versions(text: str) -> None:
    assert parse_version(text) == int(text)


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "+1", "1_0", "1.0", " 1", "1\n", "01", "١", "x", "9" * 20, 1, None, [1]]
)
def test_versions_that_are_none(text: Any) -> None:
    with pytest.raises(ProtocolError, match="not a version"):
        parse_version(text)


@pytest.mark.parametrize(
    "shape",
    [(0, 10**30), (1,) * 100, (-1,), (-1, -3), (1.0,), (True,), ("1",), (2**62, 0), (10**5000,)],
    ids=range(9),
)
def test_shapes_that_are_none(shape: Any) -> None:
    with pytest.raises(ProtocolError, match="not a shape"):
        sized("p", "FP32", shape)
    assert sized("p", "INT64", (2, 3)) == (np.dtype("<i8"), 48)

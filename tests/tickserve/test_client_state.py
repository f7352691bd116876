"""The state a stateful model's caller carries, as the client holds it: shape, finite numbers, read-only."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from tickserve.errors import InputRejectedError, ProtocolError
from tickserve.testing import Answer, make_manifest, mock_client

MODEL = "mock-model"
ROW, ZEROS = np.zeros((1, 3), np.float32), np.zeros((1, 2, 4), np.float32)


def client(*script: Answer):  # noqa: ANN201
    return mock_client(make_manifest(state=(2, 4)), script, deadline_ms=20_000)


def test_the_next_state_goes_straight_into_the_next_call() -> None:
    scorer = client()
    first = scorer.score(MODEL, {"features": ROW, "hidden": ZEROS})
    assert first.state is not None
    second = scorer.score(MODEL, {"features": ROW, **first.state})
    assert second.state is not None
    np.testing.assert_array_equal(second.state["hidden"], ZEROS + 2)
    with pytest.raises(ValueError, match="read-only"):
        first.state["hidden"][0] = 1
    assert json.loads(json.dumps(first.to_json()))["state"]["hidden"] == (ZEROS + 1).tolist()
    assert pickle.loads(pickle.dumps(first)).state["hidden"].shape == (1, 2, 4)


def test_several_streams_in_one_request_get_their_own_states() -> None:
    states = np.arange(3 * 8, dtype=np.float32).reshape(3, 2, 4)
    signal = client().score(MODEL, {"features": np.zeros((3, 3), np.float32), "hidden": states})
    assert signal.state is not None
    np.testing.assert_array_equal(signal.state["hidden"], states + 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_refused(value: float) -> None:
    state = np.concatenate([ZEROS, ZEROS])
    state[1, 0, 2] = value
    scorer = client()
    with pytest.raises(InputRejectedError, match=r"hidden.*row 1"):
        scorer.score(MODEL, {"features": np.zeros((2, 3), np.float32), "hidden": state})
    assert not scorer.transport.requests


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (ZEROS[0], "wrong shape"),
        (np.zeros((1, 4, 2), np.float32), "wrong shape"),
        (ZEROS.astype(np.float64), "wrong dtype"),
        (np.zeros((2, 2, 4), np.float32), "differ in rows"),
    ],
)
def test_a_state_of_another_form_is_refused(state: np.ndarray, message: str) -> None:
    with pytest.raises(InputRejectedError, match=message):
        client().score(MODEL, {"features": ROW, "hidden": state})


def test_a_state_cannot_be_left_out() -> None:
    with pytest.raises(InputRejectedError, match="hidden"):
        client().score(MODEL, {"features": ROW})
    with pytest.raises(InputRejectedError, match="several tensors"):
        client().score(MODEL, ROW)


@pytest.mark.parametrize("state", [ZEROS + np.nan, np.zeros((1, 2, 5), np.float32)])
def test_an_answer_with_an_impossible_state_is_refused(state: np.ndarray) -> None:
    with pytest.raises(ProtocolError, match="hidden_out"):
        client(Answer(state={"hidden": state})).score(MODEL, {"features": ROW, "hidden": ZEROS})

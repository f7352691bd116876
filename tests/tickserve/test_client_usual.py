"""The cheap way through a check and the full one: whatever is given, both clear, flag and refuse the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tickserve.client._check import Contract
from tickserve.client._lanes import Ends
from tickserve.client._state import FEW_BYTES, finite
from tickserve.client._usual import MOST_VALUES
from tickserve.errors import InputRejectedError
from tickserve.testing import make_manifest as mock_manifest

INSIDE = np.float32(0.25)
LIMIT = float(np.finfo(np.float32).max)
ODD_VALUES = [math.nan, -math.nan, math.inf, -math.inf, LIMIT, -LIMIT, -0.0, 0.0, 1e-45, 15.0, -15.0]
ODD_VALUES += [
    float(np.nextafter(np.float32(15), np.float32(99))),
    float(np.nextafter(np.float32(-15), np.float32(-99))),
]
VALUES = st.one_of(st.sampled_from(ODD_VALUES), st.floats(width=32))
FLOATS = st.sampled_from(["<f4", ">f4", "<f8", "<f2", "<i4", "?", "O"])
LAYOUTS = {
    "plain": lambda array: array,
    "fortran": np.asfortranarray,
    "reversed": lambda array: array[::-1][::-1],
    "strided": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
    "read-only": lambda array: _read_only(array),
    "subclass": lambda array: array.view(type("Mine", (np.ndarray,), {})),
    "masked": np.ma.masked_array,
    "list": lambda array: array.tolist(),
    "none": lambda array: None,
}
SHAPES = st.sampled_from(
    [(1, 4), (2, 4), (8, 4), (9, 4), (0, 4), (4,), (), (1, 3), (4, 1), (1, 1, 4), (1, 4, 1), (1, 0), (40, 4), (300, 4)]
)


def _read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def outcome(check: Any, inputs: object) -> object:
    """What a check makes of `inputs`: tensors, batch and flags, or the error's text."""
    try:
        return check(inputs)
    except InputRejectedError as error:
        return str(error)


def same(contract: Contract, inputs: object) -> bool:
    """Whether the call's check and the full one agree; and whether the cheap one cleared `inputs`."""
    full = outcome(contract._checked, inputs)
    assert outcome(contract.check_inputs, inputs) == full
    cleared = contract._usual.clear(inputs)
    if cleared is not None:
        assert cleared == full
    return cleared is not None


@st.composite
def lone_arrays(draw: st.DrawFn) -> object:
    """One array, odd in any way or in none."""
    shape = draw(SHAPES)
    array = np.full(shape, INSIDE, np.float32)
    for _ in range(draw(st.integers(0, 2)) if array.size else 0):
        array.reshape(-1)[draw(st.integers(0, array.size - 1))] = draw(VALUES)
    if draw(st.integers(0, 4)) == 0:
        with np.errstate(all="ignore"):
            array = array.astype(draw(FLOATS))
    if array.ndim:
        array = LAYOUTS[draw(st.sampled_from(["plain"] * 6 + list(LAYOUTS)))](array)
    return {draw(st.sampled_from(["features", "other"])): array} if draw(st.integers(0, 5)) == 0 else array


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("policy", ["native", "reject"])
@pytest.mark.parametrize("limited", [True, False])
@given(inputs=lone_arrays())
def test_one_tensor(make_manifest: Any, policy: str, limited: bool, inputs: object) -> None:
    manifest = make_manifest(nan_policy=policy)
    same(Contract(manifest if limited else manifest.model_copy(update={"export": None})), inputs)


@pytest.mark.parametrize("policy", ["native", "reject"])
@pytest.mark.parametrize("rows", [1, 40])  # as one whole number, and by numpy
@pytest.mark.parametrize("value", ODD_VALUES)
def test_one_odd_value(make_manifest: Any, policy: str, rows: int, value: float) -> None:
    contract = Contract(make_manifest(nan_policy=policy).model_copy(update={"export": None}))
    array = np.full((rows, 4), INSIDE, np.float32)
    array[-1, 2] = value
    same(contract, array)


STATEFUL = mock_manifest("stepped", columns="abcd", state=(1, 2))


@given(
    features=lone_arrays(),
    state=st.lists(VALUES, min_size=2, max_size=2),
    rows=st.sampled_from([1, 1, 1, 2, 0]),
    change=st.sampled_from(["", "", "", "missing", "extra", "renamed", "flat", "int", "mapping", "number"]),
)
def test_a_row_and_its_state(features: object, state: list[float], rows: int, change: str) -> None:
    hidden: Any = np.array([[state]] * rows, np.float32).reshape(rows, 1, 2)
    given: dict[Any, Any] = {"features": features if isinstance(features, np.ndarray) else INSIDE, "hidden": hidden}
    if change in ("missing", "renamed"):
        given.pop("hidden")
    if change in ("extra", "renamed"):
        given["cell"] = hidden
    if change == "number":
        given[3] = given.pop("hidden")
    if change in ("flat", "int"):
        given["hidden"] = hidden.reshape(rows, 2) if change == "flat" else hidden.view(np.int32)
    same(Contract(STATEFUL), type("Mine", (dict,), {})(given) if change == "mapping" else given)


def test_the_usual_call_goes_the_cheap_way(make_manifest: Any) -> None:
    contract = Contract(make_manifest())
    row = np.full((1, 4), INSIDE, np.float32)
    for inputs in (row, {"features": row}, np.repeat(row, 8, axis=0), np.asfortranarray(np.repeat(row, 2, axis=0))):
        assert same(contract, inputs)
    row[0, 1] = np.nan
    assert same(contract, row)  # a missing value of a model that may have them
    assert not same(Contract(make_manifest(nan_policy="reject")), row)
    both = {"features": np.zeros((1, 4), np.float32), "hidden": np.zeros((1, 1, 2), np.float32)}
    assert same(Contract(STATEFUL), both)
    assert not same(Contract(STATEFUL), both["features"])


def test_tensors_of_one_request_that_differ_in_rows_or_number() -> None:
    contract, row, hidden = Contract(STATEFUL), np.zeros((1, 4), np.float32), np.zeros((1, 1, 2), np.float32)
    for inputs in (
        {"features": row, "hidden": np.repeat(hidden, 2, axis=0)},
        {"features": np.repeat(row, 2, axis=0), "hidden": hidden},
        {"features": row, "hidden": hidden, "cell": hidden},
        {"features": row},
    ):
        assert isinstance(outcome(contract.check_inputs, inputs), str)
        assert not same(contract, inputs)


def test_many_values_go_the_other_way(make_manifest: Any) -> None:
    contract = Contract(make_manifest().model_copy(update={"export": None}))
    rows = MOST_VALUES // 4
    assert same(contract, np.zeros((rows, 4), np.float32))
    assert not same(contract, np.zeros((rows + 1, 4), np.float32))


@given(values=st.lists(st.floats(width=32), max_size=40), many=st.booleans())
def test_finite_is_what_numpy_calls_finite(values: list[float], many: bool) -> None:
    array = np.array(values, np.float32)
    if many:
        array = np.concatenate([np.zeros(FEW_BYTES // 4 + 1, np.float32), array])
    assert finite(array.tobytes()) == bool(np.isfinite(array).all())


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8))
def test_finite_for_every_pattern_of_bits(bits: list[int]) -> None:
    array = np.array(bits, np.uint32).view(np.float32)
    assert finite(array.tobytes()) == bool(np.isfinite(array).all())


ENDS = st.floats(width=32, allow_nan=False, allow_infinity=False)
BITS = st.integers(0, 2**32 - 1)


@given(columns=st.lists(st.tuples(ENDS, ENDS, st.one_of(VALUES, ENDS)), min_size=1, max_size=12), nan=st.booleans())
def test_between_ends_is_what_numpy_finds(columns: list[tuple[float, float, float]], nan: bool) -> None:
    array = np.array(columns, np.float32).T
    lowest, highest = np.minimum(array[0], array[1]), np.maximum(array[0], array[1])
    assert agrees(lowest, highest, array[2], nan)
    assert agrees(lowest, highest, np.clip(array[2], lowest, highest), nan)


@given(low=BITS, high=BITS, values=st.lists(BITS, max_size=8), nan=st.booleans())
def test_between_ends_for_every_pattern_of_bits(low: int, high: int, values: list[int], nan: bool) -> None:
    ends = np.array([low, high], np.uint32).view(np.float32)
    if not np.isfinite(ends).all():
        return
    near = [(end + step) % 2**32 for end in (low, high) for step in range(-2, 3)]
    for bits in (*values, *near):  # each among neighbours that are inside
        array = np.array([low, bits, high], np.uint32).view(np.float32)
        assert agrees(np.full_like(array, ends.min()), np.full_like(array, ends.max()), array, nan)


def agrees(lowest: np.ndarray, highest: np.ndarray, array: np.ndarray, nan: bool) -> bool:
    """What is cleared is inside; what is not is outside, but for a zero at an end, which may have another sign."""
    inside = (array >= lowest) & (array <= highest) | (np.isnan(array) & nan)
    zeros = (array == 0) & ((lowest == 0) | (highest == 0))
    cleared = Ends(lowest.tobytes(), highest.tobytes()).hold(array.tobytes(), nan=nan)
    return cleared == bool(inside.all()) or (not cleared and bool(zeros.any()))

"""The manifest's contract, compiled: what a request must look like before it is sent, and an answer before it is used.

Letters: B rows, T window steps, F features, K classes. Nothing is cast, reordered, filled or cut: what does not follow
the contract is refused with the tensor, the row and the column named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tickserve.client._arguments import shown
from tickserve.client._consistency import (
    BUNDLE_ID,
    PROBABILITIES,
    SCORE,
    check_digest,
    check_input_specs,
    check_output_specs,
    check_ranges,
)
from tickserve.client._state import check_state, next_state
from tickserve.client._transport import DTYPES, Array, InferResponse, Packed, Places, Tensor, named
from tickserve.client._usual import Checked, Rule, Usual
from tickserve.errors import InputRejectedError, ProtocolError
from tickserve.manifest import CLASSES, FeatureContract, Manifest, TensorSpec

Mask = npt.NDArray[np.bool_]
Inputs = Mapping[str, npt.NDArray[Any]] | npt.NDArray[Any]

MAX_FLAGS = 64
# A softmax of three classes in half precision is off by at most 3 * 2**-11; nothing honest is further.
ROUNDING = 2e-3
FEW_ROWS = 16
DOWN, FLAT, UP = CLASSES
FP32 = DTYPES["FP32"]


class Answer(NamedTuple):
    """Outputs that passed: float32 [B, K], float32 [B], and each row's most probable class (the first of equals).

    `state` is a stateful model's next state by the names of its inputs, read-only; None for any other model.
    """

    probabilities: npt.NDArray[np.float32]
    score: npt.NDArray[np.float32]
    decision: tuple[str, ...]
    state: Mapping[str, npt.NDArray[np.float32]] | None = None


class _Seen(NamedTuple):
    """The places of answers of one row that passed: how their numbers are read, and where the two arrays begin.

    `numbers` gives them as they lie; `ordered` puts those in the order down, flat, up, score, bundle id.
    """

    places: Places
    numbers: Callable[[bytes | bytearray, int], tuple[Any, ...]]
    ordered: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    probabilities: int
    score: int


class Contract:
    """One model's contract. Raises ArtifactError when the manifest contradicts itself."""

    def __init__(self, manifest: Manifest) -> None:
        check_ranges(manifest.features)
        state = manifest.state.tensors if manifest.state else ()
        self._state = tuple((each.input, each.output) for each in state)
        fed_back = {each.input for each in state}
        check_input_specs(
            [spec for spec in manifest.inputs if spec.name not in fed_back], len(manifest.features.columns)
        )
        check_output_specs(manifest)
        self.manifest, self.name, self.classes = manifest, manifest.name, manifest.classes
        self.bundle_digest, self.bundle_id = manifest.digest(), manifest.bundle_id()
        self._bundle_bytes = self.bundle_id.to_bytes(8, "little", signed=True)
        self.feature_digest, self.columns = manifest.features.digest, manifest.features.columns
        self.max_batch = None if manifest.export is None else manifest.export.max_batch
        check_digest(manifest.export, self.bundle_digest)
        self._rejects_nan = manifest.nan_policy == "reject"
        far = _far(manifest.features)
        self._inputs = tuple(_input(spec, far, is_state=spec.name in fed_back) for spec in manifest.inputs)
        self._usual = Usual(self._inputs, self.max_batch, rejects_nan=self._rejects_nan)
        self._outputs = {spec.name: (DTYPES[spec.dtype], spec.shape) for spec in manifest.outputs}
        self._seen: _Seen | None = None

    def check_inputs(self, inputs: Inputs) -> Checked:
        """Hold `inputs` ([B, F] or [B, T, F], one array or by tensor name) against the contract.

        Raises InputRejectedError. Values far outside the training range are flagged, not refused.
        """
        return self._usual.clear(inputs) or self._checked(inputs)

    def _checked(self, inputs: Inputs) -> Checked:
        rules = self._inputs
        arrays: list[Any]
        if isinstance(inputs, Mapping):
            _check_names(inputs, rules)
            arrays = [inputs[rule.name] for rule in rules]
        elif len(rules) == 1:
            arrays = [inputs]
        else:
            raise InputRejectedError("this model takes several tensors", expected=_names(rules), was="one array")
        checked = [self._check_array(rule, value) for rule, value in zip(rules, arrays, strict=True)]
        batch = self._check_batch(checked)  # before any value is looked at: a batch too large costs nothing
        tensors: list[Tensor] = []
        flags: tuple[str, ...] = ()
        for rule, array in zip(rules, checked, strict=True):
            flags += check_state(rule.name, array) if rule.is_state else self._check_values(rule, array)
            # tobytes gives C order whatever the strides are, and a snapshot the caller can no longer change.
            tensors.append(Tensor(rule.name, rule.datatype, array.shape, array.tobytes()))
        return Checked(tuple(tensors), batch, flags)

    def zeros(self) -> Inputs:
        """One row of zeros as an engine gives it: an array where there is one input, else by tensor name."""
        rows = {rule.name: np.zeros((1, *rule.shape), rule.dtype) for rule in self._inputs}
        return next(iter(rows.values())) if len(rows) == 1 else rows

    def check_features(self, columns: Sequence[str] | None, digest: str | None) -> None:
        """Refuse features of another spec or in another order than the model was trained on."""
        if digest is not None and not (isinstance(digest, str) and digest == self.feature_digest):
            raise InputRejectedError(
                "the features are not the model's",
                field="feature_digest",
                expected=self.feature_digest,
                was=shown(digest, 100),
            )
        if columns is None:
            return
        try:
            given = tuple(columns)
            same = given == self.columns
        except (TypeError, ValueError) as error:  # no sequence; arrays do not compare to one truth
            raise InputRejectedError(
                "not column names", field="columns", expected="a sequence of text", was=shown(columns)
            ) from error
        if not same:
            _refuse_columns(given, self.columns)

    def check_response(self, response: InferResponse, batch: int, version: int | None, request_id: str) -> Answer:
        """Refuse an answer of another model, version, request, shape or bundle, and one of impossible numbers."""
        model, answered, identity, outputs, _, _, _ = response
        if model != self.name or identity != request_id or (version is not None and version != answered):
            self._refuse_echo(response, version, request_id)
        seen = self._seen
        if seen is not None and type(outputs) is Packed and outputs.places is seen.places and batch == 1:
            # In the places of an answer that was looked at in full: what is left to look at is the numbers.
            down, flat, up, told, bundle_id = seen.ordered(seen.numbers(outputs.data, outputs.start))
            if bundle_id != self.bundle_id:
                self._refuse_bundle(bundle_id)
            decision: tuple[str, ...] = (_class_of(0, down, flat, up, told),)
            probabilities = outputs.array(FP32, (1, len(CLASSES)), seen.probabilities)
            score = outputs.array(FP32, (1,), seen.score)
        else:
            self._check_outputs(outputs, batch)
            probabilities, score = outputs[PROBABILITIES], outputs[SCORE].reshape(batch)
            decision = _decide(probabilities, score)
            if type(outputs) is Packed and batch == 1:
                self._seen = _see(outputs.places)
        state = next_state(outputs, self._state) if self._state else None
        return named(Answer, (probabilities, score, decision, state))

    def _check_outputs(self, outputs: Mapping[str, Array], batch: int) -> None:
        if outputs.keys() != self._outputs.keys():
            raise ProtocolError("wrong outputs", expected=", ".join(self._outputs), was=", ".join(outputs)[:200])
        for name, (dtype, shape) in self._outputs.items():
            array = outputs[name]
            if array.shape != (batch, *shape) or (array.dtype is not dtype and array.dtype != dtype):
                _refuse_output(name, array, dtype, (batch, *shape))
        if outputs[BUNDLE_ID].tobytes() != self._bundle_bytes * batch:
            self._refuse_bundle(outputs[BUNDLE_ID].flat[0])

    def _refuse_bundle(self, was: object) -> None:
        raise ProtocolError(
            "another model than the pinned one answered", field=BUNDLE_ID, expected=str(self.bundle_id), was=str(was)
        )

    def _refuse_echo(self, response: InferResponse, version: int | None, request_id: str) -> None:
        _check_echo("model", self.name, response.model)
        _check_echo("request id", request_id, response.request_id)
        if version is not None:
            _check_echo("version", str(version), str(response.version))

    def _check_array(self, rule: Rule, value: object) -> npt.NDArray[Any]:
        if type(value) is not np.ndarray:
            if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
                raise InputRejectedError("not an array", field=rule.name, expected="numpy.ndarray", was=_kind(value))
            value = np.asarray(value)
        if value.dtype is not rule.dtype and value.dtype != rule.dtype:
            raise InputRejectedError(
                "wrong dtype",
                field=rule.name,
                expected=f"{rule.dtype.name} ({rule.datatype})",
                was=_dtype(value.dtype),
                hint=f"nothing is cast here; .astype(np.{rule.dtype.name}) casts",
            )
        if value.ndim == 0 or value.shape[1:] != rule.shape:
            self._refuse_shape(rule, value.shape)
        return value

    def _refuse_shape(self, rule: Rule, shape: tuple[int, ...]) -> None:
        missing_axis = shape == rule.shape
        raise InputRejectedError(
            "wrong shape",
            field=rule.name,
            expected="[" + ", ".join(["B", *map(str, rule.shape)]) + "]",
            was=str(list(shape)),
            hint="for one row give the batch axis too: array[np.newaxis]" if missing_axis else None,
        )

    def _check_batch(self, arrays: Sequence[npt.NDArray[Any]]) -> int:
        batch = arrays[0].shape[0]
        if batch < 1 or (self.max_batch is not None and batch > self.max_batch):
            limit = f"1 to {self.max_batch} rows" if self.max_batch is not None else "1 row or more"
            raise InputRejectedError("wrong batch size", field=self._inputs[0].name, expected=limit, was=str(batch))
        for rule, array in zip(self._inputs, arrays, strict=True):
            if array.shape[0] != batch:
                raise InputRejectedError(
                    "tensors of one request differ in rows", field=rule.name, expected=str(batch), was=str(len(array))
                )
        return batch

    def _check_values(self, rule: Rule, array: npt.NDArray[Any]) -> tuple[str, ...]:
        # NaN and infinity compare false, so one pass clears an ordinary request of all three questions.
        inside: Mask = (array >= rule.lowest) & (array <= rule.highest)
        if b"\0" not in inside.tobytes():  # all of them, without the cost of numpy's reduction on a short array
            return ()
        unknown: Mask = np.isnan(array)
        if self._rejects_nan and unknown.any():
            self._refuse_value(rule.name, array, unknown, "NaN is not allowed by the manifest's nan_policy 'reject'")
        infinite: Mask = np.isinf(array)
        if infinite.any():
            self._refuse_value(rule.name, array, infinite, "not finite")
        outside = ~(inside | unknown)
        hit = np.flatnonzero(outside.reshape(-1, outside.shape[-1]).any(axis=0))[:MAX_FLAGS]
        return tuple(f"out_of_range:{self.columns[column]}" for column in hit)

    def _refuse_value(self, name: str, array: npt.NDArray[Any], where: Mask, message: str) -> None:
        index = tuple(int(axis) for axis in np.argwhere(where)[0])
        step = f", step {index[1]}" if len(index) == 3 else ""
        raise InputRejectedError(
            f"row {index[0]}{step}, column {self.columns[index[-1]]!r}: {message}",
            field=name,
            expected="a finite number",
            was=str(array[index]),
        )


def _far(features: FeatureContract) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The training range widened by its own span on both sides: new market data leaves the bare range all the time.

    A column that was constant in training has no span: any other value is far, as the model has seen none.
    """
    low, high = np.array(features.minimum, np.float64), np.array(features.maximum, np.float64)
    limit = float(np.finfo(np.float32).max)  # beyond it lies infinity, which must stay outside
    with np.errstate(over="ignore"):
        span = high - low
        lowest, highest = np.clip(low - span, -limit, limit), np.clip(high + span, -limit, limit)
    return lowest.astype(np.float32), highest.astype(np.float32)


def _input(spec: TensorSpec, far: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]], *, is_state: bool) -> Rule:
    shape = (1, 1) if is_state else (1, *spec.shape)
    lowest, highest = (np.broadcast_to(bound[:1] if is_state else bound, shape).copy() for bound in far)
    return Rule(spec.name, spec.dtype, DTYPES[spec.dtype], spec.shape, is_state, lowest, highest)


def _names(rules: Sequence[Rule]) -> str:
    return ", ".join(rule.name for rule in rules)


def _check_names(inputs: Mapping[str, object], rules: Sequence[Rule]) -> None:
    if len(inputs) == len(rules) and all(rule.name in inputs for rule in rules):
        return
    given = ", ".join(_plain(name)[:40] for name in list(inputs)[:8]) or "none"
    missing = [rule.name for rule in rules if rule.name not in inputs]
    if missing:
        raise InputRejectedError("a tensor is missing", field=missing[0], expected=_names(rules), was=given)
    extra = next(name for name in inputs if all(name != rule.name for rule in rules))
    raise InputRejectedError(
        "the model has no such tensor", field=_plain(extra)[:100], expected=_names(rules), was=given
    )


def _plain(name: object) -> str:
    return name if isinstance(name, str) else shown(name)


def _refuse_columns(given: tuple[object, ...], expected: tuple[str, ...]) -> None:
    if len(given) != len(expected):
        raise InputRejectedError(
            "wrong columns", field="columns", expected=f"{len(expected)} columns", was=str(len(given))
        )
    names = [name for name in given if isinstance(name, str)]
    if len(names) != len(given):
        raise InputRejectedError("not column names", field="columns", expected="text only", was=shown(given))
    at = next(index for index, pair in enumerate(zip(names, expected, strict=True)) if pair[0] != pair[1])
    permuted = sorted(names) == sorted(expected)
    raise InputRejectedError(
        f"{'permuted' if permuted else 'wrong'} columns, first at position {at}",
        field="columns",
        expected=repr(expected[at]),
        was=shown(names[at], 100),
    )


def _see(places: Places) -> _Seen | None:
    """For answers in `places`, of one row: a server answers in an order of its own (by name, as it happens)."""
    names = sorted(_NUMBERS, key=lambda name: places[name][2])
    layout, taken, end = "<", list[int](), 0
    for name in names:
        form, size, which = _NUMBERS[name]
        start = places[name][2]
        if start < end:  # one lies within another: no server says so
            return None
        layout += f"{start - end}x{form}"
        taken += which
        end = start + size
    ordered = itemgetter(*[taken.index(which) for which in range(len(taken))])
    return _Seen(places, Struct(layout).unpack_from, ordered, places[PROBABILITIES][2], places[SCORE][2])


# Of one row: how the numbers are read, their bytes, and which they are of down, flat, up, score and bundle id.
_NUMBERS = {PROBABILITIES: ("3f", 12, (0, 1, 2)), SCORE: ("f", 4, (3,)), BUNDLE_ID: ("q", 8, (4,))}


def _check_echo(what: str, expected: str, was: str) -> None:
    if expected != was:
        raise ProtocolError(f"the answer is of another {what}", field=what, expected=expected, was=shown(was, 100))


def _refuse_output(name: str, array: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    raise ProtocolError(
        "wrong output",
        field=name,
        expected=f"{dtype.name} {list(shape)}",
        was=f"{array.dtype.name} {list(array.shape)}",
    )


def _decide(probabilities: npt.NDArray[np.float32], score: npt.NDArray[np.float32]) -> tuple[str, ...]:
    """Each row's class, once its numbers are a distribution and its score is their p(up) - p(down).

    NaN and infinity fail the comparisons too. A few rows, the usual call, are faster in Python than in numpy.
    """
    if len(score) > FEW_ROWS and _all_good(probabilities, score):
        return tuple([CLASSES[index] for index in probabilities.argmax(axis=1).tolist()])
    if len(score) == 1:
        ((down, flat, up),), (told,) = probabilities.tolist(), score.tolist()
        return (_class_of(0, down, flat, up, told),)
    rows = enumerate(zip(probabilities.tolist(), score.tolist(), strict=True))
    return tuple([_class_of(row, down, flat, up, told) for row, ((down, flat, up), told) in rows])


def _class_of(row: int, down: float, flat: float, up: float, told: float) -> str:
    least = down if down < up else up
    if not (
        (least if least < flat else flat) >= -ROUNDING
        and -ROUNDING <= down + flat + up - 1 <= ROUNDING
        and -ROUNDING <= up - down - told <= ROUNDING
    ):
        _refuse_numbers(row, [down, flat, up], told)
    return DOWN if down >= flat and down >= up else FLAT if flat >= up else UP


def _all_good(probabilities: npt.NDArray[np.float32], score: npt.NDArray[np.float32]) -> bool:
    with np.errstate(all="ignore"):  # infinity minus infinity
        sums = np.abs(probabilities.sum(axis=1) - 1) <= ROUNDING
        scores = np.abs(probabilities[:, 2] - probabilities[:, 0] - score) <= ROUNDING
    return bool(sums.all() and scores.all() and (probabilities >= -ROUNDING).all())


def _refuse_numbers(row: int, values: list[float], score: float) -> None:
    if not all(map(math.isfinite, (*values, score))):
        name = PROBABILITIES if math.isfinite(score) else SCORE
        raise ProtocolError(f"row {row} of the answer is not finite", field=name, expected="finite numbers")
    if min(values) < -ROUNDING or abs(sum(values) - 1) > ROUNDING:
        message, name, expected, was = "no distribution", PROBABILITIES, "numbers from 0 that add up to 1", str(values)
    else:
        message, name, was = "contradicts the probabilities", SCORE, str(score)
        expected = f"p(up) - p(down) = {values[2] - values[0]:.6f}"
    raise ProtocolError(f"row {row} of the answer: {message}", field=name, expected=expected, was=was)


def _kind(value: object) -> str:
    return type(value).__name__


def _dtype(dtype: np.dtype[Any]) -> str:
    order = " big-endian" if dtype.byteorder == ">" else ""
    return f"{dtype.name}{order}"

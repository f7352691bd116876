"""The manifest's contract, compiled: what a request must look like before it is sent, and an answer before it is used.

Letters: B rows, T window steps, F features, K classes. Nothing is cast, reordered, filled or cut: what does not follow
the contract is refused with the tensor, the row and the column named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tickserve.client._transport import DTYPES, Array, InferResponse, Tensor
from tickserve.errors import ArtifactError, DigestMismatchError, InputRejectedError, ProtocolError
from tickserve.manifest import Manifest, TensorSpec

Mask = npt.NDArray[np.bool_]
Inputs = Mapping[str, npt.NDArray[Any]] | npt.NDArray[Any]

PROBABILITIES, SCORE, BUNDLE_ID = "probabilities", "score", "bundle_id"
MAX_FLAGS = 64


class _Input(NamedTuple):
    name: str
    datatype: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    ranged: bool  # whether its last axis is the feature columns


class Checked(NamedTuple):
    """Inputs that passed: tensors for the wire, B, and the flags that go into the signal."""

    tensors: tuple[Tensor, ...]
    batch: int
    flags: tuple[str, ...]


class Answer(NamedTuple):
    """Outputs that passed: float32 [B, K], float32 [B], and each row's most probable class (the first of equals)."""

    probabilities: npt.NDArray[np.float32]
    score: npt.NDArray[np.float32]
    decision: tuple[str, ...]


class Contract:
    """One model's contract. Raises ArtifactError when the manifest contradicts itself."""

    def __init__(self, manifest: Manifest) -> None:
        self.name, self.classes = manifest.name, manifest.classes
        self.bundle_digest, self.bundle_id = manifest.digest(), manifest.bundle_id()
        self._bundle_bytes = self.bundle_id.to_bytes(8, "little", signed=True)
        self.feature_digest, self.columns = manifest.features.digest, manifest.features.columns
        self.max_batch = None if manifest.export is None else manifest.export.max_batch
        self._rejects_nan = manifest.nan_policy == "reject"
        _check_consistent(manifest, self.bundle_digest)
        self._minimum = np.array(manifest.features.minimum, np.float32)
        self._maximum = np.array(manifest.features.maximum, np.float32)
        self._inputs = tuple(_rule(spec, len(self.columns)) for spec in manifest.inputs)
        self._outputs = {spec.name: (DTYPES[spec.dtype], spec.shape) for spec in manifest.outputs}

    def check_inputs(self, inputs: Inputs) -> Checked:
        """Hold `inputs` ([B, F] or [B, T, F], one array or by tensor name) against the contract.

        Raises InputRejectedError. Values outside the training range are flagged, not refused.
        """
        rules = self._inputs
        if isinstance(inputs, Mapping):
            _check_names(inputs, rules)
            arrays = [inputs[rule.name] for rule in rules]
        elif len(rules) == 1:
            arrays = [inputs]
        else:
            raise InputRejectedError("this model takes several tensors", expected=_names(rules), was="one array")
        tensors: list[Tensor] = []
        flags: tuple[str, ...] = ()
        for rule, value in zip(rules, arrays, strict=True):
            array = self._check_array(rule, value)
            if rule.ranged:
                flags += self._check_values(rule.name, array)
            # tobytes gives C order whatever the strides are, and a snapshot the caller can no longer change.
            tensors.append(Tensor(rule.name, rule.datatype, array.shape, array.tobytes()))
        return Checked(tuple(tensors), self._check_batch(tensors), flags)

    def check_features(self, columns: Sequence[str] | None, digest: str | None) -> None:
        """Refuse features of another spec or in another order than the model was trained on."""
        if digest is not None and digest != self.feature_digest:
            raise InputRejectedError(
                "the features are not the model's",
                field="feature_digest",
                expected=self.feature_digest,
                was=repr(digest)[:100],
            )
        if columns is not None and tuple(columns) != self.columns:
            _refuse_columns(tuple(columns), self.columns)

    def check_response(self, response: InferResponse, batch: int, version: int | None, request_id: str) -> Answer:
        """Refuse an answer of another model, version, request, shape or bundle, and one that is not finite."""
        _check_echo("model", self.name, response.model)
        _check_echo("request id", request_id, response.request_id)
        if version is not None:
            _check_echo("version", str(version), str(response.version))
        outputs = response.outputs
        if outputs.keys() != self._outputs.keys():
            raise ProtocolError("wrong outputs", expected=", ".join(self._outputs), was=", ".join(outputs)[:200])
        for name, (dtype, shape) in self._outputs.items():
            array = outputs[name]
            if array.shape != (batch, *shape) or array.dtype != dtype:
                _refuse_output(name, array, dtype, (batch, *shape))
        if outputs[BUNDLE_ID].tobytes() != self._bundle_bytes * batch:
            raise ProtocolError(
                "another model than the pinned one answered",
                field=BUNDLE_ID,
                expected=str(self.bundle_id),
                was=str(outputs[BUNDLE_ID].flat[0]),
            )
        probabilities, score = _finite(PROBABILITIES, outputs), _finite(SCORE, outputs)
        classes = self.classes
        decision = tuple([classes[index] for index in probabilities.argmax(axis=1).tolist()])
        return Answer(probabilities, score.reshape(batch), decision)

    def _check_array(self, rule: _Input, value: object) -> npt.NDArray[Any]:
        if type(value) is not np.ndarray:
            if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
                raise InputRejectedError("not an array", field=rule.name, expected="numpy.ndarray", was=_kind(value))
            value = np.asarray(value)
        if value.dtype != rule.dtype:
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

    def _refuse_shape(self, rule: _Input, shape: tuple[int, ...]) -> None:
        missing_axis = shape == rule.shape
        raise InputRejectedError(
            "wrong shape",
            field=rule.name,
            expected="[" + ", ".join(["B", *map(str, rule.shape)]) + "]",
            was=str(list(shape)),
            hint="for one row give the batch axis too: array[np.newaxis]" if missing_axis else None,
        )

    def _check_batch(self, tensors: list[Tensor]) -> int:
        batch = tensors[0].shape[0]
        if batch < 1 or (self.max_batch is not None and batch > self.max_batch):
            limit = f"1 to {self.max_batch} rows" if self.max_batch is not None else "1 row or more"
            raise InputRejectedError("wrong batch size", field=tensors[0].name, expected=limit, was=str(batch))
        for tensor in tensors:
            if tensor.shape[0] != batch:
                raise InputRejectedError(
                    "tensors of one request differ in rows",
                    field=tensor.name,
                    expected=str(batch),
                    was=str(tensor.shape[0]),
                )
        return batch

    def _check_values(self, name: str, array: npt.NDArray[Any]) -> tuple[str, ...]:
        # NaN and infinity compare false, so one pass clears an ordinary request of all three questions.
        inside: Mask = (array >= self._minimum) & (array <= self._maximum)
        if b"\0" not in inside.tobytes():  # all of them, without the cost of numpy's reduction on a short array
            return ()
        unknown: Mask = np.isnan(array)
        if self._rejects_nan and unknown.any():
            self._refuse_value(name, array, unknown, "NaN is not allowed by the manifest's nan_policy 'reject'")
        infinite: Mask = np.isinf(array)
        if infinite.any():
            self._refuse_value(name, array, infinite, "not finite")
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


def _check_consistent(manifest: Manifest, digest: str) -> None:
    features, record = manifest.features, manifest.export
    if not len(features.columns) == len(features.minimum) == len(features.maximum):
        raise ArtifactError("the manifest's columns and ranges differ in number", field="features")
    for spec in (*manifest.inputs, *manifest.outputs):
        if any(size < 1 for size in spec.shape):
            raise ArtifactError(
                "a negative or zero dimension", field=spec.name, was=str(list(spec.shape)), expected="1 up"
            )
    names = {spec.name for spec in manifest.outputs}
    if not manifest.inputs or not {PROBABILITIES, SCORE, BUNDLE_ID} <= names:
        raise ArtifactError("the manifest lacks tensors a signal is made of", field="outputs")
    if record is not None and record.bundle_digest != digest:
        raise DigestMismatchError(
            "the manifest was changed after export",
            field="export.bundle_digest",
            expected=record.bundle_digest,
            was=digest,
        )


def _rule(spec: TensorSpec, features: int) -> _Input:
    ranged = spec.dtype == "FP32" and spec.shape[-1:] == (features,)
    return _Input(spec.name, spec.dtype, DTYPES[spec.dtype], spec.shape, ranged)


def _names(rules: Sequence[_Input]) -> str:
    return ", ".join(rule.name for rule in rules)


def _check_names(inputs: Mapping[str, object], rules: Sequence[_Input]) -> None:
    if len(inputs) == len(rules) and all(rule.name in inputs for rule in rules):
        return
    given = ", ".join(str(name)[:40] for name in list(inputs)[:8]) or "none"
    missing = [rule.name for rule in rules if rule.name not in inputs]
    if missing:
        raise InputRejectedError("a tensor is missing", field=missing[0], expected=_names(rules), was=given)
    extra = next(name for name in inputs if all(name != rule.name for rule in rules))
    raise InputRejectedError("the model has no such tensor", field=str(extra)[:100], expected=_names(rules), was=given)


def _refuse_columns(given: tuple[str, ...], expected: tuple[str, ...]) -> None:
    if len(given) != len(expected):
        raise InputRejectedError(
            "wrong columns", field="columns", expected=f"{len(expected)} columns", was=str(len(given))
        )
    at = next(index for index, pair in enumerate(zip(given, expected, strict=True)) if pair[0] != pair[1])
    permuted = sorted(map(str, given)) == sorted(expected)
    raise InputRejectedError(
        f"{'permuted' if permuted else 'wrong'} columns, first at position {at}",
        field="columns",
        expected=repr(expected[at]),
        was=repr(given[at])[:100],
    )


def _check_echo(what: str, expected: str, was: str) -> None:
    if expected != was:
        raise ProtocolError(f"the answer is of another {what}", field=what, expected=expected, was=repr(was)[:100])


def _refuse_output(name: str, array: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    raise ProtocolError(
        "wrong output",
        field=name,
        expected=f"{dtype.name} {list(shape)}",
        was=f"{array.dtype.name} {list(array.shape)}",
    )


def _finite(name: str, outputs: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = outputs[name]
    # The sum of squares is finite when all are: one call instead of two. It also overflows, hence the second look.
    if not math.isfinite(np.vdot(array, array)) and not np.isfinite(array).all():
        raise ProtocolError("the answer is not finite", field=name, expected="finite numbers")
    return array


def _kind(value: object) -> str:
    return type(value).__name__


def _dtype(dtype: np.dtype[Any]) -> str:
    order = " big-endian" if dtype.byteorder == ">" else ""
    return f"{dtype.name}{order}"

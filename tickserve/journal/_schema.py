"""The records of a journal and their bytes, schema version 1 (drawn in docs/journal.md). All numbers are little endian.

A record is written once and read for years: what is added goes behind what is there, under a new schema version.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from tickserve.client import Decision, Tensor
from tickserve.client._consistency import PROBABILITIES, SCORE
from tickserve.client._transport import DTYPES, Array
from tickserve.errors import CorruptFileError
from tickserve.manifest import StateContract
from tickserve.signal import Signal

SCHEMA = 1
DECISION, ACTION, GAP = 1, 2, 3
OUTCOME = "outcome"  # the action that tells how a decision turned out
FAILED = "ERROR"  # the status of a call that ended with an error and no signal
MAX_TEXT = 65_535
_HAS_EVENT, _HAS_AGE, _HAS_ASKED, _HAS_VERSION, _HAS_BUNDLE, _HAS_DECISION = (1 << bit for bit in range(6))
_FIXED = struct.Struct("<BBqqqdqqqH")  # kind, present, then the numbers of `DecisionRecord` in its order, attempts
_ACTION = struct.Struct("<Bqq")
_GAP = struct.Struct("<BqqQ")
_U8, _U16, _U32, _F64 = (struct.Struct("<" + code) for code in "BHId")
_FP32 = DTYPES["FP32"]
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class DecisionRecord:
    """One call as it was journaled: what was asked, what was answered, and when. B rows, K classes.

    - `wall_ns` (UTC, nanoseconds since 1970) and `monotonic_ns`: when the call began.
    - `version_asked`: what the request named; `version`: what the answer named. None where it was not.
    - `status`: of the signal, or `ERROR` when the call ended with an error; then `error_type` and `error` say which.
    - `tensors`: what was sent, state tensors too; empty when the input was refused. `outputs`: `probabilities` float32
      [B, K], `score` float32 [B], and the state that came back; empty when there was no number.
    - `stage_us`: microseconds of each stage that was reached, and of all together (`total`).
    """

    wall_ns: int
    monotonic_ns: int
    newest_event_ns: int | None
    event_age_us: float | None
    version_asked: int | None
    version: int | None
    bundle_id: int | None
    attempts: int
    model: str
    bundle_digest: str
    feature_digest: str
    classes: tuple[str, ...]
    request_id: str
    status: str
    reason: str
    fallback: str
    error_type: str
    error: str
    replica: str
    flags: tuple[str, ...]
    stage_us: Mapping[str, float]
    tensors: tuple[Tensor, ...]
    outputs: Mapping[str, Array]
    decision: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class ActionRecord:
    """What the engine did about the decision `request_id`, in its own words; `fields` are its own names and values."""

    wall_ns: int
    monotonic_ns: int
    request_id: str
    action: str
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class GapRecord:
    """`count` records are missing: they came from `first_ns` to `last_ns` (wall clock) and were lost for `reason`."""

    first_ns: int
    last_ns: int
    count: int
    reason: str


Record = DecisionRecord | ActionRecord | GapRecord


def encode_decision(decision: Decision) -> bytes:
    """The bytes of one decision: a `DecisionRecord` reads them back."""
    return _encode_usual(decision) or encode_any(decision)


def encode_any(decision: Decision) -> bytes:
    """The bytes of any decision, field by field."""
    signal, error = decision.signal, decision.error
    told = signal or error
    version = None if signal is None or signal.probabilities is None else signal.version
    bundle = None if signal is None else signal.bundle_id
    age = None if signal is None else signal.event_age_us
    classes = () if signal is None else signal.classes
    decided = None if signal is None else signal.decision
    numbers = (decision.newest_event_ns, age, decision.version, version, bundle, decided)
    replica, attempts = (None, 0) if told is None else (told.replica, told.attempts)
    present = sum([1 << bit for bit, number in enumerate(numbers) if number is not None])
    parts = [
        _FIXED.pack(
            DECISION,
            present,
            decision.wall_ns,
            decision.monotonic_ns,
            *[0 if number is None else number for number in numbers[:5]],
            min(attempts, MAX_TEXT),
        ),
        _identity(decision.model, decision.bundle_digest or "", decision.feature_digest or "", classes),
        _text(decision.request_id),
        _word(FAILED if signal is None else signal.status),
        _text("" if signal is None else signal.reason or ""),
        _word("" if signal is None else signal.fallback or ""),
        _word("" if error is None else type(error).__name__),
        _text("" if error is None else str(error)),
        _word(replica or ""),
    ]
    _put_texts(parts, () if signal is None else signal.flags)
    _put_stages(parts, decision.stage_us)
    _put_tensors(parts, decision.tensors)
    _put_tensors(parts, () if signal is None else _outputs(signal, decision.state))
    if decided is not None:
        parts += [_U32.pack(len(decided)), bytes([classes.index(name) for name in decided])]
    return b"".join(parts)


class _Usual(NamedTuple):
    """What is the same in every answered decision of one shape, in the order of the record."""

    identity: bytes
    told: bytes  # status to flags, and how many stages
    stages: struct.Struct
    words: list[Any]  # the names of the stages, each with a place for its microseconds
    tensors: tuple[bytes, ...]  # what comes before the bytes of each tensor
    probabilities: bytes  # what comes before the bytes of either output
    score: bytes
    rows: bytes
    place: Mapping[str, int]  # of each class


def _encode_usual(decision: Decision) -> bytes | None:
    """The same bytes of an answer with nothing to remark on, in about half of the time; None for any other decision.

    `python -m benchmarks.journal` prints both times.
    """
    wall_ns, began_ns, model, request_id, tensors, event_ns, asked, bundle_digest, digest, _, stages, signal, error = (
        decision
    )
    if signal is None or error is not None or not tensors or signal.flags or signal.state is not None:
        return None
    probabilities, score, decided, attempts = signal.probabilities, signal.score, signal.decision, signal.attempts
    if probabilities is None or score is None or decided is None or signal.reason or signal.fallback:
        return None
    if probabilities.dtype != _FP32 or score.dtype != _FP32 or attempts > MAX_TEXT:
        return None
    if len(tensors) == 1:
        name, dtype, shape, data = tensors[0]
        heads: _Heads = ((name, dtype, shape, len(data)),)
    else:
        heads = tuple([(name, dtype, shape, len(data)) for name, dtype, shape, data in tensors])
    sizes = probabilities.shape, score.shape, len(decided)
    usual = _usual_of(
        model, bundle_digest, digest, signal.classes, signal.status, signal.replica, (*stages,), heads, sizes
    )
    age_us, version, bundle, present = signal.event_age_us, signal.version, signal.bundle_id, _HAS_DECISION
    if event_ns is not None:
        present |= _HAS_EVENT
    if age_us is not None:
        present |= _HAS_AGE
    if asked is not None:
        present |= _HAS_ASKED
    if version is not None:
        present |= _HAS_VERSION
    if bundle is not None:
        present |= _HAS_BUNDLE
    numbers = event_ns or 0, age_us or 0.0, asked or 0, version or 0, bundle or 0
    spent = usual.words.copy()
    spent[1::2] = stages.values()
    parts = [
        _FIXED.pack(DECISION, present, wall_ns, began_ns, *numbers, attempts),
        usual.identity,
        _text(request_id),
        usual.told,
        usual.stages.pack(*spent),
    ]
    for place, tensor in enumerate(tensors):
        parts += (usual.tensors[place], tensor[3])
    parts += (usual.probabilities, probabilities.tobytes(), usual.score, score.tobytes(), usual.rows)
    parts.append(bytes([usual.place[name] for name in decided]))
    return b"".join(parts)


_Heads = tuple[tuple[str, str, tuple[int, ...], int], ...]


@lru_cache(maxsize=256)
def _usual_of(
    model: str,
    bundle_digest: str | None,
    feature_digest: str | None,
    classes: tuple[str, ...],
    status: str,
    replica: str | None,
    stages: tuple[str, ...],
    heads: _Heads,
    sizes: tuple[tuple[int, ...], tuple[int, ...], int],
) -> _Usual:
    told = [
        _text(status),
        *[_text("")] * 4,
        _text(replica or ""),
    ]  # between: reason, fallback, error
    _put_texts(told, ())
    told.append(_U8.pack(len(stages)))
    words = [_text(name) for name in stages]
    before = [_tensor_head(name, dtype, tuple(shape), size) for name, dtype, shape, size in heads]
    before[0] = _U8.pack(len(heads)) + before[0]
    shapes = sizes[:2]
    outputs = [
        _tensor_head(name, "FP32", shape, int(math.prod(shape)) * _FP32.itemsize)
        for name, shape in zip((PROBABILITIES, SCORE), shapes, strict=True)
    ]
    return _Usual(
        _identity(model, bundle_digest or "", feature_digest or "", classes),
        b"".join(told),
        struct.Struct("<" + "".join(f"{len(word)}sd" for word in words)),
        [each for word in words for each in (word, 0.0)],
        tuple(before),
        _U8.pack(len(outputs)) + outputs[0],
        outputs[1],
        _U32.pack(sizes[2]),
        {name: place for place, name in reversed([*enumerate(classes)])},
    )


def encode_action(record: ActionRecord) -> bytes:
    """The bytes of one action."""
    parts = [
        _ACTION.pack(ACTION, record.wall_ns, record.monotonic_ns),
        _text(record.request_id),
        _text(record.action),
    ]
    _put_texts(parts, [text for pair in record.fields.items() for text in pair])
    return b"".join(parts)


def encode_gap(record: GapRecord) -> bytes:
    """The bytes of one gap."""
    return _GAP.pack(GAP, record.first_ns, record.last_ns, record.count) + _text(record.reason)


def decode(payload: bytes) -> Record:
    """The record of `payload`. Raises CorruptFileError when the bytes are none of this schema."""
    reader = _Reader(payload)
    try:
        record: Record = _DECODERS[payload[0]](reader)
    except (struct.error, ValueError, KeyError, IndexError) as error:
        raise CorruptFileError(f"not a record of schema {SCHEMA} ({type(error).__name__})", field="record") from error
    if reader.at != len(payload):
        raise CorruptFileError("bytes left over", field="record", expected=str(reader.at), was=str(len(payload)))
    return record


class _Reader:
    """Takes a payload apart from its start; what runs over the end raises ValueError."""

    def __init__(self, payload: bytes) -> None:
        self.payload, self.at = payload, 0

    def take(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > len(self.payload):
            raise ValueError("shorter than it says")
        return self.payload[start : self.at]

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self.take(layout.size))

    def text(self) -> str:
        return self.take(self.unpack(_U16)[0]).decode()

    def texts(self) -> tuple[str, ...]:
        return tuple([self.text() for _ in range(self.unpack(_U16)[0])])


def _decode_decision(reader: _Reader) -> DecisionRecord:
    _, present, wall, monotonic, event, age, asked, version, bundle, attempts = reader.unpack(_FIXED)
    model, bundle_digest, feature_digest = reader.text(), reader.text(), reader.text()
    classes = reader.texts()
    request_id, status, reason, fallback, error_type, error, replica = (reader.text() for _ in range(7))
    return DecisionRecord(
        wall_ns=wall,
        monotonic_ns=monotonic,
        newest_event_ns=event if present & _HAS_EVENT else None,
        event_age_us=age if present & _HAS_AGE else None,
        version_asked=asked if present & _HAS_ASKED else None,
        version=version if present & _HAS_VERSION else None,
        bundle_id=bundle if present & _HAS_BUNDLE else None,
        attempts=attempts,
        model=model,
        bundle_digest=bundle_digest,
        feature_digest=feature_digest,
        classes=classes,
        request_id=request_id,
        status=status,
        reason=reason,
        fallback=fallback,
        error_type=error_type,
        error=error,
        replica=replica,
        flags=reader.texts(),
        stage_us={reader.text(): reader.unpack(_F64)[0] for _ in range(reader.unpack(_U8)[0])},
        tensors=_take_tensors(reader),
        outputs={tensor.name: array_of(tensor) for tensor in _take_tensors(reader)},
        decision=_take_decision(reader, classes) if present & _HAS_DECISION else None,
    )


def _decode_action(reader: _Reader) -> ActionRecord:
    _, wall, monotonic = reader.unpack(_ACTION)
    request_id, action, fields = reader.text(), reader.text(), reader.texts()
    return ActionRecord(wall, monotonic, request_id, action, dict(zip(fields[::2], fields[1::2], strict=True)))


def _decode_gap(reader: _Reader) -> GapRecord:
    _, first, last, count = reader.unpack(_GAP)
    return GapRecord(first, last, count, reader.text())


_DECODERS: dict[int, Callable[[_Reader], Record]] = {
    DECISION: _decode_decision,
    ACTION: _decode_action,
    GAP: _decode_gap,
}


def array_of(tensor: Tensor) -> Array:
    """The read-only array of a tensor's bytes. Raises ValueError when they do not fill its shape."""
    return np.frombuffer(tensor.data, DTYPES[tensor.dtype]).reshape(tensor.shape)


def _outputs(signal: Signal, state: StateContract | None) -> Sequence[Tensor]:
    """The numbers of a signal by the names of the outputs they came from: a signal names its state by input."""
    arrays: dict[str, Array | None] = {PROBABILITIES: signal.probabilities, SCORE: signal.score}
    if signal.state is not None and state is not None:
        arrays |= {each.output: signal.state.get(each.input) for each in state.tensors}
    return [
        Tensor(name, _DTYPE_NAMES[array.dtype], array.shape, array.tobytes())
        for name, array in arrays.items()
        if array is not None
    ]


@lru_cache(maxsize=256)  # the same few models answer every call
def _identity(model: str, bundle_digest: str, feature_digest: str, classes: tuple[str, ...]) -> bytes:
    parts = [_text(model), _text(bundle_digest), _text(feature_digest)]
    _put_texts(parts, classes)
    return b"".join(parts)


def _text(text: str) -> bytes:
    # What is no Unicode (a lone surrogate in a refused name) is escaped, and what is too long is cut: neither may fail.
    data = text.encode("utf-8", "backslashreplace")
    if len(data) > MAX_TEXT:
        data = data[:MAX_TEXT].decode("utf-8", "ignore").encode()
    return _U16.pack(len(data)) + data


_word = lru_cache(maxsize=1024)(_text)  # of which there are few: statuses, stages, replicas


def _put_texts(parts: list[bytes], texts: Sequence[str]) -> None:
    parts.append(_U16.pack(len(texts)))
    parts += [_text(text) for text in texts]


def _put_stages(parts: list[bytes], stages: Mapping[str, float]) -> None:
    parts.append(_U8.pack(len(stages)))
    for name, microseconds in stages.items():
        parts += [_word(name), _F64.pack(microseconds)]


def _put_tensors(parts: list[bytes], tensors: Sequence[Tensor]) -> None:
    parts.append(_U8.pack(len(tensors)))
    for name, dtype, shape, data in tensors:
        parts += [_tensor_head(name, dtype, tuple(shape), len(data)), data]


@lru_cache(maxsize=1024)  # the same few tensors in every call
def _tensor_head(name: str, dtype: str, shape: tuple[int, ...], size: int) -> bytes:
    rank = len(shape)
    return _text(name) + _text(dtype) + struct.pack(f"<B{rank}I", rank, *shape) + _U32.pack(size)


def _take_tensors(reader: _Reader) -> tuple[Tensor, ...]:
    tensors = []
    for _ in range(reader.unpack(_U8)[0]):
        name, dtype = reader.text(), reader.text()
        shape = reader.unpack(struct.Struct(f"<{reader.unpack(_U8)[0]}I"))
        tensor = Tensor(name, dtype, shape, reader.take(reader.unpack(_U32)[0]))
        array_of(tensor)
        tensors.append(tensor)
    return tuple(tensors)


def _take_decision(reader: _Reader, classes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple([classes[index] for index in reader.take(reader.unpack(_U32)[0])])

"""Asking again: every recorded request is sent as it was, byte for byte, and its answer held against the recorded one.

Requests go one by one, each with the rows it had. How a server put them together with others is not recorded. A gate at
export refuses trees (fp32, one thread) of which a bit depends on it; a net's last digits may, within its tolerance.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tickserve.client import InferRequest, InferResponse, Transport
from tickserve.client._transport import Array
from tickserve.errors import RequestError, TransportError
from tickserve.journal._schema import DecisionRecord, Record

MAX_SHOWN = 10
BUNDLE_ID = "bundle_id"
# So many connections in a row that failed: the server is gone, and nothing more is sent.
GIVE_UP = 3


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing about one request that is not as recorded: `what` is an output, `version` or `bundle`."""

    request_id: str
    model: str
    version: int | None
    what: str
    recorded: str
    replayed: str


@dataclass(slots=True)
class Unanswered:
    """`count` requests that could not be replayed, each with this error; `message` is the first one's."""

    model: str
    version: int | None
    error: str
    message: str
    count: int = 0


@dataclass(slots=True)
class Replay:
    """What came of a replay: `replayed` is `identical` and `different` together, the answers that were compared.

    `skipped` counts what holds no number to compare, by its status; `unanswered` what was asked for again and got no
    answer, by model, version and type of the error: nothing was compared there.
    """

    replayed: int = 0
    identical: int = 0
    different: int = 0
    max_abs_difference: float = 0.0
    unanswered: dict[tuple[str, int | None, str], Unanswered] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    by_what: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)

    @property
    def not_replayed(self) -> int:
        """How many requests got no answer."""
        return sum(one.count for one in self.unanswered.values())

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return {
            "replayed": self.replayed,
            "identical": self.identical,
            "different": self.different,
            "not_replayed": self.not_replayed,
            "unanswered": [
                {name: getattr(one, name) for name in Unanswered.__slots__} for one in self.unanswered.values()
            ],
            "max_abs_difference": self.max_abs_difference,
            "skipped": dict(self.skipped),
            "by_what": dict(self.by_what),
            "models": dict(self.models),
            "differences": [{name: getattr(one, name) for name in Difference.__slots__} for one in self.differences],
        }


def replay(
    records: Iterable[Record],
    transport: Transport,
    *,
    deadline_ms: float = 1_000,
    tolerance: float = 0.0,
    shown: int = MAX_SHOWN,
) -> Replay:
    """Send what was recorded through `transport` and compare, bit for bit unless a `tolerance` is given.

    The recorded version is asked for. A request that the server refuses or does not answer is counted apart, with its
    reason; after `GIVE_UP` failed connections in a row the rest counts as theirs, unasked. Keeps the first `shown`
    differences, and counts all.
    """
    result, gone = Replay(), list[TransportError]()
    for record in records:
        if not isinstance(record, DecisionRecord):
            continue
        reason = _no_number(record)
        if reason is not None:
            result.skipped[reason] += 1
            continue
        answer = gone[-1] if len(gone) >= GIVE_UP else _ask(record, transport, deadline_ms)
        gone = [*gone[: GIVE_UP - 1], answer] if isinstance(answer, TransportError) else []
        if isinstance(answer, RequestError):
            _count(record, answer, result)
            continue
        found = _compare(record, answer, tolerance, result)
        result.replayed += 1
        result.models[f"{record.model} {record.version}"] += 1
        result.identical += not found
        result.different += bool(found)
        result.by_what.update(one.what for one in found)
        result.differences += found[: max(0, shown - len(result.differences))]
    return result


def _no_number(record: DecisionRecord) -> str | None:
    """Why there is nothing to ask again: no answer of a model's, or one that was held from an earlier call."""
    if not record.tensors:
        return f"{record.status} {record.error_type}".strip() + ", nothing was sent"
    if record.status == "OK" or (record.fallback == "local" and record.outputs):
        return None
    return f"{record.status} {record.fallback or record.error_type}".strip()


def _ask(record: DecisionRecord, transport: Transport, deadline_ms: float) -> InferResponse | RequestError:
    version = record.version if record.version is not None else record.version_asked
    request = InferRequest(record.model, version, record.request_id, int(deadline_ms * 1e3), record.tensors)
    try:
        return transport.infer(request, time.monotonic_ns() + int(deadline_ms * 1e6))
    except RequestError as error:
        return error


def _count(record: DecisionRecord, error: RequestError, result: Replay) -> None:
    key = (record.model, record.version, type(error).__name__)
    result.unanswered.setdefault(key, Unanswered(*key, str(error))).count += 1


def _compare(record: DecisionRecord, answer: InferResponse, tolerance: float, result: Replay) -> list[Difference]:
    def differs(what: str, recorded: object, replayed: object) -> Difference:
        return Difference(record.request_id, record.model, record.version, what, str(recorded), str(replayed))

    found = []
    if answer.version != record.version:
        found.append(differs("version", record.version, answer.version))
    bundles = {int(one) for one in answer.outputs.get(BUNDLE_ID, np.zeros(0, np.int64)).flat}
    if bundles != {record.bundle_id}:
        found.append(differs("bundle", record.bundle_id, ", ".join(map(str, sorted(bundles))) or "none"))
    for name, recorded in record.outputs.items():
        replayed = _same_shape(name, recorded, answer.outputs)
        if replayed is None:
            was = answer.outputs.get(name)
            found.append(differs(name, list(recorded.shape), "none" if was is None else list(was.shape)))
        elif recorded.tobytes() != replayed.tobytes():
            gap = np.abs(recorded.astype(np.float64) - replayed.astype(np.float64))
            result.max_abs_difference = max(result.max_abs_difference, float(np.nanmax(gap, initial=0.0)))
            if not bool((gap <= tolerance).all()) or tolerance == 0:
                row = int(np.argmax((recorded != replayed).reshape(len(recorded), -1).any(axis=1)))
                found.append(differs(f"{name} row {row}", _shown(recorded[row]), _shown(replayed[row])))
    return found


def _same_shape(name: str, recorded: Array, outputs: Mapping[str, Array]) -> Array | None:
    """The answer's output, shaped as a signal holds it: `score` without its last axis."""
    array = outputs.get(name)
    if array is None or array.dtype != recorded.dtype or array.size != recorded.size:
        return None
    return array.reshape(recorded.shape)


def _shown(values: Array) -> str:
    """Numbers with every digit that tells them from their neighbours."""
    numbers = [repr(float(value)) for value in np.atleast_1d(values).ravel()[:8]]
    return ", ".join(numbers)

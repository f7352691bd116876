"""What an engine is given instead of an error, by name and always labelled.

`"flat"` no position, `Hold` the model's last answer while it is young, `Local` the same artifact in this process, and
`"signal"` a status without a number. Bad input never gets a number: a feed that sends nonsense is no reason to guess.
Letters: B rows, K classes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from time import monotonic_ns
from typing import Literal, NamedTuple, Protocol

import numpy as np

from tickserve.client._arguments import positive_ms, shown
from tickserve.client._call import NS_PER_US, Call
from tickserve.client._check import Answer
from tickserve.client._local import LocalModel, trusted_keys
from tickserve.client._manifests import Pinned
from tickserve.client._risk import without_risk
from tickserve.client._transport import InferResponse
from tickserve.client._usual import Checked
from tickserve.errors import (
    DeadlineExceededError,
    DigestMismatchError,
    InputRejectedError,
    RequestError,
    UsageError,
)
from tickserve.manifest import MANIFEST_NAME, load_manifest
from tickserve.signal import Signal, Status

NS_PER_MS = 1_000_000
_EXPECTED = "'flat', 'signal', Hold(ttl_ms=...), Local(path) or None"


FallbackName = Literal["flat", "signal"]


class FallbackPolicy(Protocol):
    """Stands in for the model when a call fails."""

    def answer(self, call: Call, pinned: Pinned, checked: Checked | None, error: RequestError) -> Signal | None:
        """A signal in place of `error`, labelled for what it is; None: then the error is raised.

        `checked` are the inputs that passed, None for a call that came to no such thing.
        """
        ...

    def remember(self, signal: Signal) -> None:
        """An OK signal passed by. It must return in microseconds and never raise."""
        ...


def status_of(error: RequestError) -> Status:
    """What a failed call's signal is called when nothing stands in for the model."""
    if isinstance(error, DeadlineExceededError):
        return "DEADLINE"
    return "REJECTED_INPUT" if isinstance(error, InputRejectedError) else "UNAVAILABLE"


def without_number(call: Call, pinned: Pinned, checked: Checked | None, error: RequestError, more: str = "") -> Signal:
    """The signal of a failed call: its status and its reason, and no number."""
    flags = () if checked is None else checked.flags
    return call.signal(status_of(error), pinned, flags, None, pinned.version, reason=_reason(error) + more)


def _reason(error: RequestError) -> str:
    return f"{type(error).__name__}: {error}"


def choose_fallback(wanted: object) -> FallbackPolicy | None:
    """The policy that a client's argument names. Raises UsageError."""
    if wanted is None:
        return None
    if isinstance(wanted, str) and wanted in ("flat", "signal"):
        return Flat() if wanted == "flat" else NoNumber()
    methods = [getattr(wanted, name, None) for name in ("answer", "remember")]
    if not isinstance(wanted, type) and all(callable(method) for method in methods):
        return wanted  # type: ignore[return-value]
    raise UsageError("unknown fallback", field="fallback", expected=_EXPECTED, was=shown(wanted))


class NoNumber:
    """A signal that says what went wrong, where others raise."""

    def answer(self, call: Call, pinned: Pinned, checked: Checked | None, error: RequestError) -> Signal | None:
        """A signal without a number."""
        return without_number(call, pinned, checked, error)

    def remember(self, signal: Signal) -> None:
        """Nothing is kept."""


def flat(call: Call, pinned: Pinned, checked: Checked, reason: str) -> Signal:
    """No position for each row: score 0, class `flat` with probability 1."""
    classes, rows = pinned.contract.classes, checked.batch
    probabilities = np.zeros((rows, len(classes)), np.float32)
    probabilities[:, classes.index("flat")] = 1.0
    score = np.zeros(rows, np.float32)
    for array in (probabilities, score):
        array.setflags(write=False)
    answer = Answer(probabilities, score, ("flat",) * rows)
    return call.signal("FALLBACK", pinned, checked.flags, answer, pinned.version, reason=reason, fallback="flat")


class Flat:
    """No position: score 0, class `flat` with probability 1."""

    def answer(self, call: Call, pinned: Pinned, checked: Checked | None, error: RequestError) -> Signal | None:
        """Flat for each row; for refused input a signal without a number."""
        if checked is None or isinstance(error, InputRejectedError):
            return without_number(call, pinned, checked, error)
        return flat(call, pinned, checked, _reason(error))

    def remember(self, signal: Signal) -> None:
        """Nothing is kept."""


class _Held(NamedTuple):
    signal: Signal
    since_ns: int  # monotonic: a jump of the wall clock makes nothing younger


class Hold:
    """The last answer of the same model (same bundle, same number of rows) while it is at most `ttl_ms` old.

    It is kept per model, so it is for a client that scores one stream of rows: a client that scores several instruments
    on one model would be handed another instrument's number. After its time, and before the first answer, the signal
    has no number. `event_age_us` is the age of the event behind the held number, not of the call's, and the client's
    age limit is held against it. Raises UsageError.
    """

    def __init__(self, *, ttl_ms: float) -> None:
        self._ttl_ns = int(positive_ms("ttl_ms", ttl_ms, UsageError) * NS_PER_MS)
        self._held: dict[str, _Held] = {}

    def answer(self, call: Call, pinned: Pinned, checked: Checked | None, error: RequestError) -> Signal | None:
        """The held answer, or a signal without a number."""
        if checked is None or isinstance(error, InputRejectedError):
            return without_number(call, pinned, checked, error)
        held = self._held.get(pinned.contract.name)
        if held is None or held.signal.bundle_digest != pinned.contract.bundle_digest:
            return without_number(call, pinned, checked, error, "; nothing is held")
        signal, age_ns = held.signal, monotonic_ns() - held.since_ns
        if age_ns > self._ttl_ns:
            return without_number(call, pinned, checked, error, f"; what is held is {age_ns / NS_PER_MS:.0f} ms old")
        if signal.probabilities is None or signal.score is None or len(signal.score) != checked.batch:
            return without_number(call, pinned, checked, error, "; what is held is of another number of rows")
        own, call.age_us = (
            call.age_us,
            None if signal.event_age_us is None else signal.event_age_us + age_ns / NS_PER_US,
        )
        answer = Answer(signal.probabilities, signal.score, signal.decision or ())
        reason = f"{_reason(error)}; held since {age_ns / NS_PER_MS:.1f} ms"
        made = call.signal(
            "FALLBACK", pinned, without_risk(signal.flags), answer, signal.version, reason=reason, fallback="hold"
        )
        call.age_us = own
        return made

    def remember(self, signal: Signal) -> None:
        """Keep a model's last answer."""
        self._held[signal.model] = _Held(signal, monotonic_ns())


class Local:
    """The same artifact in this process, by ONNX Runtime, from a repository folder or one version's.

    What is pinned is looked up by its bundle digest among the folder's versions, verified and loaded when the client is
    opened and whenever it is pinned anew, so that the fallback is warm and never another model. Its own time comes on
    top of the deadline where that is what failed. Raises UsageError; opening the client raises DigestMismatchError when
    no version of the folder is the pinned one, and what LocalModel raises.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._folder = Path(path)
        if not self._folder.is_dir():
            expected = "a repository folder or a version's"
            raise UsageError("no such folder", field="fallback", expected=expected, was=shown(self._folder.name))
        self._models: dict[str, LocalModel] = {}

    def bind(self, pinned: Mapping[str, Pinned]) -> None:
        """Load what is pinned and not loaded yet. Raises ArtifactError and its kin."""
        for name, pin in pinned.items():
            digest = pin.contract.bundle_digest
            if digest not in self._models:
                self._models = {**self._models, digest: LocalModel(self._find(name, digest), trusted_keys())}

    def answer(self, call: Call, pinned: Pinned, checked: Checked | None, error: RequestError) -> Signal | None:
        """The artifact's own answer; without a number where it has none."""
        contract = pinned.contract
        model = self._models.get(contract.bundle_digest)
        if checked is None or isinstance(error, InputRejectedError) or model is None:
            return without_number(call, pinned, checked, error)
        try:
            outputs = model.run(checked.tensors)
            response = InferResponse(contract.name, model.version, call.request_id, outputs)
            answer = contract.check_response(response, checked.batch, pinned.version, call.request_id)
        except RequestError as problem:
            return without_number(call, pinned, checked, error, f"; in process: {problem}")
        call.grow_older()
        return call.signal(
            "FALLBACK", pinned, checked.flags, answer, model.version, reason=_reason(error), fallback="local"
        )

    def remember(self, signal: Signal) -> None:
        """Nothing is kept."""

    def _find(self, name: str, digest: str) -> Path:
        single = (self._folder / MANIFEST_NAME).is_file()
        folders = [self._folder] if single else [path.parent for path in self._folder.glob(f"{name}/*/{MANIFEST_NAME}")]
        seen = []
        for folder in folders:
            found = load_manifest(folder).digest()
            if found == digest:
                return folder
            seen.append(found)
        was = ", ".join(seen)[:200] or "no version of it"
        raise DigestMismatchError(f"not the pinned artifact of {name!r}", field="fallback", expected=digest, was=was)

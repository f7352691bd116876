"""The signal: what a trading engine receives, with the proof of which model spoke and how old its market data was.

Letters: B rows in the request, K classes (down, flat, up).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Status = Literal["OK", "STALE", "DEADLINE", "REJECTED_INPUT", "UNAVAILABLE", "FALLBACK"]
Fallback = Literal["flat", "hold", "local"]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Signal:
    """One answer of one model version.

    A signal whose `status` is not `OK` carries no number of the model's: `probabilities`, `score` and `decision` are
    then None, so that nothing stale can be traded on as if it were fresh. The one exception is asked for by name: with
    a fallback, a signal of status `FALLBACK` carries what `fallback` says, and `reason` says why. Without a fallback
    failures are not signals but typed errors (`tickserve.errors.RequestError`).

    - `probabilities` float32 [B, K], columns as `classes`; `score` float32 [B], p(up) - p(down); `decision` [B] is the
      most probable class of each row. The arrays are read-only.
    - `model`, `version`: as the server echoed them (`version` None where it was not asked).
    - `bundle_digest`, `bundle_id`, `feature_digest`: of the pinned manifest; for an `OK` signal every row of the answer
      carried this `bundle_id`.
    - `event_age_us`: age of the newest market event when the signal was made (None: the caller gave no time;
      negative: its time lies in the future of this machine's clock).
    - `stage_us`: microseconds spent in `check`, `send_wait`, `decode` and in `total`.
    - `flags`: what an engine may want to treat with care: `event_in_future`, and `out_of_range:<column>` for a column
      far outside its training range: below minimum - span or above maximum + span, where span = maximum - minimum (so
      for a column that was constant in training any other value). With `risk_actions`: `drift`, `size_factor:<factor>`,
      `drift_unknown`. A stream adds `state_reset`, `short_history` and `no_price` (docs/stream.md).
    - `state`: of a stateful model, what the stream's next step takes beside its row: float32 [B, L, H] by tensor name,
      read-only; None for other models and without an answer.
    - `reason`: one line why the status is not `OK`; `fallback`: what stands in for the model (status `FALLBACK` only).
    - `size_factor`: what an engine multiplies its size by: 1, less while monitoring asks for it (`risk_actions`), 0
      with `flat`. The model's own numbers are never altered by it.
    - `replica`: the address that answered, or was asked last; `attempts`: how many were asked (0: nothing was sent).
    """

    status: Status
    probabilities: npt.NDArray[np.float32] | None
    score: npt.NDArray[np.float32] | None
    decision: tuple[str, ...] | None
    classes: tuple[str, ...]
    model: str
    version: int | None
    bundle_digest: str
    bundle_id: int
    feature_digest: str
    request_id: str
    event_age_us: float | None
    stage_us: Mapping[str, float]
    flags: tuple[str, ...]
    reason: str | None = None
    fallback: Fallback | None = None
    replica: str | None = None
    attempts: int = 0
    state: Mapping[str, npt.NDArray[np.float32]] | None = None
    size_factor: float = 1.0

    @property
    def ok(self) -> bool:
        """Whether there is a number to act on."""
        return self.status == "OK"

    def to_json(self) -> dict[str, Any]:
        """The signal as plain JSON values, in the order of the fields."""
        return {
            "status": self.status,
            "probabilities": None if self.probabilities is None else self.probabilities.tolist(),
            "score": None if self.score is None else self.score.tolist(),
            "decision": None if self.decision is None else list(self.decision),
            "classes": list(self.classes),
            "model": self.model,
            "version": self.version,
            "bundle_digest": self.bundle_digest,
            "bundle_id": self.bundle_id,
            "feature_digest": self.feature_digest,
            "request_id": self.request_id,
            "event_age_us": self.event_age_us,
            "stage_us": dict(self.stage_us),
            "flags": list(self.flags),
            "reason": self.reason,
            "fallback": self.fallback,
            "replica": self.replica,
            "attempts": self.attempts,
            "state": None if self.state is None else {name: each.tolist() for name, each in self.state.items()},
            "size_factor": self.size_factor,
        }


class _Unfrozen:
    """A signal while its fields are set: of the same slots, so that it can become one, and not frozen."""

    __slots__ = Signal.__slots__


def make_signal(
    status: Status,
    probabilities: npt.NDArray[np.float32] | None,
    score: npt.NDArray[np.float32] | None,
    decision: tuple[str, ...] | None,
    classes: tuple[str, ...],
    model: str,
    version: int | None,
    bundle_digest: str,
    bundle_id: int,
    feature_digest: str,
    request_id: str,
    event_age_us: float | None,
    stage_us: Mapping[str, float],
    flags: tuple[str, ...],
    reason: str | None,
    fallback: Fallback | None,
    replica: str | None,
    attempts: int,
    state: Mapping[str, npt.NDArray[np.float32]] | None,
    size_factor: float = 1.0,
) -> Signal:
    """`Signal(...)` on the path of a call: the constructor of a frozen class takes 2 us, a seventh of a small call."""
    made: Any = _Unfrozen()
    made.status = status
    made.probabilities = probabilities
    made.score = score
    made.decision = decision
    made.classes = classes
    made.model = model
    made.version = version
    made.bundle_digest = bundle_digest
    made.bundle_id = bundle_id
    made.feature_digest = feature_digest
    made.request_id = request_id
    made.event_age_us = event_age_us
    made.stage_us = stage_us
    made.flags = flags
    made.reason = reason
    made.fallback = fallback
    made.replica = replica
    made.attempts = attempts
    made.state = state
    made.size_factor = size_factor
    made.__class__ = Signal
    signal: Signal = made
    return signal

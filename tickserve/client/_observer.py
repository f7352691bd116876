"""Who is told of every decision: the journal, a metric, an engine's own log.

An observer is called after the answer, on the caller's thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from tickserve.client._transport import Tensor
from tickserve.errors import RequestError
from tickserve.manifest import StateContract
from tickserve.signal import Signal


class Decision(NamedTuple):
    """One call as it ended: with a signal, or with the error that was raised. Nothing in it is copied or mutable.

    `wall_ns` is when the call began (UTC, nanoseconds since 1970), `monotonic_ns` the same on the clock that never
    jumps; `tensors` are what was sent, empty when the input was refused; `newest_event_ns` as the caller gave it.
    `version` is what was asked for; the digests and `state` (of a stateful model) are of the pinned manifest (None: no
    manifest is pinned). `stage_us` are the microseconds of the stages that were reached, and `total`.
    """

    wall_ns: int
    monotonic_ns: int
    model: str
    request_id: str
    tensors: tuple[Tensor, ...]
    newest_event_ns: int | None
    version: int | None
    bundle_digest: str | None
    feature_digest: str | None
    state: StateContract | None
    stage_us: Mapping[str, float]
    signal: Signal | None
    error: RequestError | None


class Observer(Protocol):
    """Told of each decision. It must return in microseconds, take no lock it may wait on, and never raise."""

    def decided(self, decision: Decision) -> None:
        """One call has ended."""
        ...

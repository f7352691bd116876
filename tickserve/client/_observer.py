"""Who is told of every decision: the journal, a metric, an engine's own log; one of them, or several in order.

An observer is called after the answer, on the caller's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from tickserve.client._arguments import shown
from tickserve.client._transport import Tensor
from tickserve.errors import RequestError, UsageError
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


StageWatch = Callable[[str, str, float], None]


class Observers:
    """Several observers as one, told in order. One that raises keeps the others from nothing, and is counted."""

    def __init__(self, *observers: Observer) -> None:
        self._each = tuple(observer.decided for observer in observers)
        self.observe_stage = stage_watch(observers)

    def decided(self, decision: Decision) -> None:
        """Tell all of them; what the first of those that failed raised is raised after that."""
        failed: Exception | None = None
        for tell in self._each:
            try:
                tell(decision)
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed


def choose_observer(given: Observer | Sequence[Observer] | None) -> Observer | None:
    """What a client's argument names, as one observer. Raises UsageError."""
    several = tuple(given) if isinstance(given, tuple | list) else () if given is None else (given,)
    for observer in several:
        if isinstance(observer, type) or not callable(getattr(observer, "decided", None)):
            expected = "an observer, or a tuple of them"
            raise UsageError("cannot be told of decisions", field="observer", expected=expected, was=shown(observer))
    return several[0] if len(several) == 1 else Observers(*several) if several else None


def stage_watch(given: Observer | Sequence[Observer] | None) -> StageWatch | None:
    """`observe_stage(model, stage, seconds)` of the first of the observers that has it; None where none has."""
    several = given if isinstance(given, tuple | list) else (given,)
    watches = (getattr(observer, "observe_stage", None) for observer in several)
    return next((watch for watch in watches if callable(watch)), None)

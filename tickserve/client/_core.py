"""All of a scoring call but its transport: what is checked before it is sent, and what is made of the answer.

The synchronous and the asyncio client share it: `begin`, then their own way over the wire, then `finish` or `failed`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Protocol

from tickserve.client._arguments import (
    MAX_REQUEST_ID,
    check_lane,
    check_request_id,
    positive_ms,
    shown,
    whole_number,
    yes_or_no,
)
from tickserve.client._call import NS_PER_US, Call, RequestIds
from tickserve.client._check import Inputs
from tickserve.client._fallback import FallbackName, FallbackPolicy, choose_fallback, flat
from tickserve.client._follow import Follower
from tickserve.client._manifests import Manifests, Pinned, pin
from tickserve.client._observer import Decision, Observer, choose_observer, stage_watch
from tickserve.client._ready import Servers
from tickserve.client._risk import RiskActions, choose_risk
from tickserve.client._statistics import Statistics
from tickserve.client._transport import InferRequest, InferResponse, Tensor, named
from tickserve.client._usual import Checked
from tickserve.errors import (
    DeadlineExceededError,
    InputRejectedError,
    ModelNotFoundError,
    RequestError,
    UsageError,
)
from tickserve.manifest import Manifest, check_model_name
from tickserve.signal import Signal

MOST_PATIENCE_MS = 250.0


class Idle(Protocol):
    """Told of each call as it begins."""

    def called(self, model: str, now_ns: int) -> None:
        """The engine calls `model`. It must return in less than a microsecond."""
        ...

    def close(self) -> None:
        """No call follows; idempotent."""
        ...


# What a call has come to before it is sent; without a request its signal is known already.
Prepared = tuple[Pinned, Checked, InferRequest | None]


class Core:
    """The contract of one client: pinned manifests, deadline, age limit, fallback, observer. Safe for threads."""

    def __init__(
        self,
        manifest: Manifests | None,
        *,
        deadline_ms: float,
        max_age_ms: float | None,
        fallback: FallbackName | FallbackPolicy | None,
        observer: Observer | Sequence[Observer] | None,
        replica: str | None = None,
        risk_actions: str | os.PathLike[str] | RiskActions | None = None,
        require_features: bool = False,
    ) -> None:
        self._deadline_ms = positive_ms("deadline_ms", deadline_ms, UsageError)
        self._budget = _budget(self._deadline_ms)
        self._max_age_us = None if max_age_ms is None else 1e3 * positive_ms("max_age_ms", max_age_ms, UsageError)
        self._pinned = pin(manifest)
        self._ids = RequestIds()
        self._replica = replica
        self._fallback, self._observer = choose_fallback(fallback), choose_observer(observer)
        self.observe_stage = stage_watch(observer)
        self._bind_fallback(self._pinned)
        self.statistics = Statistics()
        self.follower: Follower | None = None
        self.idle: Idle | None = None
        self._risk = choose_risk(risk_actions)
        self._require_features = yes_or_no("require_features", require_features)
        self.closed = False

    @property
    def manifests(self) -> dict[str, Manifest]:
        """The pinned manifest of each model."""
        return {name: pinned.contract.manifest for name, pinned in self._pinned.items()}

    def close(self) -> None:
        """No call begins after this; idempotent."""
        self.closed = True
        if self.idle is not None:
            self.idle.close()
        if self._risk is not None:
            self._risk.close()

    def repin(self, manifest: Manifests) -> None:
        """Replace the pins of the models `manifest` names, at once for every call that begins after this."""
        pinned = pin(manifest)
        self._bind_fallback(pinned)
        self._pinned = {**self._pinned, **pinned}

    def follow(self, manifest: Manifests | None, follow_ms: float, servers: Servers | None) -> None:
        """Keep the pins of the repository folder `manifest` at its versions in force, once `servers` have them.

        Raises UsageError.
        """
        self.follower = Follower(
            manifest,
            self.repin,
            list(self._pinned),
            positive_ms("follow_ms", follow_ms, UsageError),
            servers=servers,
            pinned=lambda model: self._pinned[model].version,
            patience_s=min(MOST_PATIENCE_MS, self._deadline_ms / 2) / 1e3,
        )

    def _bind_fallback(self, pinned: dict[str, Pinned]) -> None:
        bind = getattr(self._fallback, "bind", None)  # only who keeps artifacts has it
        if bind is not None:
            bind(pinned)

    def open_call(self, request_id: str | None) -> Call:
        """A call that begins now. Raises UsageError when the client is closed."""
        started = time.monotonic_ns()
        if self.closed:
            raise _closed()
        if self.follower is not None:
            self.follower.look()
        # An observer alone is told when the call began on the clock of the wall.
        wall_ns = 0 if self._observer is None else time.time_ns()
        return Call(started, self._ids.next() if request_id is None else request_id, wall_ns)

    def begin(
        self,
        call: Call,
        model: str,
        inputs: Inputs,
        request_id: str | None,
        version: int | None,
        deadline_ms: float | None,
        newest_event_ns: int | None,
        feature_digest: str | None,
        columns: Sequence[str] | None,
        priority: int | None,
    ) -> Prepared:
        """Check everything that can be checked before sending. Raises RequestError and UsageError."""
        if request_id is not None:
            check_request_id(request_id)
        budget = self._budget
        if deadline_ms is not None:
            budget = _budget(positive_ms("deadline_ms", deadline_ms, InputRejectedError))
        budget_ns, timeout_us = budget
        call.deadline_ns = deadline_ns = call.started + budget_ns
        lane = None if priority is None else check_lane(priority)
        pinned = self._pin_of(model, version)
        contract, asked = pinned
        if self.idle is not None:
            self.idle.called(contract.name, call.started)
        if self._risk is not None:
            call.risk = self._risk.of(contract.name, call.started)
        if columns is not None or feature_digest is not None:
            contract.check_features(columns, feature_digest)
        elif self._require_features:
            raise InputRejectedError(
                "this client requires proof of the features",
                field="feature_digest",
                expected="feature_digest= or columns= of each call",
                was="neither",
            )
        call.checked = checked = contract.check_inputs(inputs)
        if newest_event_ns is not None or self._max_age_us is not None:
            call.newest_event_ns, call.age_us = newest_event_ns, self._age_us(newest_event_ns)
            if self._too_old(call.age_us):
                return pinned, checked, None
        call.checked_ns = now = time.monotonic_ns()
        if call.risk is not None and call.risk.action == "flat":
            return pinned, checked, None
        if now >= deadline_ns:
            raise DeadlineExceededError("the deadline passed before the request was sent")
        # As a NamedTuple's own constructor makes it, in half the time.
        fields = (contract.name, asked, call.request_id, timeout_us, checked.tensors, lane)
        return pinned, checked, named(InferRequest, fields)

    def finish(self, call: Call, prepared: Prepared, response: InferResponse | None) -> Signal:
        """The signal of an answer (None: nothing was sent). Raises ProtocolError and DeadlineExceededError."""
        pinned, checked, _ = prepared
        if response is None:
            return self._observed(call, prepared, _unsent(call, pinned, checked))
        contract, asked = pinned
        _, version, _, _, replica, call.attempts, _ = response
        call.replica = replica or self._replica
        call.received_ns = time.monotonic_ns()
        answer = contract.check_response(response, checked.batch, asked, call.request_id)
        call.decoded_ns = ended = time.monotonic_ns()
        if ended > call.deadline_ns:
            raise DeadlineExceededError("the answer came after the deadline")
        if call.age_us is not None:
            call.age_us += (ended - call.checked_ns) / NS_PER_US
            if self._too_old(call.age_us):
                return self._observed(call, prepared, call.stale(pinned, checked))
        signal = call.signal("OK", pinned, checked.flags, answer, version)
        if self._fallback is not None:
            self._fallback.remember(signal)
        return self._observed(call, prepared, signal)

    def failed(self, call: Call, model: str, prepared: Prepared | None, error: RequestError) -> Signal:
        """The fallback's signal for a call that failed with `error`; without one, `error` is raised."""
        identity = call.request_id
        error.model = model[:100] if isinstance(model, str) else shown(model)
        error.request_id = identity[:MAX_REQUEST_ID] if isinstance(identity, str) else shown(identity)
        self.statistics.failure(error)
        if prepared is not None:
            error.replica, error.attempts = error.replica or call.replica, error.attempts or call.attempts
        call.replica, call.attempts = error.replica, error.attempts
        pinned = self._pinned.get(model) if isinstance(model, str) else None
        if prepared is not None:
            pinned = prepared[0]
        signal = None
        call.grow_older()
        if self._fallback is not None and pinned is not None:
            signal = self._stand_in(self._fallback, call, pinned, error)
            if signal is not None:
                self.statistics.signal(signal.status)
        if self._observer is not None:
            tensors = () if prepared is None else prepared[1].tensors
            self._tell(self._observer, _decision(call, error.model, pinned, tensors, signal, error))
        if signal is None:
            raise error
        return signal

    def _stand_in(self, fallback: FallbackPolicy, call: Call, pinned: Pinned, error: RequestError) -> Signal | None:
        """What `fallback` says; without a number where that is the model's and of an event that is too old by now."""
        signal = fallback.answer(call, pinned, call.checked, error)
        if signal is None or signal.fallback in (None, "flat") or not self._too_old(signal.event_age_us):
            return signal
        checked = call.checked
        assert checked is not None  # noqa: S101 - refused input gets no number
        return call.stale(pinned, checked, f"; {type(error).__name__}: {error}")

    def to_rehearse(self, model: str | None) -> list[str]:
        """`model`, or all that are pinned. Raises UsageError, InputRejectedError and ModelNotFoundError."""
        if self.closed:
            raise _closed()
        self.look_aside()
        if model is not None:
            return [self._pin_of(model, None).contract.name]
        if not self._pinned:
            raise _nothing_pinned()
        return list(self._pinned)

    def look_aside(self) -> None:
        """Follow the repository, where the client does, without waiting for any server."""
        if self.follower is not None:
            self.follower.look_aside()

    def rehearse(self, model: str) -> tuple[Pinned, InferRequest]:
        """A request for one row of zeros, as the engine would send it, which is no call of the engine's.

        Raises RequestError.
        """
        pinned = self._pin_of(model, None)
        contract, asked = pinned
        checked = contract.check_inputs(contract.zeros())
        fields = (contract.name, asked, self._ids.next(), self._budget[1], checked.tensors, None)
        return pinned, named(InferRequest, fields)

    def rehearsed(self, pinned: Pinned, request: InferRequest, response: InferResponse) -> None:
        """Hold the answer to a request of `rehearse` against the manifest. Raises ProtocolError."""
        pinned.contract.check_response(response, 1, pinned.version, request.request_id)

    def _observed(self, call: Call, prepared: Prepared, signal: Signal) -> Signal:
        self.statistics.signal(signal.status)
        if self._observer is not None:
            pinned, checked, _ = prepared
            self._tell(self._observer, _decision(call, signal.model, pinned, checked.tensors, signal, None))
        return signal

    def _tell(self, observer: Observer, decision: Decision) -> None:
        try:
            observer.decided(decision)
        except Exception:  # a sink that is down must cost no decision; it shows in the statistics
            self.statistics.observer_error()

    def _pin_of(self, model: str, version: int | None) -> Pinned:
        pinned = self._pinned.get(model) if isinstance(model, str) else None
        if pinned is None:
            self._refuse_model(model)
            raise AssertionError("unreachable")
        if version is None:
            return pinned
        number = whole_number("version", version, "not a version", "a whole number from 1")
        return Pinned(pinned.contract, number)

    def _refuse_model(self, model: object) -> None:
        if not isinstance(model, str):
            raise InputRejectedError("not a name", field="model", expected="text", was=type(model).__name__)
        try:
            check_model_name(model)
        except ValueError as error:
            raise InputRejectedError(str(error), field="model") from error
        if not self._pinned:
            raise _nothing_pinned()
        raise ModelNotFoundError(
            f"no manifest is pinned for model {model!r}", field="model", expected=", ".join(sorted(self._pinned)[:8])
        )

    def _age_us(self, newest_event_ns: int | None) -> float | None:
        """Age of the newest event. An event whose time is ahead of the clock by more than the limit proves nothing."""
        limit = self._max_age_us
        if newest_event_ns is None:
            if limit is not None:
                raise InputRejectedError(
                    "needed for max_age_ms", field="newest_event_ns", expected="a time", was="None"
                )
            return None
        newest = whole_number("newest_event_ns", newest_event_ns, "not a time", "nanoseconds since 1970")
        age_us = (time.time_ns() - newest) / NS_PER_US
        if limit is not None and age_us < -limit:
            raise InputRejectedError(
                "in the future of this machine's clock",
                field="newest_event_ns",
                expected=f"at most {limit / 1e3:g} ms ahead",
                was=f"{-age_us / 1e3:.3f} ms ahead",
            )
        return age_us

    def _too_old(self, age_us: float | None) -> bool:
        return self._max_age_us is not None and age_us is not None and age_us > self._max_age_us


def _closed() -> UsageError:
    return UsageError("the client is closed", hint="open another one")


def _nothing_pinned() -> UsageError:
    return UsageError("no model is pinned", field="manifest", expected="Client(url, manifest=...)", was="none")


def _budget(milliseconds: float) -> tuple[int, int]:
    """A deadline's time in nanoseconds, and in microseconds as the server is told it."""
    return int(milliseconds * 1e6), max(1, int(milliseconds * 1e3))


def _unsent(call: Call, pinned: Pinned, checked: Checked) -> Signal:
    """The signal of a call that nothing was sent for: its event is too old, or drift asks for no position."""
    if call.risk is None or not call.checked_ns:  # too old an event is found before the check is over
        return call.stale(pinned, checked)
    return flat(call, pinned, checked, f"drift: {call.risk.reason}")


def _decision(
    call: Call,
    model: str,
    pinned: Pinned | None,
    tensors: tuple[Tensor, ...],
    signal: Signal | None,
    error: RequestError | None,
) -> Decision:
    contract = None if pinned is None else pinned.contract
    fields = (
        call.wall_ns,
        call.started,
        model,
        call.request_id if error is None else error.request_id or "",
        tensors,
        call.newest_event_ns,
        None if pinned is None else pinned.version,
        None if contract is None else contract.bundle_digest,
        None if contract is None else contract.feature_digest,
        None if contract is None else contract.manifest.state,
        call.stages(),
        signal,
        error,
    )
    return named(Decision, fields)

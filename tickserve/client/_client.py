"""The client: one call, one absolute deadline, one signal or one typed error.

It holds what it sends and what it gets against the pinned manifest, so that the number that comes out is the number of
the model the engine meant.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from types import TracebackType

from tickserve.client._arguments import MAX_REQUEST_ID, check_request_id, positive_ms, shown, whole_number
from tickserve.client._check import Answer, Checked, Inputs
from tickserve.client._fork import renew_after_fork
from tickserve.client._http import HttpTransport
from tickserve.client._manifests import Manifests, Pinned, pin
from tickserve.client._transport import InferRequest, Transport
from tickserve.client._url import TransportName, parse_endpoint
from tickserve.errors import (
    DeadlineExceededError,
    InputRejectedError,
    ModelNotFoundError,
    RequestError,
    UsageError,
)
from tickserve.manifest import check_model_name
from tickserve.signal import Signal, Status

NS_PER_US = 1_000


class Client:
    """Scores rows on the models of one Triton server.

    >>> client = Client("127.0.0.1:8000", manifest="model_repository")    # doctest: +SKIP
    >>> signal = client.score("btcusdt-l5-gbdt", rows, deadline_ms=20)    # rows: float32 [B, F]   # doctest: +SKIP

    - `url`: `host:port` or `http://host:port`; `grpc://host:port` or `transport="grpc"` for gRPC.
    - `manifest`: what the engine pins, out of band: a Manifest, a path to a manifest or a version directory, a mapping
      from model to those, or a repository folder (the newest version of each model). A path with a version asks the
      server for exactly that version.
    - `deadline_ms`: for a call that names none; it covers connecting, sending and waiting. gRPC keeps its own time: it
      gives up 2 ms (at most a fifth) early so as not to be late, and below 10 ms is late nevertheless: there use http.
    - `max_age_ms`: signals from older market events are `STALE`; `newest_event_ns` is then required.

    Safe for threads. After a fork the http transport reconnects; over gRPC the child opens a client of its own. A host
    name is looked up once; a connection that cannot be made has it looked up again.
    Raises UsageError for wrong arguments and ArtifactError for a manifest that cannot be trusted.
    """

    def __init__(
        self,
        url: str,
        *,
        manifest: Manifests | None = None,
        transport: TransportName | None = None,
        deadline_ms: float = 100,
        max_age_ms: float | None = None,
    ) -> None:
        endpoint = parse_endpoint(url, transport)
        self._deadline_ms = positive_ms("deadline_ms", deadline_ms, UsageError)
        self._max_age_us = None if max_age_ms is None else 1e3 * positive_ms("max_age_ms", max_age_ms, UsageError)
        self._pinned = pin(manifest)
        self._ids = _RequestIds()
        self._closed = False
        self._transport: Transport
        if endpoint.transport == "grpc":
            from tickserve.client._grpc import GrpcTransport  # gRPC is loaded only where it is used

            self._transport = GrpcTransport(endpoint)
        else:
            self._transport = HttpTransport(endpoint)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; idempotent. A call after this raises UsageError."""
        self._closed = True
        self._transport.close()

    def score(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: int | None = None,
        deadline_ms: float | None = None,
        request_id: str | None = None,
        newest_event_ns: int | None = None,
        feature_digest: str | None = None,
        columns: Sequence[str] | None = None,
    ) -> Signal:
        """Score `inputs`: float32 [B, F] (windows: [B, T, F]), or a mapping from tensor name to array.

        `newest_event_ns` is the time of the newest market event behind the features (UTC, nanoseconds since 1970).
        `feature_digest` and `columns` prove that the features are the model's and in its order.

        Raises InputRejectedError (refused before it was sent), DeadlineExceededError, ModelNotFoundError,
        ServerRejectedError, TransportError, ProtocolError (the answer is not the pinned model's), all of them
        RequestError with `model` and `request_id`; and UsageError for a closed client or one that pins no model.
        """
        started = time.monotonic_ns()
        if self._closed:
            raise UsageError("the client is closed", hint="open another one")
        identity = self._ids.next() if request_id is None else request_id
        try:
            if request_id is not None:
                check_request_id(request_id)
            budget_ms = self._deadline_ms
            if deadline_ms is not None:
                budget_ms = positive_ms("deadline_ms", deadline_ms, InputRejectedError)
            pinned = self._pin_of(model, version)
            pinned.contract.check_features(columns, feature_digest)
            checked = pinned.contract.check_inputs(inputs)
            age_us = self._age_us(newest_event_ns)
            call = _Call(started, budget_ms, identity, age_us)
            return self._ask(call, pinned, checked)
        except RequestError as error:
            error.model = model[:100] if isinstance(model, str) else shown(model)
            error.request_id = identity[:MAX_REQUEST_ID] if isinstance(identity, str) else shown(identity)
            raise

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
            raise UsageError("no model is pinned", field="manifest", expected="Client(url, manifest=...)", was="none")
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

    def _ask(self, call: _Call, pinned: Pinned, checked: Checked) -> Signal:
        if self._too_old(call.age_us):
            return call.stale(pinned, checked)
        contract, version = pinned
        request = InferRequest(contract.name, version, call.request_id, call.timeout_us, checked.tensors)
        sent = call.reached("check")
        if sent >= call.deadline_ns:
            raise DeadlineExceededError("the deadline passed before the request was sent")
        response = self._transport.infer(request, call.deadline_ns)
        call.reached("send_wait")
        answer = contract.check_response(response, checked.batch, version, call.request_id)
        ended = call.reached("decode")
        if ended > call.deadline_ns:
            raise DeadlineExceededError("the answer came after the deadline")
        if call.age_us is not None:
            call.age_us += (ended - sent) / NS_PER_US
            if self._too_old(call.age_us):
                return call.stale(pinned, checked)
        return call.signal("OK", pinned, checked, answer, response.version)

    def _too_old(self, age_us: float | None) -> bool:
        return self._max_age_us is not None and age_us is not None and age_us > self._max_age_us


class _Call:
    """What one call knows: its deadline, its id, how old its event is, and how long each stage took."""

    __slots__ = ("_last", "age_us", "deadline_ns", "request_id", "stages", "started", "timeout_us")

    def __init__(self, started: int, budget_ms: float, request_id: str, age_us: float | None) -> None:
        self.started, self.request_id, self.age_us = started, request_id, age_us
        self.deadline_ns = started + int(budget_ms * 1e6)
        self.timeout_us = max(1, int(budget_ms * 1e3))
        self.stages: dict[str, float] = {}
        self._last = started

    def reached(self, stage: str) -> int:
        """The end of `stage`: its time is kept, and now is returned."""
        now = time.monotonic_ns()
        self.stages[stage] = (now - self._last) / NS_PER_US
        self._last = now
        return now

    def stale(self, pinned: Pinned, checked: Checked) -> Signal:
        return self.signal("STALE", pinned, checked, None, pinned.version)

    def signal(
        self, status: Status, pinned: Pinned, checked: Checked, answer: Answer | None, version: int | None
    ) -> Signal:
        contract = pinned.contract
        self.stages["total"] = (time.monotonic_ns() - self.started) / NS_PER_US
        ahead = self.age_us is not None and self.age_us < 0
        return Signal(
            status=status,
            probabilities=None if answer is None else answer.probabilities,
            score=None if answer is None else answer.score,
            decision=None if answer is None else answer.decision,
            classes=contract.classes,
            model=contract.name,
            version=version,
            bundle_digest=contract.bundle_digest,
            bundle_id=contract.bundle_id,
            feature_digest=contract.feature_digest,
            request_id=self.request_id,
            event_age_us=self.age_us,
            stage_us=self.stages,
            flags=(*checked.flags, "event_in_future") if ahead else checked.flags,
        )


class _RequestIds:
    """Ids that are unique across clients and processes: eight random hex digits, then a counter."""

    __slots__ = ("__weakref__", "_count", "_prefix")

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """A forked child must not repeat its parent's ids."""
        self._prefix, self._count = os.urandom(4).hex(), itertools.count()

    def next(self) -> str:
        return f"{self._prefix}{next(self._count):08x}"

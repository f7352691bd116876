"""The client: one call, one absolute deadline, one signal or one typed error.

It holds what it sends and what it gets against the pinned manifest, so that the number that comes out is the number of
the model the engine meant.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from tickserve.client._check import Inputs
from tickserve.client._core import Core, Prepared
from tickserve.client._credential import Credential
from tickserve.client._fallback import FallbackName, FallbackPolicy
from tickserve.client._keep_warm import Keeper
from tickserve.client._local import local_path
from tickserve.client._manifests import Manifests
from tickserve.client._observer import Observer
from tickserve.client._open import addresses, open_servers, readiness
from tickserve.client._replicas import Guarded, Replicas
from tickserve.client._resilience import Resilience
from tickserve.client._risk import RiskActions
from tickserve.client._tls import Tls
from tickserve.client._url import TransportName
from tickserve.client._warm import Warmed, warm
from tickserve.errors import RequestError
from tickserve.manifest import Manifest
from tickserve.signal import Signal


class Client:
    """Scores rows on the models of a Triton server, or of several that serve the same.

    >>> client = Client("127.0.0.1:8000", manifest="model_repository")    # doctest: +SKIP
    >>> signal = client.score("btcusdt-l5-gbdt", rows, deadline_ms=20)    # rows: float32 [B, F]   # doctest: +SKIP

    - `url`: `host:port` or `http://host:port`; `grpc://host:port` or `transport="grpc"` for gRPC;
      several servers as a list, or with commas between them (docs/client.md says how they are used);
      `local://folder` scores a repository folder in this process, and pins it where `manifest` is not given.
    - `manifest`: what the engine pins, out of band: a Manifest, a path to a manifest or a version directory, a mapping
      from model to those, or a repository folder (the version in force of each model). A path with a version asks the
      server for exactly that version.
    - `follow_ms`: with a repository folder, notice its version in force changing (a swap, a rollback) at most so late,
      and go over to it once the servers have it loaded (docs/client.md).
    - `tls`: with `https://` or `grpcs://`, whom to trust and what to show (`Tls`); the system's authorities without it.
    - `transport="shm"` shares memory with a server on this machine: worth it from some 64 KB a request on. What
      opens its shared-memory API is found where `tickserve serve` of this user runs it (`local_credential`); elsewhere
      it is `credential=(header, value)` (docs/client.md).
    - `deadline_ms`: for a call that names none; it covers connecting, sending and waiting.
    - `max_age_ms`: signals from older market events are `STALE`; `newest_event_ns` is then required.

    - `resilience`: retries, hedges and the breaker (`Resilience`); a lone server has the breaker only.
    - `fallback`: instead of an error, a labelled signal: `"flat"`, `Hold(ttl_ms=...)`, `Local(folder)`, or `"signal"`,
      a status without a number.
    - `observer`: told of each decision; several as a tuple: `observer=(journal, metrics)`.
    - `risk_actions`: the action file of `tickserve monitor export`, or `RiskActions(path, ...)`: signals are labelled,
      their `size_factor` is lowered, or no position is taken, as it says (docs/drift.md).
    - `require_features`: a call that gives neither `feature_digest` nor `columns` is refused before it is sent.
    - `keep_warm_ms`: after so long without a call, a thread makes calls that decide nothing (docs/client.md, Warmth).

    Safe for threads. A forked child connects anew. A lone call looks for its answer for up to 0.4 ms before it sleeps.
    A host name is looked up once; a connection that cannot be made has it looked up again.
    Raises UsageError for wrong arguments and ArtifactError for a manifest that cannot be trusted.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        manifest: Manifests | None = None,
        transport: TransportName | None = None,
        deadline_ms: float = 100,
        max_age_ms: float | None = None,
        follow_ms: float | None = None,
        tls: Tls | None = None,
        credential: Credential | None = None,
        resilience: Resilience | None = None,
        fallback: FallbackName | FallbackPolicy | None = None,
        observer: Observer | Sequence[Observer] | None = None,
        risk_actions: str | os.PathLike[str] | RiskActions | None = None,
        require_features: bool = False,
        keep_warm_ms: float | None = None,
    ) -> None:
        urls = addresses(url)
        self._transport, replica = open_servers(urls, transport, resilience, tls, credential)
        try:
            self._core = Core(
                local_path(urls[0]) if manifest is None else manifest,
                deadline_ms=deadline_ms,
                max_age_ms=max_age_ms,
                fallback=fallback,
                observer=observer,
                replica=replica,
                risk_actions=risk_actions,
                require_features=require_features,
            )
            if follow_ms is not None:
                self._core.follow(manifest, follow_ms, readiness(urls, transport, tls, self._transport))
            if keep_warm_ms is not None:
                self._core.idle = Keeper(self._core, self._transport, keep_warm_ms)
        except BaseException:
            self._transport.close()
            raise
        self._infer = self._transport.infer

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def manifests(self) -> dict[str, Manifest]:
        """The pinned manifest of each model."""
        return self._core.manifests

    @property
    def observe_stage(self) -> Callable[[str, str, float], None] | None:
        """Told `(model, stage, seconds)` of an engine's own stages, where an observer counts them."""
        return self._core.observe_stage

    def repin(self, manifest: Manifests) -> None:
        """Pin other manifests for the models `manifest` names; calls that are under way end as they began."""
        self._core.repin(manifest)

    def statistics(self) -> dict[str, Any]:
        """What was counted since the client was opened, as plain values: a snapshot.

        `signals` by status, `failures` by error type, `observer_errors`; and, unless it scores in this process,
        `retries`, `hedges`, `hedges_won` and for each of the `replicas` its `breaker` (closed, open, half_open),
        `requests`, `failures` and `in_flight`.
        """
        counted = self._core.statistics.snapshot()
        if isinstance(self._transport, Guarded | Replicas):
            counted |= self._transport.statistics()
        return counted

    def close(self) -> None:
        """Close the connections; idempotent. A call after this raises UsageError."""
        self._core.close()
        self._transport.close()

    def warm(self, model: str | None = None, *, deadline_ms: float = 1_000) -> tuple[Warmed, ...]:
        """Connect to every replica and score a few rows of zeros there, on `model` or on every pinned one.

        So a session's first call is not the cold one. It is no decision: no observer, fallback, breaker or statistic
        hears of it. What was reached is in the answer, a `Warmed` for each model and replica; a server that does not
        answer is an `error` in it and nothing is raised. `deadline_ms` covers all of it; each replica may take its
        share of what is left. A version that is loaded in this process cannot be interrupted.

        Raises UsageError, InputRejectedError and ModelNotFoundError for a closed client and wrong arguments.
        """
        return warm(self._core, self._transport, model, deadline_ms)

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
        priority: int | None = None,
    ) -> Signal:
        """Score `inputs`: float32 [B, F] (windows: [B, T, F]), or a mapping from tensor name to array.

        `newest_event_ns` is the time of the newest market event behind the features (UTC, nanoseconds since 1970).
        `feature_digest` and `columns` prove that the features are the model's and in its order.
        `priority` names a lane where the served model has lanes (docs/batching.md): 1, which is also that of a request
        that names none, is scored before 2, bulk scoring. Without lanes, and in process, it changes nothing.

        Raises InputRejectedError (refused before it was sent), DeadlineExceededError, ModelNotFoundError,
        ServerRejectedError, TransportError, ProtocolError (the answer is not the pinned model's), all of them
        RequestError with `model` and `request_id`; and UsageError for a closed client or one that pins no model.
        With a `fallback`, what would be a RequestError is a signal whose status is not `OK`.
        """
        core = self._core
        call = core.open_call(request_id)
        prepared: Prepared | None = None
        try:
            prepared = core.begin(
                call,
                model,
                inputs,
                request_id,
                version,
                deadline_ms,
                newest_event_ns,
                feature_digest,
                columns,
                priority,
            )
            request = prepared[2]
            return core.finish(call, prepared, request and self._infer(request, call.deadline_ns))
        except RequestError as error:
            return core.failed(call, model, prepared, error)

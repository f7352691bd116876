"""The client for asyncio: the same call, contract, resilience, fallbacks and observers, awaited."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from tickserve.client._async_grpc import AsyncGrpcTransport
from tickserve.client._async_http import AsyncHttpTransport
from tickserve.client._async_replicas import AsyncGuarded, AsyncReplicas, AsyncTransport
from tickserve.client._async_warm import AsyncKeeper, warm
from tickserve.client._check import Inputs
from tickserve.client._core import Core, Prepared
from tickserve.client._fallback import FallbackName, FallbackPolicy
from tickserve.client._local import LocalTransport, local_path
from tickserve.client._manifests import Manifests
from tickserve.client._observer import Observer
from tickserve.client._open import addresses, check_servers, open_local, readiness
from tickserve.client._resilience import Resilience
from tickserve.client._risk import RiskActions
from tickserve.client._tls import Tls
from tickserve.client._transport import InferRequest, InferResponse
from tickserve.client._url import Endpoint, TransportName
from tickserve.client._warm import Warmed
from tickserve.errors import RequestError, UsageError
from tickserve.manifest import Manifest
from tickserve.signal import Signal


class _InLoop:
    """Scoring in this process, on the loop's own thread: it is over sooner than a thread would be reached."""

    def __init__(self, transport: LocalTransport) -> None:
        self._transport, self.close = transport, transport.close

    async def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
        """Score now. Raises RequestError."""
        return self._transport.infer(request, deadline_ns)


class AsyncClient:
    """`Client` for asyncio: the same arguments, the same contract, the same signals and errors.

    >>> async with AsyncClient("127.0.0.1:8000", manifest="model_repository") as client:    # doctest: +SKIP
    ...     signal = await client.score("btcusdt-l5-gbdt", rows, deadline_ms=20)

    Any number of tasks of one event loop may share it. A call that is cancelled parts with its own connection and
    nothing else. Close it in the event loop it was used in;
    used from another one (a second `asyncio.run`), it connects anew.
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
        resilience: Resilience | None = None,
        fallback: FallbackName | FallbackPolicy | None = None,
        observer: Observer | Sequence[Observer] | None = None,
        risk_actions: str | os.PathLike[str] | RiskActions | None = None,
        require_features: bool = False,
        keep_warm_ms: float | None = None,
    ) -> None:
        urls = addresses(url)
        self._transport, replica = _open(urls, transport, resilience, tls)
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
        self._keeper: AsyncKeeper | None = None
        if keep_warm_ms is not None:
            self._core.idle = self._keeper = AsyncKeeper(self._core, self._transport, keep_warm_ms)

    async def __aenter__(self) -> AsyncClient:
        if self._keeper is not None:
            self._keeper.start()
        return self

    async def __aexit__(
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
        """What was counted since the client was opened: see `Client.statistics`."""
        counted = self._core.statistics.snapshot()
        if isinstance(self._transport, AsyncGuarded | AsyncReplicas):
            counted |= self._transport.statistics()
        return counted

    def close(self) -> None:
        """Close the connections; idempotent. A call after this raises UsageError."""
        self._core.close()
        self._transport.close()

    async def warm(self, model: str | None = None, *, deadline_ms: float = 1_000) -> tuple[Warmed, ...]:
        """What `Client.warm` does, on all replicas at once."""
        return await warm(self._core, self._transport, model, deadline_ms)

    async def score(
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
        """Score `inputs`, as `Client.score` does; the deadline counts from when the call is first awaited."""
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
            response = None if request is None else await self._transport.infer(request, call.deadline_ns)
            return core.finish(call, prepared, response)
        except RequestError as error:
            return core.failed(call, model, prepared, error)


def _open(
    urls: Sequence[str], transport: TransportName | None, resilience: Resilience | None, tls: Tls | None
) -> tuple[_InLoop | AsyncGuarded | AsyncReplicas, str | None]:
    """The transport over all of `urls`, and the name of a lone server. Raises UsageError."""
    local = open_local(urls, transport, resilience, tls)
    if local is not None:
        return _InLoop(local), None
    endpoints = check_servers(urls, transport, resilience, tls)
    servers = [(endpoint.authority, _connected(endpoint)) for endpoint in endpoints]
    settings = Resilience() if resilience is None else resilience
    if len(servers) == 1:
        return AsyncGuarded(*servers[0], settings), servers[0][0]
    return AsyncReplicas(servers, settings), None


def _connected(endpoint: Endpoint) -> AsyncTransport:
    if endpoint.transport == "shm":
        raise UsageError("not over asyncio", field="transport", expected="'http' or 'grpc'", was="'shm'")
    if endpoint.transport == "grpc":
        return AsyncGrpcTransport(endpoint)
    return AsyncHttpTransport(endpoint)

"""The exporter: an observer that counts every decision and serves the counts to Prometheus, off the path of the call.

A call hands over references and goes on. Decisions are counted while a call waits for its answer, or by a thread of
the exporter's own, a little at a time, so that a call never waits for it longer than a fraction of a millisecond. What
does not fit the buffer is dropped and counted as lost.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tickserve.client import Decision
from tickserve.client._fork import renew_after_fork
from tickserve.client._meanwhile import AT_ONCE, BROKEN, dismiss, enlist
from tickserve.config import MetricsSettings
from tickserve.errors import MissingExtraError, UsageError
from tickserve.metrics._families import families
from tickserve.metrics._server import Endpoint
from tickserve.metrics._tally import HIGH_S, LOW_S, MAX_MODELS, OTHER, UNPINNED, ModelTally, Observation, log_buckets

if TYPE_CHECKING:
    from prometheus_client.core import Metric

# The interpreter lock is let go after so much counting, for so long: a call that comes back meanwhile finds it free.
SLICE_NS, PAUSE_S = 30_000, 0.0002
CLOSE_S = 5.0
_Staged = tuple[str, str, float]


class MetricsExporter:
    """Counts the decisions of clients and serves `/metrics`: `Client(url, manifest=..., observer=MetricsExporter())`.

    Beside a journal: `observer=(journal, metrics)`. Give one exporter to as many clients as there are; close it after
    them. `port` and `address` stand in for those of `settings`; port 0 takes a free one, and None with
    `serve=False` serves nothing: `collect()` then gives what is counted to a registry of the caller's own.

    Safe for threads. A forked child counts anew from nothing and serves nothing until it calls `serve`. Raises
    MissingExtraError without prometheus-client, PortInUseError, and UsageError for an address that cannot be bound.
    """

    def __init__(
        self,
        settings: MetricsSettings | None = None,
        *,
        port: int | None = None,
        address: str | None = None,
        serve: bool = True,
    ) -> None:
        settings = settings or MetricsSettings()
        self._limit, self._flush_s = settings.buffer_records, settings.flush_ms / 1e3
        self._port = settings.port if port is None else port
        self._address = settings.address if address is None else address
        self._bounds = log_buckets(LOW_S, HIGH_S, settings.buckets_per_decade)
        self._registry = _registry()
        self._registry.register(self)
        self._endpoint: Endpoint | None = None
        self._closed = False
        self.after_fork()
        renew_after_fork(self)
        if serve:
            self.serve()

    def after_fork(self) -> None:
        """A child starts from nothing: what its parent counted, its parent serves."""
        if self._endpoint is not None:
            self._endpoint.forget()
            self._endpoint = None
        self._queue: deque[Observation | _Staged] = deque()
        self._models: dict[str, ModelTally] = {}
        self._drops, self._drops_read, self._broken = itertools.count(), 0, 0
        self._counting = threading.Lock()
        self._starting, self._wake = threading.Lock(), threading.Event()
        self._worker: threading.Thread | None = None

    def __enter__(self) -> MetricsExporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str | None:
        """Where it is served; None where it is not."""
        return None if self._endpoint is None else self._endpoint.url

    @property
    def lost(self) -> int:
        """Observations dropped so far."""
        with self._counting:
            return self._lost()

    def serve(self, port: int | None = None, address: str | None = None) -> str:
        """Serve `/metrics`, where it is not served yet; returns its URL. Raises PortInUseError, UsageError."""
        if self._closed:
            raise UsageError("the exporter is closed", hint="open another one")
        if self._endpoint is None:
            self._address = self._address if address is None else address
            self._port = self._port if port is None else port
            self._endpoint = Endpoint(self._address, self._port, self._rendered, option="metrics.port")
        return str(self.url)

    def close(self) -> None:
        """Stop serving and counting; idempotent. What comes after is not counted."""
        if self._closed:
            return
        self._closed = True
        dismiss(self._meanwhile)
        self._wake.set()
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            endpoint.close()
        if self._worker is not None:
            self._worker.join(CLOSE_S)

    # The caller's side.

    def decided(self, decision: Decision) -> None:
        """Count `decision`, soon. Takes 1 to 3 microseconds and never raises."""
        queue = self._queue
        if len(queue) >= self._limit or self._closed:
            next(self._drops)  # a counter that two threads cannot spoil
            return
        _, _, model, _, _, _, version, digest, _, _, stages, signal, error = decision
        told = error or signal
        kind = None if error is None else type(error)
        # As a NamedTuple's own constructor makes it, in half the time.
        kept = (model, version, digest, stages, signal, kind, 0 if told is None else told.attempts)
        queue.append(tuple.__new__(Observation, kept))
        if self._worker is None:
            self._start()

    def observe_stage(self, model: str, stage: str, seconds: float) -> None:
        """Count a stage of the engine's own, e.g. its features. Takes 1 to 2 microseconds and never raises."""
        if len(self._queue) >= self._limit or self._closed:
            next(self._drops)
            return
        self._queue.append((model, stage, seconds))
        if self._worker is None:
            self._start()

    def _start(self) -> None:
        with self._starting:
            if self._worker is None and not self._closed:
                worker = threading.Thread(target=self._run, name="tickserve-metrics", daemon=True)
                try:
                    worker.start()
                except RuntimeError:  # no thread to be had: what waits is counted when it is scraped
                    return
                self._worker = worker
                enlist(self._meanwhile)
        if self._closed:
            dismiss(self._meanwhile)

    def _meanwhile(self) -> None:
        counting = self._counting
        if self._queue and counting.acquire(blocking=False):
            try:
                for _ in range(AT_ONCE):
                    if not self._queue or not _plain(self._queue[0]):
                        break
                    self._count(self._queue.popleft(), BROKEN)
            finally:
                counting.release()

    # The side of who counts: the worker, and whoever reads.

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(self._flush_s)
            self._drain()

    def _drain(self) -> None:
        """Count what is queued by now, in slices."""
        left = len(self._queue)
        while left > 0:
            end = time.perf_counter_ns() + SLICE_NS
            with self._counting:
                while left > 0 and self._queue and time.perf_counter_ns() < end:
                    left -= 1
                    self._count(self._queue.popleft())
                left = min(left, len(self._queue))
            if left:
                time.sleep(0 if 2 * len(self._queue) > self._limit else PAUSE_S)

    def _count(self, seen: Observation | _Staged, caught: tuple[type[Exception], ...] = (Exception,)) -> None:
        try:
            if isinstance(seen, Observation):
                model = seen.model if seen.bundle_digest is not None else UNPINNED
                self._tally(model).add(seen)
            else:
                name, stage, seconds = seen
                # Whoever calls may have made the name up: a model counts by its name once a decision was seen of it.
                model = str(name) if str(name) in self._models else UNPINNED
                self._tally(model).stage(str(stage)).add(float(seconds))
        except caught:  # one that cannot be counted must not end the counting
            self._broken += 1

    def _tally(self, model: str) -> ModelTally:
        found = self._models.get(model)
        if found is None:
            model = model if len(self._models) < MAX_MODELS else OTHER
            found = self._models.setdefault(model, ModelTally(self._bounds))
        return found

    def _lost(self) -> int:
        total = next(self._drops) - self._drops_read
        self._drops_read += 1
        return total + self._broken

    # What Prometheus reads.

    def collect(self) -> Iterator[Metric]:
        """Every metric family, for a registry of prometheus_client: `registry.register(exporter)`."""
        self._drain()
        with self._counting:
            for family in families(self._models, self._lost()):
                yield family
                time.sleep(0)  # a call that comes back finds the interpreter free

    def describe(self) -> Iterator[Metric]:
        """No family: a registry need not collect in order to know whom it registers."""
        return iter(())

    def render(self, accept: str = "") -> bytes:
        """What `/metrics` says; OpenMetrics where `accept` asks for it."""
        return self._rendered(accept)[0]

    def _rendered(self, accept: str) -> tuple[bytes, str]:
        from prometheus_client.exposition import choose_encoder

        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind


def _plain(seen: Observation | _Staged) -> bool:
    """Whether nothing of an engine's own making is in it, which could do anything when it is asked for its text."""
    return isinstance(seen, Observation) or tuple(map(type, seen)) == (str, str, float)


def _registry() -> Any:
    """A registry of the exporter's own, with this process's memory and CPU in it."""
    try:
        from prometheus_client import CollectorRegistry, ProcessCollector
    except ImportError as error:
        raise MissingExtraError.of("prometheus_client", "monitoring") from error
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    return registry

"""The stage of the live tests: two replicas, callers that go wrong on command, and what watches them.

Each fault concerns a model of its own, so that `tiny`, which is always called well, is the negative control.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from tests.monitoring.live import START_S, Inbox, Prometheus, Replica, answers, free_port, process, wait_for, watched
from tests.serving.conftest import FEATURES, edit_config, publish_tiny
from tests.serving.test_tls import Authority
from tickserve.client import Client, Resilience
from tickserve.config import JournalSettings, MetricsSettings, MonitoringSettings
from tickserve.errors import RequestError
from tickserve.journal import Journal
from tickserve.metrics import MetricsExporter

# Seconds in place of minutes and days: what an alert needs is the same, only sooner.
SHORT = MonitoringSettings(
    window_s=4.0,
    queue_window_s=2.0,
    page_after_s=1.0,
    ticket_after_s=0.5,
    slo_objective=0.99,
    burn_long_s=(4.0, 6.0, 8.0),
    burn_short_s=(2.0, 3.0, 4.0),
    burn_misses=3.0,
    pending_requests=4.0,
    queue_seconds=0.1,
    skew_s=1.0,
    no_traffic_s=4.0,
    memory_window_s=6.0,
    memory_growth_mb=20.0,
    restart_window_s=15.0,
    restarts=0,
    calibration_error=0.25,
    journal_lag_s=3.0,
)
ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 0.4  # of a queue that waits for company
FULL = 64  # rows: the company
MODELS = ("tiny", "fragile", "late", "queued", "stale", "odd", "idle", "drifting")
DRIFT = {
    "EVERY_S": "0.5",
    "WINDOW_S": "4.0",
    "SLICES": "8",
    "MIN_ROWS": "100",
    "MIN_OUTCOMES": "100",
    "JUDGE": '["features"]',  # the reference of `drifting` has no score
    "PSI_FLAT": "1.0",
    "RAISE_S": "0.5",
    "CLEAR_S": "1.0",
}
JOURNAL = JournalSettings(flush_ms=50.0, segment_s=600.0)
OPPOSITE = {"down": "up", "up": "down", "flat": "flat"}
STEADY = Resilience(attempts=1, hedge_budget=0, breaker_failures=1_000_000)


def rows(count: int = 1, first: float = 1.0) -> np.ndarray:
    made = np.random.default_rng().normal(size=(count, FEATURES)).astype(np.float32).clip(-3, 3)
    made[:, 0] = first
    return made


def publish_all(folder: Path) -> None:
    """One model for each fault; `late` and `queued` have a queue that waits for company."""
    for seed, name in enumerate((*MODELS, "solo"), 1):
        publish_tiny(folder, name, seed, fragile=name == "fragile", reference=name == "drifting")

    def wait_for_company(config: Any) -> None:
        config.dynamic_batching.preferred_batch_size[:] = [FULL]
        config.dynamic_batching.max_queue_delay_microseconds = int(WAIT_S * 1e6)

    for name in ("late", "queued"):
        edit_config(folder / name, wait_for_company)


@dataclass
class Callers:
    """Threads that call until `stop`; each looks at `wrong`, which says whether its fault is on."""

    wrong: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def add(self, call: Callable[[bool], object], pause_s: float = 0.05) -> None:
        def run() -> None:
            while not self.stop.is_set():
                with suppress(RequestError):
                    call(self.wrong.is_set())
                self.stop.wait(pause_s)

        self.threads.append(threading.Thread(target=run, daemon=True))

    def close(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(10)


class _Nothing(BaseHTTPRequestHandler):
    """No metrics, over HTTP/1.0: no connection outlives its server."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


class Spare:
    """Two more targets, which can be gone: of the engines' job and of the journals'."""

    def __init__(self) -> None:
        self.ports = (free_port(), free_port())
        self._running: list[ThreadingHTTPServer] = []

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(f"127.0.0.1:{port}" for port in self.ports)

    def start(self) -> None:
        self._running = [ThreadingHTTPServer(("127.0.0.1", port), _Nothing) for port in self.ports]
        for each in self._running:
            threading.Thread(target=each.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        for each in self._running:
            each.shutdown()
            each.server_close()
        self._running = []


@dataclass(frozen=True)
class Stage:
    """Everything that runs."""

    folder: Path
    one: Replica
    two: Replica
    callers: Callers
    prometheus: Prometheus
    inbox: Inbox
    started: float
    engines: tuple[str, ...]  # the addresses of the clients' metrics
    watched: Spare

    @property
    def repository(self) -> Path:
        return self.folder / "models"

    @property
    def newer(self) -> Path:
        """The repository with a second version of `tiny`."""
        return self.folder / "newer"

    def grow(self, on: bool) -> None:
        flag = self.folder / "grow"
        flag.touch() if on else flag.unlink(missing_ok=True)


def _drift(client: Client, journal: Journal, wrong: bool) -> None:
    """Rows as those of the training, and outcomes as the model foretells them; or neither."""
    random = np.random.default_rng()
    features = random.normal(2.0 if wrong else 0.0, size=(16, FEATURES)).astype(np.float32)
    signal = client.score("drifting", features, newest_event_ns=time.time_ns())
    assert signal.probabilities is not None
    assert signal.decision is not None
    for row, (chances, decision) in enumerate(zip(signal.probabilities, signal.decision, strict=True)):
        chances = chances.astype(np.float64)
        came = OPPOSITE[decision] if wrong else str(random.choice(signal.classes, p=chances / chances.sum()))
        traded = float(decision != "flat")
        gain = traded * (1.0 if came == decision else 0.0 if came == "flat" else -1.0)
        journal.outcome(signal.request_id, realised=came, pnl_bp=gain, turnover=traded, row=row)


def certify(folder: Path, days: float) -> None:
    """A certificate of the second replica's gRPC port; it is read when the server starts."""
    pair = Authority(folder, "authority").issue("server", days=days)
    pair.cert.replace(folder / "cert.pem")
    pair.key.replace(folder / "key.pem")


@contextmanager
def opened(folder: Path, settings: MonitoringSettings = SHORT) -> Iterator[Stage]:
    """All of it, started and warm."""
    publish_all(folder / "models")
    publish_all(folder / "newer")
    publish_tiny(folder / "newer", "tiny", 99)
    certify(folder, days=365)
    tls = {"tls_cert": str(folder / "cert.pem"), "tls_key": str(folder / "key.pem")}
    one, two = Replica(MODELS), Replica(("tiny", "solo"), **tls)
    with ExitStack() as stack:
        for replica in (one, two):
            stack.callback(replica.stop)
            replica.start(folder / "models")
        metrics = stack.enter_context(MetricsExporter(port=0))
        # So small a buffer loses what a burst brings.
        narrow = stack.enter_context(MetricsExporter(MetricsSettings(buffer_records=1, flush_ms=1_000.0), port=0))
        spare = Spare()
        stack.callback(spare.stop)
        spare.start()
        outcomes, quiet = (stack.enter_context(Journal(folder / name, JOURNAL)) for name in ("outcomes", "quiet"))
        engines = tuple(str(each.url).split("/")[2] for each in (metrics, narrow))
        jobs = {
            "triton-tickserve": (one.target, two.target),
            "engine": (*engines, spare.targets[0]),
            "journal": (
                *(stack.enter_context(_followed(folder, name)) for name in ("outcomes", "quiet")),
                spare.targets[1],
            ),
            "tickserve-worker": (stack.enter_context(_grower(folder)),),
        }
        callers = Callers()
        _call(stack, callers, folder / "models", (one, two), (metrics, narrow), (outcomes, quiet))
        stack.callback(callers.close)
        prometheus, inbox = stack.enter_context(watched(folder, settings, jobs, [two.grpc]))
        started = time.time()
        for thread in callers.threads:
            thread.start()
        yield Stage(folder, one, two, callers, prometheus, inbox, started, engines, spare)


@contextmanager
def _followed(folder: Path, journal: str) -> Iterator[str]:
    """`tickserve monitor export` over a journal, as a process of its own: yields its target."""
    port = free_port()
    command = [sys.executable, "-m", "tickserve.cli", "monitor", "export", "--journal", str(folder / journal)]
    command += ["--repository", str(folder / "models"), "--port", str(port)]
    short = {f"TICKSERVE_DRIFT__{key}": value for key, value in DRIFT.items()}
    address = f"127.0.0.1:{port}"
    with process(*command, log=folder / f"{journal}.log", cwd=ROOT, env=os.environ | short):
        wait_for(lambda: answers(f"http://{address}/metrics"), START_S, f"{journal} is followed")
        yield address


@contextmanager
def _grower(folder: Path) -> Iterator[str]:
    script = Path(__file__).with_name("grower.py")
    with subprocess.Popen(
        [sys.executable, str(script), str(folder / "grow")], stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        try:
            yield f"127.0.0.1:{int(running.stdout.readline())}"
        finally:
            running.terminate()


def _call(
    stack: ExitStack,
    callers: Callers,
    manifest: Path,
    replicas: Sequence[Replica],
    exporters: Sequence[MetricsExporter],
    journals: Sequence[Journal],
) -> None:
    """Who calls which model, and how it goes wrong."""
    (one, two), (metrics, narrow), (outcomes, quiet) = replicas, exporters, journals

    def client(*urls: str, observer: Any = metrics, **options: Any) -> Client:
        options = {"deadline_ms": 5_000, "resilience": STEADY} | options
        return stack.enter_context(Client(urls, manifest=manifest, observer=observer, **options))

    both = client(one.url, two.url, resilience=Resilience(), max_age_ms=60_000)

    def well(_: bool) -> None:
        start, newest = time.perf_counter(), time.time_ns()
        features = rows(4)
        metrics.observe_stage("tiny", "features", time.perf_counter() - start)
        both.score("tiny", features, newest_event_ns=newest)

    callers.add(well)
    # Its server is killed: errors, and the fallback.
    solo = client(two.url, fallback="flat")
    callers.add(lambda _: solo.score("solo", rows()))
    plain = client(one.url)
    # A first feature that is no index of the model's table fails in the server.
    callers.add(lambda wrong: plain.score("fragile", rows(first=9.0 if wrong else 1.0)))
    callers.add(lambda _: plain.score("fragile", rows()))
    # A full batch is scored at once, a lone row after WAIT_S.
    late = client(one.url)
    callers.add(lambda wrong: late.score("late", rows(1 if wrong else FULL), deadline_ms=50 if wrong else None))
    for _ in range(8):
        queued = client(one.url)
        callers.add(lambda wrong, asks=queued: asks.score("queued", rows(1 if wrong else FULL)), pause_s=0.02)  # type: ignore[misc]
    aged = client(one.url, max_age_ms=10_000)
    callers.add(lambda wrong: aged.score("stale", rows(), newest_event_ns=time.time_ns() - int(20e9 if wrong else 1e6)))
    # Infinite is refused; out of the training range is answered and flagged.
    callers.add(lambda wrong: plain.score("odd", rows(first=float("inf") if wrong else 50.0)))
    idle = client(one.url, observer=(quiet, metrics))
    callers.add(lambda wrong: None if wrong else idle.score("idle", rows()))
    told = client(one.url, observer=(outcomes, metrics), max_age_ms=60_000)
    callers.add(lambda wrong: _drift(told, outcomes, wrong))
    bursts = client(one.url, observer=narrow)
    callers.add(lambda wrong: [bursts.score("tiny", rows()) for _ in range(20 if wrong else 1)], pause_s=1.5)

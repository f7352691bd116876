"""Locust users that score real rows through `tickserve.Client`, over HTTP and over gRPC, and check every answer.

    LOCUST_SKIP_MONKEY_PATCH=1 locust -f loadtest/locustfile.py --headless --plan plan.json HttpUser GrpcUser

`tickserve loadtest run` writes the plan and starts this; see `loadtest/run.py`.

Each user is one operating-system thread with a client of its own: it sends, waits, checks, and sends again. Locust's
greenlets only hand out the work and book the results. gRPC inside gevent either serialises the calls, so that time in
the queue is invisible, or hangs at exit; threads do neither, which the results prove by Little's law (requests in
flight = number of users). They need the standard library unpatched, hence LOCUST_SKIP_MONKEY_PATCH.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # Locust puts the locustfile's own folder there, not the checkout

if not os.environ.get("LOCUST_SKIP_MONKEY_PATCH"):
    raise SystemExit("loadtest/locustfile.py: set LOCUST_SKIP_MONKEY_PATCH=1, or use 'tickserve loadtest run'")

import gevent  # noqa: E402
import numpy as np  # noqa: E402
from gevent.event import Event  # noqa: E402
from gevent.threadpool import ThreadPool  # noqa: E402
from locust import User, events, task  # noqa: E402
from locust.exception import StopUser  # noqa: E402
from locust.runners import MasterRunner, WorkerRunner  # noqa: E402

from loadtest.plan import Phase, Plan  # noqa: E402
from loadtest.recorder import Recorder  # noqa: E402
from tickserve.client import Client  # noqa: E402
from tickserve.errors import TickserveError  # noqa: E402
from tickserve.manifest import GOLDEN_NAME, load_manifest  # noqa: E402
from tickserve.store import write_json_atomic  # noqa: E402

# A burst is how long a thread runs before Locust books what it measured: booking would disturb the measurement, so a
# phase up to a second long is measured in one go.
BURST_S = 1.0
BACKOFF_S = 0.02
# A user gives a phase up after this many failures in a row (a second of them): the server is gone.
MAX_FAILURES_IN_A_ROW = 50
# A thread that answers the interpreter's lock request within half a millisecond keeps it out of the latencies.
SWITCH_INTERVAL_S = 0.0005

Array = np.ndarray[Any, np.dtype[Any]]


class WrongAnswerError(Exception):
    """The server's number is not research's number, to the manifest's tolerance."""


class Golden(NamedTuple):
    """Real rows of one model with the research model's probabilities: inputs [1, ...] each, expected [G, K]."""

    inputs: list[dict[str, Array]]
    expected: Array
    atol: float
    rtol: float


class Sample(NamedTuple):
    """One request, as it is booked with Locust."""

    latency_us: float
    measured: bool
    error: Exception | None


def load_golden(folder: Path) -> Golden:
    """The golden pairs of a version directory, one row a request."""
    manifest = load_manifest(folder)
    with np.load(folder / GOLDEN_NAME, allow_pickle=False) as arrays:
        inputs = {spec.name: arrays[spec.name] for spec in manifest.inputs}
        expected = arrays["probabilities"]
    rows = [{name: array[row : row + 1] for name, array in inputs.items()} for row in range(len(expected))]
    return Golden(rows, expected, manifest.tolerance.atol, manifest.tolerance.rtol)


class Test:
    """What all users share: the plan, the clock, the recorder and the order to stop."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.recorder = plan, Recorder()
        self.golden = {model: load_golden(Path(folder)) for model, folder in plan.version_dirs.items()}
        self.threads = ThreadPool(plan.users)
        self.stop = threading.Event()
        self.started = Event()
        self.start_s = 0.0
        self.complete = False
        self._ready, self._expected = 0, 0

    def expect(self, users: int) -> None:
        """Locust has started so many users in this process; each has a client to open."""
        self._expected = users
        self._start_clock()

    def one_is_ready(self) -> None:
        """A user has opened its client, or failed to."""
        self._ready += 1
        self._start_clock()

    def _start_clock(self) -> None:
        """The first phase begins when all users are ready: it would pass, on a slow machine, while they open."""
        if self._ready >= self._expected > 0 and not self.started.is_set():
            self.start_s = time.monotonic() + 0.05
            self.started.set()

    def write_results(self, **_: object) -> None:
        """Wait until the threads are done, and keep what was measured."""
        self.stop.set()
        self.threads.join()
        rows = [
            {"transport": transport, "model": model, **row.to_json()}
            for (transport, model), row in self.recorder.rows.items()
        ]
        write_json_atomic(Path(self.plan.results), {"complete": self.complete, "rows": rows})


def burst(test: Test, client: Client, phase: Phase, begin_s: float, end_s: float, failures: int) -> list[Sample]:
    """Score row after row until `end_s`; runs in its own thread. `failures` is how many came in a row before."""
    golden, samples = test.golden[phase.model], list[Sample]()
    measured_from = begin_s + test.plan.warmup_s
    row = threading.get_ident() % len(golden.inputs)
    while not test.stop.is_set() and failures < MAX_FAILURES_IN_A_ROW:
        sent_s = time.monotonic()
        if sent_s >= end_s:
            break
        answered_s, error = score(client, phase.model, golden, row)
        samples.append(Sample((answered_s - sent_s) * 1e6, sent_s >= measured_from, error))
        row = (row + 1) % len(golden.inputs)
        failures = failures + 1 if error else 0
        if error:
            time.sleep(BACKOFF_S)
    return samples


def score(client: Client, model: str, golden: Golden, row: int) -> tuple[float, Exception | None]:
    """One request: when its answer was there (`time.monotonic`), and what was wrong with it, if anything.

    The client refuses an answer whose `bundle_id` is not the pinned manifest's; the number itself is checked here.
    """
    try:
        signal = client.score(model, golden.inputs[row])
    except TickserveError as error:
        return time.monotonic(), error
    answered_s = time.monotonic()
    if signal.probabilities is None:
        return answered_s, WrongAnswerError(f"expected status OK, was {signal.status}")
    expected = golden.expected[row]
    apart = np.abs(signal.probabilities[0] - expected) - golden.rtol * np.abs(expected)
    if not apart.max() <= golden.atol:  # also when it is NaN
        return answered_s, WrongAnswerError("probabilities are not the golden ones, to the manifest's tolerance")
    return answered_s, None


class ScoringUser(User):
    """A trading engine that asks as fast as it is answered, in the phases of its transport."""

    abstract = True
    transport: ClassVar[str]

    def on_start(self) -> None:
        """Open this user's own client."""
        self.test: Test = self.environment.tickserve_test
        plan = self.test.plan
        try:
            self.client = Client(
                plan.urls[self.transport],
                manifest={model: Path(folder) for model, folder in plan.version_dirs.items()},
                transport=self.transport,  # type: ignore[arg-type]
                deadline_ms=plan.deadline_ms,
            )
        finally:
            self.test.one_is_ready()

    @task
    def follow_the_plan(self) -> None:
        """Run the phases of this transport, then end."""
        self.test.started.wait()
        for phase in self.test.plan.phases:
            if phase.transport == self.transport:
                self.run_phase(phase)
        self.client.close()
        raise StopUser

    def run_phase(self, phase: Phase) -> None:
        """Hand bursts to a thread and book what comes back."""
        begin_s = self.test.start_s + phase.start_s
        gevent.sleep(max(0.0, begin_s - time.monotonic()))
        failures = 0
        for end_s in self._burst_ends(begin_s):
            samples = self.test.threads.apply(burst, (self.test, self.client, phase, begin_s, end_s, failures))
            for sample in samples:
                self.book(phase, sample)
                failures = failures + 1 if sample.error else 0
            if failures >= MAX_FAILURES_IN_A_ROW:
                self.test.recorder.row(phase.transport, phase.model).gave_up += 1
                return

    def _burst_ends(self, begin_s: float) -> Iterator[float]:
        phase_end_s = begin_s + self.test.plan.phase_s
        while not self.test.stop.is_set() and (now := time.monotonic()) < phase_end_s:
            yield min(phase_end_s, now + BURST_S)

    def book(self, phase: Phase, sample: Sample) -> None:
        """Tell Locust about one request."""
        self.environment.events.request.fire(
            request_type=phase.transport,
            name=phase.model,
            response_time=sample.latency_us / 1_000,
            response_length=0,
            exception=sample.error,
            context={"measured": sample.measured},
        )


class HttpUser(ScoringUser):
    """Asks over Triton's binary HTTP."""

    transport = "http"


class GrpcUser(ScoringUser):
    """Asks over gRPC."""

    transport = "grpc"


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _add_plan_option(parser: Any) -> None:
    parser.add_argument("--plan", type=str, required=True, help="JSON file that loadtest/run.py writes")


@events.init.add_listener  # type: ignore[untyped-decorator]
def _prepare(environment: Any, **_: object) -> None:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    plan = Plan.from_file(Path(environment.parsed_options.plan))
    test = environment.tickserve_test = Test(plan)
    HttpUser.fixed_count = GrpcUser.fixed_count = plan.users
    environment.events.request.add_listener(test.recorder.on_request)
    environment.events.spawning_complete.add_listener(lambda **_: test.expect(environment.runner.user_count))
    environment.events.test_stop.add_listener(lambda **_: test.stop.set())
    environment.events.quitting.add_listener(test.write_results)
    environment.events.spawning_complete.add_listener(lambda **_: gevent.spawn(_quit_when_done, environment, test))


def _quit_when_done(environment: Any, test: Test) -> None:
    """End Locust as soon as the last user has ended; of several processes the master ends all."""
    worker = isinstance(environment.runner, WorkerRunner)
    if worker and not environment.runner.user_count:
        return  # nothing was asked of this worker yet
    while isinstance(environment.runner, MasterRunner) and not environment.runner.user_count:
        gevent.sleep(0.02)  # no worker has said yet that its users are there; the run time ends it
    while environment.runner.user_count:
        gevent.sleep(0.02)
    test.complete = True
    if not worker:
        environment.runner.quit()

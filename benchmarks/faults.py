"""Two embedded servers behind one client under a paced load, and one fault after another: what each costs.

    python -m benchmarks.faults --repository model_repository [--only sigkill] [--transport grpc] [--json]

Every answer is held against its golden number. "overrun" is by how much the slowest call came back after its deadline,
"stall" by how much a thread that only slept did, for which the machine is to blame;
"recovery" is how long after the fault ended both replicas were believed alive again, without help.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import signal as signals
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.harness import machine
from benchmarks.link import Link, may_make_namespaces
from benchmarks.paced_load import Figures, PacedLoad, figures, until_true
from benchmarks.relay import Relay
from serving.embedded import EmbeddedTriton
from tickserve.client import Client, Resilience, newest_versions
from tickserve.config import ServeSettings
from tickserve.errors import TickserveError
from tickserve.manifest import GOLDEN_NAME, Manifest, load_manifest

FREE_PORTS = ServeSettings(http_port=0, grpc_port=0, metrics_port=0)
KEEPALIVE_S = 13.0


@dataclass(frozen=True)
class Held:
    """What the process holds: open descriptors, threads, resident memory."""

    descriptors: int
    threads: int
    memory_mb: float

    @classmethod
    def now(cls) -> Held:
        """At this moment."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        return cls(len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), memory)


@dataclass(frozen=True)
class Report:
    """One fault: the load before, during and after it."""

    fault: str
    before: Figures
    during: Figures
    after: Figures
    recovery_s: float | None
    grown: Held  # what is held more than before
    statistics: dict[str, Any]


class Stage:
    """Two servers of one model, and where their requests can be interfered with."""

    transport: Literal["http", "grpc"] = "http"
    length = 1.0  # of the load before, in and after a fault, in times the usual

    def __init__(self, repository: Path, model: str | None = None, deadline_ms: float = 100) -> None:
        self.repository, self.deadline_ms = repository, deadline_ms
        self._idle: list[EmbeddedTriton] = []
        versions = newest_versions(repository)
        self.model = model or next(iter(versions))
        folder = versions[self.model]
        self.manifest: Manifest = load_manifest(folder)
        with np.load(folder / GOLDEN_NAME, allow_pickle=False) as golden:
            self.rows = np.ascontiguousarray(golden[self.manifest.inputs[0].name], np.float32)
            self.golden = golden["probabilities"].astype(np.float32)

    @contextmanager
    def servers(self, count: int = 2) -> Iterator[list[EmbeddedTriton]]:
        """That many servers, each on ports of its own; those that are still whole afterwards are used again."""
        taken = [self._idle.pop() if self._idle else self._started() for _ in range(count)]
        try:
            yield taken
        finally:
            for server in taken:
                if server.healthy:
                    self._idle.append(server)
                else:
                    server.stop()

    def close(self) -> None:
        """Stop the servers."""
        while self._idle:
            self._idle.pop().stop()

    def _started(self) -> EmbeddedTriton:
        server = EmbeddedTriton(self.repository, FREE_PORTS, [self.model])
        server.start()
        return server

    def over(self, transport: Literal["http", "grpc"], length: float = 1.0) -> Stage:
        """The same servers, asked over `transport`, for `length` times the usual time."""
        same = copy.copy(self)
        same.transport, same.length = transport, length
        return same

    def address(self, server: EmbeddedTriton) -> str:
        """Where clients of this stage ask `server`."""
        return server.grpc_url if self.transport == "grpc" else server.http_url

    def client(self, addresses: list[str], resilience: Resilience | None = None) -> Client:
        """A client of all of them."""
        return Client(
            addresses,
            manifest=self.manifest,
            transport=self.transport,
            deadline_ms=self.deadline_ms,
            resilience=resilience,
        )

    def load(self, client: Client, **options: Any) -> PacedLoad:
        """A load on `client`."""
        bundle_id = self.manifest.bundle_id()
        return PacedLoad(client, self.model, self.rows, self.golden, bundle_id, deadline_ms=self.deadline_ms, **options)


def closed(client: Client) -> bool:
    """Whether every breaker is closed."""
    return all(one["breaker"] == "closed" for one in client.statistics()["replicas"].values())


def observe(
    stage: Stage,
    name: str,
    addresses: list[str],
    fault: Callable[[], object],
    heal: Callable[[], object],
    *,
    before_s: float = 1.5,
    during_s: float = 2.0,
    after_s: float = 1.5,
    **options: Any,
) -> Report:
    """The load at rest, through `fault`, and after `heal`."""
    with stage.client(addresses) as client:
        with stage.load(client, **options) as load:
            time.sleep(0.5)  # the first calls connect
            held, began = Held.now(), time.monotonic_ns()
            time.sleep(before_s * stage.length)
            struck = time.monotonic_ns()
            fault()
            time.sleep(during_s * stage.length)
            heal()
            healed = time.monotonic_ns()
            recovery = until_true(lambda: closed(client), 30)
            recovered = time.monotonic_ns()
            time.sleep(after_s * stage.length)
            now = Held.now()
        ended = time.monotonic_ns()
        return Report(
            name,
            figures(load, began, struck),
            figures(load, struck, healed),
            figures(load, recovered, ended),
            recovery,
            Held(*(after - first for after, first in zip(asdict(now).values(), asdict(held).values(), strict=True))),
            client.statistics(),
        )


def _ends(stage: Stage, name: str, number: signals.Signals) -> Report:
    """A server that ends by `number`, and is started again on its port."""
    with stage.servers() as (one, other), ExitStack() as stack:
        address = stage.address(one)
        again = FREE_PORTS.model_copy(update={f"{stage.transport}_port": int(address.rpartition(":")[2])})

        def heal() -> None:
            one.stop()
            stack.enter_context(EmbeddedTriton(stage.repository, again, [stage.model]))

        return observe(
            stage, name, [address, stage.address(other)], lambda: os.kill(one.pid, number), heal, during_s=4.0
        )


def sigkill(stage: Stage) -> Report:
    """Fault 1: the server is killed with requests under way."""
    return _ends(stage, "sigkill", signals.SIGKILL)


def sigterm(stage: Stage) -> Report:
    """Fault 2: the server is asked to end under load."""
    return _ends(stage, "sigterm", signals.SIGTERM)


def sigstop(stage: Stage) -> Report:
    """Fault 3: the server hangs with its connections open, then goes on."""
    with stage.servers() as (one, other):
        return observe(
            stage,
            "sigstop",
            [stage.address(one), stage.address(other)],
            lambda: os.kill(one.pid, signals.SIGSTOP),
            lambda: os.kill(one.pid, signals.SIGCONT),
        )


def _through_relays(stage: Stage, name: str, order: str, **options: Any) -> Report:
    with stage.servers() as (one, other), Relay(stage.address(one)) as bad, Relay(stage.address(other)) as good:
        return observe(
            stage,
            name,
            [bad.address, good.address],
            lambda: bad.order(order),
            lambda: bad.order("clear"),
            **options,
        )


def half_open(stage: Stage) -> Report:
    """Fault 4: the peer is gone and nobody said so."""
    return _through_relays(stage, "half-open", "dark")


def reset(stage: Stage) -> Report:
    """Fault 5: the connection is reset inside the answer."""
    return _through_relays(stage, "reset", "cut 120")


def slow(stage: Stage) -> Report:
    """Fault 8: one replica answers ten times slower."""
    return _through_relays(stage, "slow x10", "slow 10", during_s=4.0)


def all_down(stage: Stage) -> Report:
    """Fault 10: every replica refuses."""
    with stage.servers() as (one, other), Relay(stage.address(one)) as first, Relay(stage.address(other)) as second:

        def both(order: str) -> None:
            first.order(order)
            second.order(order)

        return observe(
            stage,
            "all down",
            [first.address, second.address],
            lambda: both("refuse"),
            lambda: both("clear"),
        )


def dropped_link(stage: Stage) -> Report:
    """A link that goes down between client and one replica, in a network namespace of its own."""
    with stage.servers() as (one, other), Link(stage.address(one)) as link:
        addresses = [link.address, stage.address(other)]
        return observe(stage, "dropped link", addresses, link.down, link.up, during_s=3.0)


FAULTS: dict[str, Callable[[Stage], Report]] = {
    "sigkill": sigkill,
    "sigterm": sigterm,
    "sigstop": sigstop,
    "half-open": half_open,
    "reset": reset,
    "slow": slow,
    "all-down": all_down,
    "dropped-link": dropped_link,
}


def show(report: Report) -> None:
    during = report.during
    kinds = ", ".join(f"{count} {status}" for status, count in sorted(during.statuses.items()) if status != "OK")
    recovery = "never" if report.recovery_s is None else f"{report.recovery_s:.2f} s"
    wrong = report.before.wrong + during.wrong + report.after.wrong
    print(
        f"{report.fault:<13}{during.calls:>6}{during.failed:>8}{wrong:>7}{during.overrun_ms:>9.1f}{during.stall_ms:>7.1f}"
        f"{report.before.p50_ms:>9.2f}{report.before.p99_ms:>8.2f}{during.p50_ms:>9.2f}{during.p99_ms:>8.2f}"
        f"{recovery:>10}   {kinds or 'no failure'}"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="published models")
    parser.add_argument("--model", help="default: the first model of the repository")
    parser.add_argument("--only", choices=sorted(FAULTS), help="one fault")
    parser.add_argument("--transport", choices=["http", "grpc"], default="http", help="of the client; default: http")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    try:
        stage = Stage(chosen.repository, chosen.model).over(chosen.transport)
    except TickserveError as error:
        print(f"{error}; publish a model first: tickserve demo", file=sys.stderr)
        return error.exit_code
    wanted = [chosen.only] if chosen.only else list(FAULTS)
    if not chosen.json:
        print(f"{machine()}\n200 calls/s of {stage.model} over {stage.transport}, ", end="")
        print("4 threads, deadline 100 ms, two replicas; times in ms\n")
        print(
            f"{'fault':<13}{'calls':>6}{'failed':>8}{'wrong':>7}{'overrun':>9}{'stall':>7}{'p50':>9}{'p99':>8}", end=""
        )
        print(f"{'p50 then':>9}{'p99':>8}{'recovery':>10}   during the fault")
    logging.getLogger("tickserve.client").addHandler(logging.NullHandler())  # its lines would cut the table
    reports = []
    for name in wanted:
        if name == "dropped-link" and not may_make_namespaces():
            print("dropped-link: left out, no right to make a network namespace here", file=sys.stderr)
            continue
        report = FAULTS[name](stage)
        reports.append(asdict(report))
        if not chosen.json:
            show(report)
    stage.close()
    if chosen.json:
        print(json.dumps(reports, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

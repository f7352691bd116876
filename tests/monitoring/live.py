"""A real Prometheus and Alertmanager (Debian's) over two served replicas, and a receiver of notifications.

The receiver is a plain HTTP server, as any webhook is.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from monitoring import render
from serving.embedded import EmbeddedTriton
from tests.serving.conftest import ANY_PORTS
from tickserve.config import MonitoringSettings

BINARIES = {
    "prometheus": "/usr/bin/prometheus",
    "alertmanager": "/usr/bin/prometheus-alertmanager",
    "blackbox": "/usr/bin/prometheus-blackbox-exporter",
}
SCRAPE_S = 0.5
# As the chart records it, from its values.
PROMISE = {
    "name": "tickserve-slo",
    "rules": [
        {"record": f"tickserve:slo:{name}", "expr": f"vector({value})", "labels": {"job": "triton-tickserve"}}
        for name, value in (("deadline_seconds", 5.0), ("objective", 0.99))
    ],
}
START_S = 20.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(what: Callable[[], object], timeout_s: float, text: str) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, f"{text}: not after {timeout_s:g} s"
        time.sleep(0.1)


@contextmanager
def process(
    *command: str, log: Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        running = subprocess.Popen(command, stdout=output, stderr=output, cwd=cwd or log.parent, env=env)
        try:
            yield running
        finally:
            running.terminate()
            try:
                running.wait(10)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


class Replica:
    """One server on ports that it keeps when it is started again."""

    def __init__(self, models: Sequence[str] | None = None, **settings: Any) -> None:
        ports = {f"{kind}_port": free_port() for kind in ("http", "grpc", "metrics")}
        self.settings = ANY_PORTS.model_copy(update=ports | settings)
        self.models = models
        self.server: EmbeddedTriton | None = None

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.settings.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.settings.grpc_port}"

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.settings.metrics_port}"

    def start(self, repository: Path) -> None:
        self.server = EmbeddedTriton(repository, self.settings, models=self.models)
        self.server.start()

    def kill(self) -> None:
        assert self.server is not None
        os.kill(self.server.pid, signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
            log = self.server.log
            if log is not None:
                log.unlink(missing_ok=True)
            self.server = None


@dataclass
class Inbox:
    """What Alertmanager has sent: when, which alert with which labels, firing or resolved."""

    received: list[tuple[float, str, str, dict[str, str]]] = field(default_factory=list)

    def has(self, alert: str, status: str, labels: Mapping[str, str], since: float = 0.0) -> bool:
        return any(
            when >= since and name == alert and state == status and labels.items() <= given.items()
            for when, name, state, given in list(self.received)
        )

    def latest(self, alert: str, labels: Mapping[str, str]) -> str | None:
        """What was said last about every instance of the alert: firing while any one fires."""
        states = {
            tuple(sorted(given.items())): state
            for _, name, state, given in list(self.received)
            if name == alert and labels.items() <= given.items()
        }
        return "firing" if "firing" in states.values() else "resolved" if states else None


@contextmanager
def receiver() -> Iterator[tuple[str, Inbox]]:
    """A webhook: yields its address and what it was told."""
    inbox = Inbox()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for alert in body["alerts"]:
                labels = dict(alert["labels"])
                inbox.received.append((time.time(), labels.pop("alertname"), alert["status"], labels))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/", inbox
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass(frozen=True)
class Prometheus:
    """The HTTP interface of one that runs."""

    url: str

    def get(self, path: str, **query: Any) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def now(self, expr: str) -> list[dict[str, Any]]:
        return list(self.get("query", query=expr)["result"])

    def has_data(self, expr: str, start: float) -> bool:
        """Whether any sample that is a number lies between `start` and now."""
        found = self.get("query_range", query=expr, start=start, end=time.time(), step=1)["result"]
        return any(value not in ("NaN", "+Inf", "-Inf") for series in found for _, value in series["values"])

    def alerts(self) -> dict[str, str]:
        """State of every alert that is not inactive, by name."""
        return {alert["labels"]["alertname"]: alert["state"] for alert in self.get("alerts")["alerts"]}


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def blackbox(folder: Path) -> Iterator[str]:
    """Debian's blackbox exporter, which reports when the certificate of a TLS port expires: yields its address."""
    tls = {"tls": True, "tls_config": {"insecure_skip_verify": True}}
    (folder / "blackbox.yml").write_text(yaml.safe_dump({"modules": {"tls": {"prober": "tcp", "tcp": tls}}}))
    address = f"127.0.0.1:{free_port()}"
    # Half a second less than the scrape waits, by default: here nothing would be left.
    command = (f"--config.file={folder / 'blackbox.yml'}", f"--web.listen-address={address}", "--timeout-offset=0")
    with process(BINARIES["blackbox"], *command, log=folder / "blackbox.log"):
        yield address


def probed(prober: str, targets: Sequence[str]) -> dict[str, Any]:
    """The scrape of TLS ports through the blackbox exporter, as its documentation has it."""
    return {
        "job_name": "tickserve-certificates",
        "metrics_path": "/probe",
        "params": {"module": ["tls"]},
        "static_configs": [{"targets": list(targets)}],
        "relabel_configs": [
            {"source_labels": ["__address__"], "target_label": "__param_target"},
            {"source_labels": ["__param_target"], "target_label": "instance"},
            {"target_label": "__address__", "replacement": prober},
        ],
    }


@contextmanager
def watched(
    folder: Path, settings: MonitoringSettings, jobs: Mapping[str, Sequence[str]], tls_ports: Sequence[str] = ()
) -> Iterator[tuple[Prometheus, Inbox]]:
    """Prometheus over the targets of `jobs`, with the rules under `settings`, and Alertmanager behind it."""
    with blackbox(folder) as prober, _watched(folder, settings, jobs, probed(prober, tls_ports)) as both:
        yield both


@contextmanager
def _watched(
    folder: Path, settings: MonitoringSettings, jobs: Mapping[str, Sequence[str]], probes: dict[str, Any]
) -> Iterator[tuple[Prometheus, Inbox]]:
    render.write(settings, folder)
    (folder / "rules" / "promise.yaml").write_text(yaml.safe_dump({"groups": [PROMISE]}))
    prometheus, alertmanager = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(folder / "rules" / "*.yaml")],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
        "scrape_configs": [
            *({"job_name": name, "static_configs": [{"targets": list(targets)}]} for name, targets in jobs.items()),
            probes,
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with receiver() as (webhook, inbox):
        route = {"receiver": "test", "group_by": ["..."], "group_wait": "0s", "group_interval": "1s"}
        routes = {"route": route, "receivers": [{"name": "test", "webhook_configs": [{"url": webhook}]}]}
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(routes))
        alerting = (
            f"--config.file={folder / 'alertmanager.yml'}",
            f"--storage.path={folder / 'alertmanager'}",
            f"--web.listen-address={alertmanager}",
            "--cluster.listen-address=",
        )
        scraping = (
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address={prometheus}",
            "--rules.alert.resend-delay=1s",
        )
        with (
            process(BINARIES["alertmanager"], *alerting, log=folder / "alertmanager.log"),
            process(BINARIES["prometheus"], *scraping, log=folder / "prometheus.log"),
        ):
            for address in (prometheus, alertmanager):
                wait_for(lambda at=address: answers(f"http://{at}/-/ready"), START_S, f"{address} is ready")  # type: ignore[misc]
            yield Prometheus(f"http://{prometheus}"), inbox
    shutil.rmtree(folder / "tsdb", ignore_errors=True)

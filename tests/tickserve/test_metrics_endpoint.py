"""Where the exporter is read: formats, addresses, ports, scrapers that hang or stay, and the end."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families

from tests.tickserve.exported import MODEL, ROW, patient, scrape
from tickserve.errors import PortInUseError, UsageError
from tickserve.metrics import MetricsExporter
from tickserve.testing import UP_ANSWER, make_manifest


@pytest.mark.parametrize("address", ["::1", "::"])
def test_it_is_served_over_ipv6(address: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with MetricsExporter(port=0, address=address) as exporter:
        assert str(exporter.url).startswith(f"http://[{address}]:")
        assert "tickserve_client_lost_total 0.0" in scrape(str(exporter.url).replace("[::]", "[::1]"))[0]


def test_it_is_served_in_both_formats(metrics: MetricsExporter) -> None:
    patient(make_manifest(), [UP_ANSWER], observer=metrics).score(MODEL, ROW)
    plain, kind = scrape(metrics.url)
    assert kind.startswith("text/plain")
    assert 'tickserve_client_calls_total{model="mock-model",status="OK",version="1"} 1.0' in plain
    told, kind = scrape(metrics.url, "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    names = {family.name for family in open_families(told)}
    assert {"tickserve_client_calls", "tickserve_client_score", "process_resident_memory_bytes"} <= names
    assert {family.name for family in text_string_to_metric_families(plain)} >= {"tickserve_client_call_seconds"}
    with pytest.raises(urllib.error.HTTPError, match="404"):
        scrape(str(metrics.url).replace("/metrics", "/other"))


def test_a_registry_of_the_callers_own() -> None:
    with MetricsExporter(serve=False) as exporter:
        registry = CollectorRegistry()
        registry.register(exporter)
        patient(make_manifest(), observer=exporter).score(MODEL, ROW)
        assert registry.get_sample_value("tickserve_client_call_seconds_count", {"model": MODEL}) == 1
        assert exporter.url is None


def own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("tickserve-metrics")}


def test_a_taken_port_names_port_and_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        before = own_threads()
        with pytest.raises(PortInUseError, match=rf"metrics.port: port {port} is taken"):
            MetricsExporter(port=port)
        assert own_threads() <= before
    with pytest.raises(UsageError, match=r"metrics\.address: cannot be bound here"):
        MetricsExporter(port=0, address="192.0.2.1")


def test_a_scraper_that_hangs_holds_up_nobody(metrics: MetricsExporter) -> None:
    port = int(str(metrics.url).rsplit(":", 1)[1].split("/")[0])
    hanging = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    client = patient(make_manifest(), observer=metrics)
    started = time.monotonic()
    for _ in range(200):
        assert client.score(MODEL, ROW).ok
    assert time.monotonic() - started < 2
    threads = [thread for thread in threading.enumerate() if "process_request" in thread.name]
    assert len(threads) <= 8  # the places; the rest was shown the door
    for each in hanging:
        each.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            assert scrape(metrics.url)[0]
            break
        except OSError:
            time.sleep(0.05)
    else:
        pytest.fail("no scrape after the hanging ones had gone")


def test_after_close_calls_go_on(metrics: MetricsExporter) -> None:
    client = patient(make_manifest(), observer=metrics)
    client.score(MODEL, ROW)
    url = metrics.url
    metrics.close()
    metrics.close()
    assert client.score(MODEL, ROW).ok
    assert client.statistics()["observer_errors"] == 0
    with pytest.raises(OSError, match="refused"):
        scrape(url)
    with pytest.raises(UsageError, match="closed"):
        metrics.serve()


def test_a_scraper_that_keeps_its_connection_gets_nothing_after_close() -> None:
    exporter = MetricsExporter(port=0)
    scraper = http.client.HTTPConnection(str(exporter.url).split("/")[2], timeout=2)
    try:
        scraper.request("GET", "/metrics")
        assert scraper.getresponse().read()
        kept = scraper.sock
        exporter.close()
        assert kept.recv(1) == b"", "at once, and not when it has said nothing for long"
    finally:
        scraper.close()


FORK = """
import os, sys, time, urllib.request
import numpy as np
from tickserve.metrics import MetricsExporter
from tickserve.testing import make_manifest, mock_client

metrics = MetricsExporter(port=0)
client = mock_client(make_manifest(), observer=metrics)
row = np.zeros((1, 3), np.float32)
for _ in range(3):
    client.score("mock-model", row)
time.sleep(0.3)
pid = os.fork()
if pid == 0:
    client.score("mock-model", row)
    text = metrics.render().decode()
    assert 'status="OK",version="1"} 1.0' in text, text
    assert metrics.url is None
    assert "calls_total" in urllib.request.urlopen(metrics.serve(port=0), timeout=5).read().decode()
    metrics.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert 'status="OK",version="1"} 3.0' in urllib.request.urlopen(metrics.url, timeout=5).read().decode()
metrics.close()
print("both counted for themselves")
"""


def test_a_forked_child_starts_from_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.stdout == "both counted for themselves\n", done.stderr

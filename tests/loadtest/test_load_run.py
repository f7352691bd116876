"""Locust, really run, against a real Triton."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from loadtest import run as load_run
from loadtest.plan import make_plan
from loadtest.run import LOG_NAME, run_load
from serving.embedded import EmbeddedTriton
from tests.loadtest.conftest import publish_both
from tests.serving.conftest import ANY_PORTS
from tests.waiting import wait_until
from tickserve.child import end
from tickserve.config import LoadtestSettings
from tickserve.errors import ComponentError
from tickserve.manifest import load_manifest, write_manifest

Loaded = tuple[EmbeddedTriton, dict[str, Path]]


def successes(server: EmbeddedTriton) -> dict[str, int]:
    """What Triton itself counted, by model."""
    text = urllib.request.urlopen(server.metrics_url, timeout=5).read().decode()
    lines = [line for line in text.splitlines() if line.startswith("nv_inference_request_success{")]
    return {line.split('model="')[1].split('"')[0]: int(float(line.rsplit(" ", 1)[1])) for line in lines}


def under_way(server: EmbeddedTriton) -> None:
    """Wait until Locust, however long it takes to start, has booked a burst of calls and is at the next one."""
    answered_more(server)
    time.sleep(1.5)  # a burst takes a second
    answered_more(server)


def answered_more(server: EmbeddedTriton) -> None:
    enough = sum(successes(server).values()) + 100
    assert wait_until(lambda: sum(successes(server).values()) >= enough, 60)


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_every_request_is_answered_checked_and_counted_by_triton_too(loaded: Loaded, tmp_path: Path) -> None:
    server, versions = loaded
    before = successes(server)
    began = time.monotonic()
    results = run_load(
        server.http_url, server.grpc_url, versions, LoadtestSettings(users=3, duration_s=2.0), tmp_path / "out"
    )
    # Starting, stopping and drawing around the 2.4 s that the plan takes.
    assert time.monotonic() - began < 20
    assert "run-time limit reached" not in (tmp_path / "out" / LOG_NAME).read_text()
    assert {(row["transport"], row["model"]) for row in results["rows"]} == {
        (transport, model) for transport in ("http", "grpc") for model in versions
    }
    for row in results["rows"]:
        assert row["failures"] == 0, row["errors"]
        assert row["measured"] > 50
        assert 0 < row["p50_us"] <= row["p90_us"] <= row["p99_us"] <= row["p99_9_us"] <= row["max_us"]
        assert sum(count for _, count in row["histogram"]) == row["measured"]
        assert row["in_flight"] < 1.3 * 3
    after = successes(server)
    for model in versions:
        sent = sum(row["requests"] for row in results["rows"] if row["model"] == model)
        assert after[model] - before[model] == sent
    assert json.loads((tmp_path / "out" / "loadtest.json").read_text()) == results
    assert (tmp_path / "out" / "latency.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_no_waiting_is_hidden(loaded: Loaded, tmp_path: Path, transport: str) -> None:
    """Calls that take turns somewhere unmeasured, as gRPC's do under gevent, would show one request in flight."""
    server, versions = loaded
    settings = LoadtestSettings(users=6, duration_s=2.0, transports=(transport,))
    results = run_load(server.http_url, server.grpc_url, {"tiny": versions["tiny"]}, settings, tmp_path)
    # The users' own work between two requests counts against them, and a busy machine makes it long.
    assert results["rows"][0]["in_flight"] > 0.5 * 6


SLOW_TO_OPEN = """
import pathlib
import time
import tickserve.client

class Slow(tickserve.client.Client):
    def __init__(self, *args, **options):
        time.sleep(0.4)
        super().__init__(*args, **options)
        with pathlib.Path(__file__).with_name("opened").open("a") as file:
            file.write("x")

tickserve.client.Client = Slow
"""


def test_no_phase_passes_while_the_users_open_their_clients(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, versions = loaded
    (tmp_path / "sitecustomize.py").write_text(SLOW_TO_OPEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = LoadtestSettings(users=2, duration_s=0.5)
    results = run_load(server.http_url, server.grpc_url, {"tiny": versions["tiny"]}, settings, tmp_path / "out")
    assert [row["transport"] for row in results["rows"]] == ["http", "grpc"]
    assert results["phase_s"] < 2 * 0.4
    assert (tmp_path / "opened").read_text() == 4 * "x"  # two users of each transport


def test_a_phase_in_which_nobody_asked_is_an_error(loaded: Loaded, tmp_path: Path) -> None:
    server, versions = loaded
    urls = {"http": server.http_url, "grpc": server.grpc_url}
    plan = make_plan(urls, {"tiny": versions["tiny"]}, LoadtestSettings(users=1), tmp_path / "measured.json")
    asked_over_http = {"transport": "http", "model": "tiny", "gave_up": 0, "measured": 9}
    with pytest.raises(ComponentError, match=r"tiny over grpc: no request was sent in its \d"):
        load_run._require_served({"rows": [asked_over_http]}, plan)


def test_gevent_stays_out_of_this_process() -> None:
    code = "import sys, loadtest.run; assert not {'gevent', 'locust'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(load_run.__file__).parents[1])


def test_a_wrong_number_is_a_failure(loaded: Loaded, tmp_path: Path) -> None:
    server, versions = loaded
    spoilt = Path(shutil.copytree(versions["tiny"], tmp_path / "tiny" / "1"))
    arrays = dict(np.load(spoilt / "golden.npz"))
    arrays["probabilities"] = arrays["probabilities"] + np.float32(1e-3)
    np.savez(spoilt / "golden.npz", **arrays)
    settings = LoadtestSettings(users=1, duration_s=0.5, transports=("http",))
    with pytest.raises(ComponentError, match="WrongAnswerError: probabilities are not the golden ones"):
        run_load(server.http_url, server.grpc_url, {"tiny": spoilt}, settings, tmp_path / "out")
    (row,) = json.loads((tmp_path / "out" / "loadtest.json").read_text())["rows"]
    assert row["failures"] == row["requests"] > 0


def test_another_bundle_is_a_failure(loaded: Loaded, tmp_path: Path) -> None:
    server, versions = loaded
    other = Path(shutil.copytree(versions["tiny"], tmp_path / "tiny" / "1"))
    manifest = load_manifest(other)
    assert manifest.export is not None
    seed = manifest.provenance.model_copy(update={"seed": 99})
    changed = manifest.model_copy(update={"provenance": seed})
    ids = {"bundle_digest": changed.digest(), "bundle_id": changed.bundle_id()}
    write_manifest(other, changed.model_copy(update={"export": manifest.export.model_copy(update=ids)}))
    settings = LoadtestSettings(users=1, duration_s=0.5)
    with pytest.raises(ComponentError, match="another model than the pinned one answered"):
        run_load(server.http_url, server.grpc_url, {"tiny": other}, settings, tmp_path / "out")


def test_no_server_is_failures_and_a_clear_error(loaded: Loaded, tmp_path: Path) -> None:
    _, versions = loaded
    gone = f"127.0.0.1:{unused_port()}"
    began = time.monotonic()
    with pytest.raises(ComponentError, match=r"requests failed, mostly TransportError.*is the server up"):
        run_load(gone, gone, versions, LoadtestSettings(users=2, duration_s=1.0), tmp_path / "out")
    assert time.monotonic() - began < 15
    assert "run-time limit reached" not in (tmp_path / "out" / LOG_NAME).read_text()
    for row in json.loads((tmp_path / "out" / "loadtest.json").read_text())["rows"]:
        assert row["failures"] == row["requests"] > 0
        assert row["p50_us"] is None


@pytest.mark.system
def test_a_server_that_dies_ends_the_test_early(tmp_path: Path) -> None:
    versions = publish_both(tmp_path / "models")
    with EmbeddedTriton(tmp_path / "models", ANY_PORTS) as server:
        settings = LoadtestSettings(users=2, duration_s=60.0, transports=("http",))
        one = {"tiny": versions["tiny"]}
        killed = []

        def kill() -> None:
            under_way(server)
            os.kill(server.pid, signal.SIGKILL)
            killed.append(time.monotonic())

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(ComponentError, match=r"tiny over http: .* requests failed"):
            run_load(server.http_url, server.grpc_url, one, settings, tmp_path / "out")
        killer.join()
        assert time.monotonic() - killed[0] < 25
    (row,) = json.loads((tmp_path / "out" / "loadtest.json").read_text())["rows"]
    assert row["measured"] > 0
    assert row["gave_up"] == 2


@pytest.mark.system
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_locust_obeys_a_signal_and_keeps_what_it_measured(loaded: Loaded, tmp_path: Path, signal_number: int) -> None:
    server, versions = loaded
    urls = {"http": server.http_url, "grpc": server.grpc_url}
    plan = make_plan(urls, versions, LoadtestSettings(users=2, duration_s=60.0), tmp_path / "measured.json")
    (tmp_path / "plan.json").write_text(plan.to_json())
    log = (tmp_path / "log").open("wb")
    command = load_run._command(plan, tmp_path / "plan.json")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=load_run._environment(), cwd=tmp_path)
    try:
        under_way(server)
        process.send_signal(signal_number)
        began = time.monotonic()
        code = process.wait(timeout=10)
    finally:
        end(process, load_run.STOP_S)
        log.close()
    assert time.monotonic() - began < 5
    assert code == 0, (tmp_path / "log").read_text()[-2000:]
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert measured["complete"] is False
    assert sum(row["requests"] for row in measured["rows"]) > 0


def test_a_locust_that_cannot_start_says_why(loaded: Loaded, tmp_path: Path) -> None:
    server, versions = loaded
    (tmp_path / "1").mkdir()
    with pytest.raises(ComponentError, match=r"exit code 1.*locust\.log"):
        run_load(server.http_url, server.grpc_url, {"m": tmp_path / "1"}, LoadtestSettings(users=1), tmp_path / "out")
    assert versions

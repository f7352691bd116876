"""What the chart's pods run, run here: the model sync; against a real Triton, the check and the load test.

The arguments and variables are the rendered ones; only addresses and folders are this machine's.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from export.publish import Terms
from serving.embedded import EmbeddedTriton
from tests.export.tiny import NAME as TINY
from tests.export.tiny import publish_seeds
from tests.k8s.chart.rendering import ROOT, Object, container, objects, pods, render, the, values_of
from tests.loadtest.conftest import publish_both
from tests.serving.conftest import ANY_PORTS
from tickserve import signing

pytestmark = pytest.mark.system
MODELS = "model.names={tiny,other}"


class Served(NamedTuple):
    """Where two small models are served, on loopback."""

    repository: Path
    http: str
    grpc: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served") / "models"
    publish_both(folder)
    with EmbeddedTriton(folder, ANY_PORTS) as server:
        yield Served(folder, *(url.rpartition(":")[2] for url in (server.http_url, server.grpc_url)))


def found(component: str, name: str, *values: str | Path) -> Object:
    return next(
        container(pod, name)
        for pod in pods(render(*values, "--set", MODELS))
        if pod.metadata["labels"]["app.kubernetes.io/component"] == component
        and any(each["name"] == name for each in pod.containers)
    )


def here(server: Served, rendered: Object, folder: Path) -> dict[str, str]:
    """The container's environment, with this machine's addresses and folders."""
    said = {item["name"]: item["value"] for item in rendered["env"]}
    ports = {"HTTP_PORT": server.http, "GRPC_PORT": server.grpc}
    kept = {name: os.environ[name] for name in ("PATH", "NUMBA_CACHE_DIR") if name in os.environ}
    folders = {"REPOSITORY": str(server.repository), "PLAN_FOLDER": str(folder), "HOME": str(folder)}
    return {**said, **kept, **ports, **folders, "HOST": "127.0.0.1", "PYTHONPATH": str(ROOT)}


def command(rendered: Object, *more: str) -> list[str]:
    return [sys.executable, *rendered["command"][1:], *rendered["args"], *more]


def check(server: Served, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    rendered = found("test", "test")
    environment = here(server, rendered, folder) | changes
    return subprocess.run(command(rendered), env=environment, capture_output=True, text=True, check=False)


def test_helm_test_scores_a_row_of_each_model(served: Served, tmp_path: Path) -> None:
    done = check(served, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = ["ready", "metadata", "one inference of tiny", "one inference of other", "gRPC port"]
    assert done.stdout.splitlines() == [f"ok     {line}" for line in lines]


def test_helm_test_fails_where_a_model_is_missing_or_nobody_answers(served: Served, tmp_path: Path) -> None:
    missing = check(served, tmp_path, MODELS="tiny never")
    assert missing.returncode == 1
    assert "FAILED one inference of never" in missing.stderr
    assert "ok     one inference of tiny" in missing.stdout
    nobody = check(served, tmp_path, HTTP_PORT="1", GRPC_PORT="1")
    assert nobody.returncode == 1
    assert nobody.stdout == ""


def test_helm_test_asks_for_health_alone_where_http_answers_probes(served: Served, tmp_path: Path) -> None:
    done = check(served, tmp_path, HTTP="probes")
    assert done.stdout.splitlines() == ["ok     ready", "ok     gRPC port"]


def test_a_master_and_its_workers_load_the_server(served: Served, tmp_path: Path) -> None:
    """Locust in three processes, as the two Jobs start it."""
    values = ("--values", values_of("jobs"), "--set", "jobs.loadtest.durationSeconds=4,jobs.loadtest.users=4")
    master, worker = found("loadtest", "locust-master", *values), found("loadtest", "locust-worker", *values)
    at = master["args"].index("--expect-workers")
    assert master["args"][at + 1] == "2"
    worker["args"][worker["args"].index("--master-host") + 1] = "127.0.0.1"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    rows = {
        "master": (master, ["--master-bind-port", port]),
        "one": (worker, ["--master-port", port]),
        "two": (worker, ["--master-port", port]),
    }
    started = {}
    for name, (rendered, more) in rows.items():
        folder = tmp_path / name
        folder.mkdir()
        started[name] = subprocess.Popen(
            command(rendered, *more),
            env=here(served, rendered, folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        said = {name: process.communicate(timeout=120)[0] for name, process in started.items()}
    finally:
        for process in started.values():
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
    codes = {name: process.returncode for name, process in started.items()}
    assert codes == {"master": 0, "one": 0, "two": 0}, said
    aggregated = next(line for line in said["master"].splitlines() if line.strip().startswith("Aggregated")).split()
    assert int(aggregated[1]) > 100, said["master"]
    assert aggregated[2] == "0(0.00%)", "every answer was right"
    measured = [json.loads((tmp_path / name / "measured.json").read_text()) for name in ("one", "two")]
    assert all(each["complete"] and each["rows"] for each in measured)


KEY, FOREIGN = signing.generate_key(), signing.generate_key()


def sync(folder: Path, key: signing.SigningKey) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The init container's command over a repository that KEY signed, with the public half of `key` in the Secret."""
    publish_seeds(folder / "source", 1, 2, terms=Terms(KEY, {KEY.key_id: KEY.public()}))
    (folder / "keys").mkdir()
    (folder / "keys" / "trusted_keys").write_text(f"{key.public_line()}\n")
    (folder / "models").mkdir()
    (pod,) = pods([the(objects("default"), "Deployment")])
    rendered = container(pod, "model-sync")
    places = {"/source": "source", "/models": "models", "/etc/tickserve/keys/trusted_keys": "keys/trusted_keys"}
    line = [str(folder / places[text]) if text in places else text for text in command(rendered)]
    environment = {item["name"]: item["value"] for item in rendered["env"]} | {"HOME": str(folder)}
    environment |= {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False), folder / "models"


def test_the_init_container_brings_what_is_signed(tmp_path: Path) -> None:
    done, models = sync(tmp_path, KEY)
    assert done.returncode == 0, done.stderr
    assert (models / TINY / "2" / "model.onnx").is_file()
    assert not (models / TINY / "1").exists(), "the version in force, and no other"


def test_the_init_container_fails_on_what_another_key_signed(tmp_path: Path) -> None:
    done, models = sync(tmp_path, FOREIGN)
    assert done.returncode == 3
    assert "signature" in done.stderr or "sign" in done.stderr
    assert not (models / TINY).exists(), "the pod does not start, and nothing is there to serve"

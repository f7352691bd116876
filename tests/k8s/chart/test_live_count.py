"""With an autoscaler helm keeps as many pods as there are: helm itself asks, and a small API server answers."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.chart.rendering import CHART, HELM, NEWER_HELM, Object, installed, objects, the, values_of

DEPLOYMENTS = {"name": "deployments", "singularName": "deployment", "namespaced": True, "kind": "Deployment"}
ANSWERS: dict[str, Object] = {
    "/version": {"major": "1", "minor": "31", "gitVersion": "v1.31.0"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
    "/apis/apps/v1": {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": "apps/v1",
        "resources": [DEPLOYMENTS | {"verbs": ["get"]}],
    },
}
LIVE = "/apis/apps/v1/namespaces/scoring/deployments/triton-tickserve"
NOT_FOUND = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}


@contextmanager
def cluster(replicas: int | None) -> Iterator[str]:
    """Where an API server answers that knows one Deployment, or none."""
    known = dict(ANSWERS)
    if replicas is not None:
        metadata = {"name": "triton-tickserve", "namespace": "scoring"}
        spec = {"replicas": replicas}
        known[LIVE] = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = known.get(self.path.partition("?")[0])
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(NOT_FOUND if found is None else found).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def would_install(folder: Path, scenario: str, replicas: int | None, binary: Path) -> Object:
    """The Deployment that `helm install` would apply: a post-renderer takes it, and ends the matter."""
    taken, keeper, releases = folder / "taken.yaml", folder / "keep", folder / "releases.yaml"
    keeper.write_text(f"#!/bin/sh\ncat > {taken}\nexit 1\n")
    keeper.chmod(0o755)
    releases.write_text("[]\n")
    own = {"HOME": str(folder), "HELM_DRIVER": "memory", "HELM_MEMORY_DRIVER_DATA": str(releases), "GOGC": "off"}
    with cluster(replicas) as address:
        told = ["--namespace", "scoring", "--values", str(values_of(scenario)), "--post-renderer", str(keeper)]
        command = [str(installed(binary)), "install", "tickserve", str(CHART), *told, "--kube-apiserver", address]
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=30, check=False)
    assert "post render" in done.stderr, done.stderr
    return the([each for each in yaml.safe_load_all(taken.read_text()) if each], "Deployment")


@pytest.mark.parametrize("binary", [HELM, NEWER_HELM])
@pytest.mark.parametrize(
    ("scenario", "live", "wanted"), [("hpa", 5, 5), ("keda", 5, 5), ("hpa", None, None), ("default", 5, 2)]
)
def test_an_autoscaler_takes_over_as_many_pods_as_there_are(
    tmp_path: Path, scenario: str, live: int | None, wanted: int | None, binary: Path
) -> None:
    """A number that is taken out of the manifest is 1 to the API server."""
    assert would_install(tmp_path, scenario, live, binary)["spec"].get("replicas") == wanted


def test_without_a_cluster_no_number_is_named() -> None:
    assert all("replicas" not in the(objects(each), "Deployment")["spec"] for each in ("hpa", "keda"))

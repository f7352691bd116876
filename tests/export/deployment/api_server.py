"""A stand-in for a Kubernetes API server: it knows a few objects and answers GET. kubectl is the real one.

There is no cluster where these tests run. What is proven with it is how the real kubectl is called and what is made of
its answers, not how a cluster behaves.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PLURALS = {
    "Deployment": "deployments",
    "Service": "services",
    "ServiceAccount": "serviceaccounts",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "NetworkPolicy": "networkpolicies",
}
GROUPS = {"apps/v1": ["Deployment"], "policy/v1": ["PodDisruptionBudget"], "networking.k8s.io/v1": ["NetworkPolicy"]}
CORE = ["Service", "ServiceAccount"]


def _resources(version: str, kinds: Sequence[str]) -> dict[str, Any]:
    listed = [
        {"name": PLURALS[kind], "singularName": "", "namespaced": True, "kind": kind, "verbs": ["get", "list"]}
        for kind in kinds
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": listed}


def _groups() -> dict[str, Any]:
    groups = []
    for version in GROUPS:
        group, _, number = version.partition("/")
        each = {"groupVersion": version, "version": number}
        groups.append({"name": group, "versions": [each], "preferredVersion": each})
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def _answers(objects: Sequence[dict[str, Any]]) -> dict[str, Any]:
    answers: dict[str, Any] = {
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": _groups(),
        "/api/v1": _resources("v1", CORE),
    }
    answers |= {f"/apis/{version}": _resources(version, kinds) for version, kinds in GROUPS.items()}
    for item in objects:
        prefix = "/api/v1" if item["apiVersion"] == "v1" else f"/apis/{item['apiVersion']}"
        metadata = item["metadata"]
        answers[f"{prefix}/namespaces/{metadata['namespace']}/{PLURALS[item['kind']]}/{metadata['name']}"] = item
    return answers


@contextmanager
def cluster(objects: Sequence[dict[str, Any]], folder: Path) -> Iterator[Path]:
    """A kubeconfig in `folder` whose cluster holds `objects`."""
    answers = _answers(objects)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path.partition("?")[0])
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            body = json.dumps(found or missing).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield _kubeconfig(folder / "kubeconfig", server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _kubeconfig(path: Path, port: int) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "users": [{"name": "me", "user": {}}],
        "current-context": "here",
    }
    path.write_text(json.dumps(config))
    return path

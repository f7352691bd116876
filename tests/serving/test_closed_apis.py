"""What a stranger on loopback must not do: load a model of his own (its code would run), unload ours, or read files."""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from serving.embedded import CLOSED_HEADER, GRPC_HEADER_PREFIX, EmbeddedTriton
from serving.golden import check_golden
from tests.serving.conftest import ANY_PORTS, Running

CODE = """
open({mark!r}, "w").write("ran")
class TritonPythonModel:
    def execute(self, requests):
        return []
"""
CONFIG = {
    "name": "evil",
    "backend": "python",
    "max_batch_size": 0,
    "input": [{"name": "a", "data_type": "TYPE_FP32", "dims": [1]}],
    "output": [{"name": "b", "data_type": "TYPE_FP32", "dims": [1]}],
}


def post(running: Running, path: str, body: object = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(running.server.http_url, timeout=20)
    try:
        connection.request("POST", path, json.dumps(body or {}), headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("header", [{}, {CLOSED_HEADER: ""}, {CLOSED_HEADER: "guess"}, {"Origin": "http://a.example"}])
def test_a_load_with_code_is_refused_over_http(running: Running, tmp_path: Path, header: dict[str, str]) -> None:
    mark = tmp_path / "ran"
    code = base64.b64encode(CODE.format(mark=str(mark)).encode()).decode()
    body = {"parameters": {"config": json.dumps(CONFIG), "file:1/model.py": code}}
    status, _ = post(running, "/v2/repository/models/evil/load", body, header)
    assert status == http.HTTPStatus.FORBIDDEN
    assert not mark.exists()


def test_a_load_with_code_is_refused_over_grpc(running: Running, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    files = {"file:1/model.py": CODE.format(mark=str(mark)).encode()}
    with (
        grpcclient.InferenceServerClient(running.server.grpc_url) as client,
        pytest.raises(InferenceServerException, match="restricted"),
    ):
        client.load_model("evil", config=json.dumps(CONFIG), files=files)
    assert not mark.exists()


PATHS = [
    "/v2/repository/models/tiny/unload",
    "/v2/repository/models/tiny/load",
    "/v2/repository/index",
    "/v2/systemsharedmemory/region/a/register",
    "/v2/trace/setting",
    "/v2/logging",
]


@pytest.mark.parametrize("path", PATHS)
def test_whatever_changes_the_server_is_closed_over_http(running: Running, path: str) -> None:
    assert post(running, path)[0] == http.HTTPStatus.FORBIDDEN
    check_golden(running.server.http_url, "tiny", 1, running.tiny.path)


CALLS: dict[str, Callable[[Any], object]] = {
    "unload": lambda client: client.unload_model("tiny"),
    "load": lambda client: client.load_model("tiny"),
    "index": lambda client: client.get_model_repository_index(),
    "shared memory": lambda client: client.register_system_shared_memory("a", "/a", 8),
    "trace": lambda client: client.update_trace_settings(settings={"trace_file": "/tmp/x"}),
    "logging": lambda client: client.update_log_settings(settings={"log_verbose_level": 1}),
}


@pytest.mark.parametrize("call", CALLS)
def test_whatever_changes_the_server_is_closed_over_grpc(running: Running, call: str) -> None:
    with (
        grpcclient.InferenceServerClient(running.server.grpc_url) as client,
        pytest.raises(InferenceServerException, match="restricted"),
    ):
        CALLS[call](client)


def test_the_credential_opens_what_is_closed(running: Running) -> None:
    name, value = running.server.credential
    assert post(running, "/v2/repository/index", headers={name: value})[0] == http.HTTPStatus.OK
    with grpcclient.InferenceServerClient(running.server.grpc_url) as client:
        assert client.get_model_repository_index(headers={GRPC_HEADER_PREFIX + name: value}).models


def test_what_monitoring_and_clients_ask_stays_open(running: Running) -> None:
    with grpcclient.InferenceServerClient(running.server.grpc_url) as client:
        assert client.is_server_ready()
        assert client.get_model_metadata("tiny").versions == ["1"]
        assert client.get_inference_statistics("tiny").model_stats


@pytest.mark.system
def test_each_start_has_a_secret_of_its_own(repository: Path) -> None:
    def secrets_of(server: EmbeddedTriton) -> set[str]:
        arguments = Path(f"/proc/{server.pid}/cmdline").read_text().split("\0")
        return {part.rpartition("=")[2] for part in arguments if CLOSED_HEADER in part}

    seen = []
    for _ in range(2):
        with EmbeddedTriton(repository, ANY_PORTS) as server:
            seen.append(secrets_of(server))
    assert [len(found) for found in seen] == [1, 1]
    assert seen[0] != seen[1]
    assert all(len(secret) >= 32 for found in seen for secret in found)


def test_stop_does_not_wait_for_connections_that_are_kept_open(repository: Path) -> None:
    server = EmbeddedTriton(repository, ANY_PORTS)
    server.start()
    kept = http.client.HTTPConnection(server.http_url, timeout=5)
    kept.request("GET", "/v2/health/ready")
    assert kept.getresponse().read() == b""
    began = time.monotonic()
    server.stop()
    kept.close()
    assert time.monotonic() - began < 5

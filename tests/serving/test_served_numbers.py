"""The embedded server gives research's numbers over every protocol, alone and in dynamic batches."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from export.runtime import open_session
from monitoring.triton_metrics import scrape, signals_counted
from serving.backends.served_version import _session
from serving.embedded import EmbeddedTriton
from serving.golden import check_golden, infer, read_golden
from tests.export.test_triton_config import as_triton_gives_it
from tests.serving.conftest import ANY_PORTS, FEATURES, STUBS, Running, Tiny, publish_tiny
from tests.waiting import settled
from tickserve.client._local import open_session as local_session
from tickserve.errors import GateRefusedError, ServerRejectedError, TransportError
from tickserve.model_config import CONFIG_NAME, MODEL_FILE, SESSION_ENTRIES, read_options


@pytest.fixture(scope="module", params=[ANY_PORTS, STUBS], ids=["native", "python"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Both backends give research's numbers, whatever asks for them."""
    folder = tmp_path_factory.mktemp("numbers")
    tiny, other = (publish_tiny(folder, name, seed) for name, seed in (("tiny", 1), ("other", 2)))
    with EmbeddedTriton(folder, request.param) as server:
        yield Running(server, tiny, other)


def post_json(http_url: str, model: str, data: str, rows: int = 1) -> tuple[int, dict[str, Any]]:
    """`data` goes out as it is written here: what JSON text Triton takes is the question."""
    tensor = f'{{"name":"features","shape":[{rows},{FEATURES}],"datatype":"FP32","data":{data}}}'
    connection = http.client.HTTPConnection(http_url, timeout=10)
    try:
        connection.request("POST", f"/v2/models/{model}/infer", f'{{"inputs":[{tensor}]}}')
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def golden(tiny: Tiny) -> tuple[np.ndarray, np.ndarray]:
    arrays = read_golden(tiny.path, tiny.manifest)
    return arrays["features"], arrays["probabilities"]


def test_golden_pairs_over_binary_http(running: Running) -> None:
    for tiny in (running.tiny, running.other):
        result = check_golden(running.server.http_url, tiny.name, 1, tiny.path)
        assert result["rows"] == 16
        assert float(result["max_abs_diff"]) <= tiny.manifest.tolerance.atol


def test_golden_pairs_of_another_model_are_refused(running: Running) -> None:
    with pytest.raises(GateRefusedError, match="not research's"):
        check_golden(running.server.http_url, "tiny", 1, running.other.path)


def test_golden_of_unknown_model_or_dead_server_is_a_typed_error(running: Running) -> None:
    with pytest.raises(ServerRejectedError, match="unknown model"):
        check_golden(running.server.http_url, "nobody", 1, running.tiny.path)
    with pytest.raises(TransportError):
        check_golden("127.0.0.1:1", "tiny", 1, running.tiny.path)


def test_json(running: Running) -> None:
    rows, expected = golden(running.tiny)
    rows, expected = rows[:3], expected[:3]
    status, answer = post_json(running.server.http_url, "tiny", json.dumps(rows.ravel().tolist()), rows=3)
    assert status == 200
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert np.allclose(np.reshape(outputs["probabilities"]["data"], (-1, 3)), expected, rtol=1e-5, atol=1e-6)
    assert set(outputs["bundle_id"]["data"]) == {running.tiny.manifest.bundle_id()}


@pytest.mark.parametrize("module", [triton_http, triton_grpc], ids=["http", "grpc"])
def test_plain_tritonclient(running: Running, module: Any) -> None:
    rows, expected = golden(running.tiny)
    url = running.server.http_url if module is triton_http else running.server.grpc_url
    tensor = module.InferInput("features", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows)
    with module.InferenceServerClient(url) as client:
        answer = client.infer("tiny", [tensor])
    assert np.allclose(answer.as_numpy("probabilities"), expected, rtol=1e-5, atol=1e-6)
    assert (answer.as_numpy("bundle_id") == running.tiny.manifest.bundle_id()).all()


def test_nan_over_json_is_answered(running: Running) -> None:
    """The bare word NaN is what this build takes for a missing value; not standard JSON, yet Python writes it so."""
    row = np.linspace(-1, 1, FEATURES, dtype=np.float32)
    row[2] = np.nan
    status, answer = post_json(running.server.http_url, "tiny", json.dumps(row.tolist()))
    assert status == 200
    served = next(output["data"] for output in answer["outputs"] if output["name"] == "probabilities")
    assert np.allclose(served, running.tiny.research(row[None])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("word", ["null", '"NaN"', "nan", "true", "1e400"])
def test_other_ways_to_write_a_missing_value_are_refused(running: Running, word: str) -> None:
    data = "[" + ",".join([word] + ["0"] * (FEATURES - 1)) + "]"
    status, answer = post_json(running.server.http_url, "tiny", data)
    assert status in (400, 500)
    assert answer["error"]
    check_golden(running.server.http_url, "tiny", 1, running.tiny.path)


def test_sixteen_threads_share_batches_and_each_gets_its_own_rows(running: Running) -> None:
    def ask(seed: int) -> float:
        tiny = running.tiny if seed % 2 else running.other
        random = np.random.default_rng(seed)
        connection = http.client.HTTPConnection(running.server.http_url, timeout=30)
        worst = 0.0
        try:
            for _ in range(25):
                rows = random.normal(size=(int(random.integers(1, 6)), FEATURES)).astype(np.float32)
                answer = infer(connection, tiny.name, 1, {"features": rows})
                worst = max(worst, float(np.abs(answer["probabilities"] - tiny.research(rows)).max()))
                assert (answer["bundle_id"] == tiny.manifest.bundle_id()).all()
        finally:
            connection.close()
        return worst

    def counted() -> tuple[int, int]:
        both = [scrape(running.server.metrics_url)[name, "1"] for name in ("tiny", "other")]
        return sum(each.requests_ok for each in both), sum(each.executions for each in both)

    before = settled(counted)
    with ThreadPoolExecutor(16) as threads:
        assert max(threads.map(ask, range(16))) < 1e-6
    after = settled(counted, lambda now: now[0] >= before[0] + 16 * 25)
    requests, executions = (now - was for now, was in zip(after, before, strict=True))
    assert requests == 16 * 25
    assert executions < requests, "nothing was batched"


def test_signals_are_rows(running: Running) -> None:
    def counted() -> dict[str, int]:
        return signals_counted(running.server.metrics_url)

    before = settled(counted)
    check_golden(running.server.http_url, "tiny", 1, running.tiny.path)
    after = settled(counted, lambda now: now["tiny"] >= before["tiny"] + 16)
    assert after["tiny"] - before["tiny"] == 16
    assert after["other"] == before["other"]


def test_every_session_of_onnx_runtime_is_told_the_same(running: Running, root: Path) -> None:
    """Few processors show it: without the second entry 8-bit sums are cut off where there is AVX2 and no VNNI."""
    graph = (running.tiny.path / MODEL_FILE).read_bytes()
    options = read_options(as_triton_gives_it((running.tiny.path.parent / CONFIG_NAME).read_text()))
    for session in (open_session(graph), local_session(graph), _session(graph, options, "CPU")):
        told = session.get_session_options()
        assert {key: told.get_session_config_entry(key) for key in SESSION_ENTRIES} == SESSION_ENTRIES
    native = (root / "serving" / "backends" / "native" / "session.c").read_text()
    assert all(f'{{"{key}", "{value}"}}' in native for key, value in SESSION_ENTRIES.items())

"""What an engine sees over JSON, plain tritonclient (gRPC, HTTP) and `tickserve predict`, held against research."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from tests.e2e.conftest import COMMAND, SETS_UP_A_DEMO, DemoRun, Served, environment
from tickserve.manifest import Manifest, bundle_id_of, load_manifest

pytestmark = SETS_UP_A_DEMO


def models(repository: Path) -> list[Path]:
    return sorted(max(path.glob("[0-9]*"), key=lambda n: int(n.name)) for path in repository.iterdir() if path.is_dir())


def golden(version: Path) -> tuple[Manifest, dict[str, np.ndarray], np.ndarray]:
    """Inputs by name: a stateful model has its state beside the row."""
    manifest = load_manifest(version)
    arrays = np.load(version / "golden.npz", allow_pickle=False)
    return manifest, {tensor.name: arrays[tensor.name] for tensor in manifest.inputs}, arrays["probabilities"]


def close(manifest: Manifest, served: np.ndarray, research: np.ndarray) -> bool:
    limit = manifest.tolerance
    return np.allclose(served, research, rtol=limit.rtol, atol=limit.atol)


def post(url: str, body: bytes) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_json_answers_are_researchs_numbers(served: Served) -> None:
    for version in models(served.repository):
        manifest, inputs, research = golden(version)
        rows = inputs[manifest.inputs[0].name]
        finite = np.isfinite(rows.reshape(len(rows), -1)).all(axis=1)
        body = {
            "inputs": [
                {
                    "name": tensor.name,
                    "shape": [int(finite.sum()), *tensor.shape],
                    "datatype": "FP32",
                    "data": inputs[tensor.name][finite].ravel().tolist(),
                }
                for tensor in manifest.inputs
            ]
        }
        status, answer = post(f"http://{served.http}/v2/models/{manifest.name}/infer", json.dumps(body).encode())
        assert status == 200, answer
        outputs = {output["name"]: output for output in answer["outputs"]}
        probabilities = np.array(outputs["probabilities"]["data"]).reshape(-1, 3)
        assert close(manifest, probabilities, research[finite])
        assert manifest.export is not None
        assert set(outputs["bundle_id"]["data"]) == {bundle_id_of(manifest.export.bundle_digest)}


def test_nan_over_json_is_answered_and_not_fatal(served: Served) -> None:
    version = next(path for path in models(served.repository) if path.parent.name.endswith("gbdt"))
    manifest, inputs, research = golden(version)
    rows = inputs["features"]
    url = f"http://{served.http}/v2/models/{manifest.name}/infer"
    data = ", ".join("NaN" for _ in rows[0])
    shape = [1, *manifest.inputs[0].shape]
    body = f'{{"inputs":[{{"name":"features","shape":{shape},"datatype":"FP32","data":[{data}]}}]}}'
    status, answer = post(url, body.encode())
    assert status in (200, 400), answer
    if status == 200:
        values = next(output["data"] for output in answer["outputs"] if output["name"] == "probabilities")
        assert np.isfinite(values).all()
    else:
        assert answer["error"]
    with triton_http.InferenceServerClient(served.http) as client:
        tensor = triton_http.InferInput("features", list(rows.shape), "FP32")
        tensor.set_data_from_numpy(rows)
        assert close(manifest, client.infer(manifest.name, [tensor]).as_numpy("probabilities"), research)


@pytest.mark.parametrize("module", [triton_http, triton_grpc], ids=["http", "grpc"])
def test_plain_tritonclient_gets_researchs_numbers(served: Served, module: Any) -> None:
    url = served.http if module is triton_http else served.grpc
    with module.InferenceServerClient(url) as client:
        for version in models(served.repository):
            manifest, inputs, research = golden(version)
            tensors = [module.InferInput(name, list(array.shape), "FP32") for name, array in inputs.items()]
            for tensor, array in zip(tensors, inputs.values(), strict=True):
                tensor.set_data_from_numpy(array)
            answer = client.infer(manifest.name, tensors)
            assert close(manifest, answer.as_numpy("probabilities"), research)
            assert manifest.export is not None
            assert (answer.as_numpy("bundle_id") == manifest.export.bundle_id).all()


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose client gives a first call on a busy machine its time."""
    path = tmp_path_factory.mktemp("patient") / "patient.toml"
    path.write_text("[client]\ndeadline_ms = 5_000\n")
    return path


def test_predict_command(served: Served, demo_run: DemoRun, patient: Path) -> None:
    for version in models(served.repository):
        name = version.parent.name
        for url in (served.http, f"grpc://{served.grpc}"):
            done = subprocess.run(
                [*COMMAND, "predict", name, "--url", url, "--config", str(patient), "--json"],
                cwd=demo_run.folder,
                env=environment(),
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stderr
            result = json.loads(done.stdout)
            assert result["within_tolerance"] is True
            assert result["bundle_digest"] == load_manifest(version).digest()


def test_predict_refuses_numbers_that_are_not_researchs(
    served: Served, demo_run: DemoRun, patient: Path, tmp_path: Path
) -> None:
    version = models(served.repository)[0]
    copy = tmp_path / "repository" / version.parent.name / version.name
    copy.mkdir(parents=True)
    manifest, inputs, research = golden(version)
    (copy / "manifest.json").write_bytes((version / "manifest.json").read_bytes())
    wrong = np.roll(research, 1, axis=1)
    np.savez(copy / "golden.npz", **inputs, probabilities=wrong, score=wrong[:, :1])
    arguments = ["predict", manifest.name, "--url", served.http, "--repository", tmp_path / "repository"]
    command = [*COMMAND, *map(str, arguments), "--config", str(patient)]
    done = subprocess.run(
        command, cwd=demo_run.folder, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "not research's" in done.stderr


def test_metrics_count_what_was_asked(served: Served) -> None:
    with urllib.request.urlopen(served.metrics, timeout=10) as answer:
        text = answer.read().decode()
    for version in models(served.repository):
        assert f'nv_inference_request_success{{model="{version.parent.name}"' in text

"""The wire contract without a line of ours on the client's side: Node's gRPC stub, curl, and plain tritonclient.

All get the bits that a golden row gets from this server, and those lie within the manifest's tolerance of research.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.grpc import service_pb2

from export.wire_example import write_example
from export.wire_proto import proto_text
from tests.e2e.conftest import SETS_UP_A_DEMO, Served
from tests.e2e.test_wire import close, golden, models
from tickserve import Client
from tickserve.manifest import Manifest

pytestmark = SETS_UP_A_DEMO

Bits = dict[str, str]  # hexadecimal bytes by output
NODE = Path(__file__).resolve().parents[1] / "wire"


@dataclass(frozen=True)
class Asked:
    """Golden inputs of a served model that JSON can carry, and the bits plain tritonclient gets for them over gRPC."""

    manifest: Manifest
    version: Path
    inputs: dict[str, np.ndarray]
    bits: Bits

    @property
    def rows(self) -> int:
        return len(next(iter(self.inputs.values())))


def bits_of(answer: Any, manifest: Manifest) -> Bits:
    return {spec.name: answer.as_numpy(spec.name).tobytes().hex() for spec in manifest.outputs}


def via_tritonclient(module: Any, url: str, manifest: Manifest, inputs: dict[str, np.ndarray]) -> Bits:
    with module.InferenceServerClient(url) as client:
        tensors = [module.InferInput(name, list(array.shape), "FP32") for name, array in inputs.items()]
        for tensor, array in zip(tensors, inputs.values(), strict=True):
            tensor.set_data_from_numpy(array)
        return bits_of(client.infer(manifest.name, tensors), manifest)


@pytest.fixture(scope="module")
def asked(served: Served) -> list[Asked]:
    found = []
    for version in models(served.repository):
        manifest, inputs, research = golden(version)
        rows = inputs[manifest.inputs[0].name]
        finite = np.flatnonzero(np.isfinite(rows.reshape(len(rows), -1)).all(axis=1))[:8]
        inputs = {name: np.ascontiguousarray(array[finite]) for name, array in inputs.items()}
        bits = via_tritonclient(triton_grpc, served.grpc, manifest, inputs)
        served_numbers = np.frombuffer(bytes.fromhex(bits["probabilities"]), np.float32).reshape(-1, 3)
        assert close(manifest, served_numbers, research[finite])
        found.append(Asked(manifest, version, inputs, bits))
    assert len(found) >= 2
    return found


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """What `npm ci --prefix tests/wire` installs; `make test` does so."""
    if not (NODE / "node_modules" / "@grpc" / "grpc-js").is_dir():
        pytest.fail("the Node packages are not installed: npm ci --prefix tests/wire")
    return NODE


def test_tritonclient_over_http_gets_the_same_bits(asked: list[Asked], served: Served) -> None:
    for one in asked:
        assert via_tritonclient(triton_http, served.http, one.manifest, one.inputs) == one.bits


def test_our_client_gets_the_same_bits(asked: list[Asked], served: Served) -> None:
    for url in (served.http, f"grpc://{served.grpc}"):
        with Client(url, manifest=served.repository, deadline_ms=5_000) as client:
            for one in asked:
                signal = client.score(one.manifest.name, one.inputs)
                assert signal.probabilities is not None
                assert signal.score is not None
                assert signal.probabilities.tobytes().hex() == one.bits["probabilities"]
                assert signal.score.tobytes().hex() == one.bits["score"]


def test_node_gets_the_same_bits(asked: list[Asked], served: Served, node_modules: Path, root: Path) -> None:
    for one in asked:
        told = run_node(node_modules, root, served, one, one.inputs, with_json=True)
        assert set(told) == {"grpc", "http_binary", "http_json"}
        for how, answer in told.items():
            assert (answer["model"], answer["version"], answer["id"]) == (one.manifest.name, one.version.name, "node")
            assert {name: output["hex"] for name, output in answer["outputs"].items()} == one.bits, how
            assert answer["outputs"]["probabilities"]["shape"] == [one.rows, 3]


def test_node_sends_nan_as_any_number(asked: list[Asked], served: Served, node_modules: Path, root: Path) -> None:
    one = next(each for each in asked if each.manifest.nan_policy == "native")
    inputs = {name: array.copy() for name, array in one.inputs.items()}
    inputs[one.manifest.inputs[0].name][:, :8] = np.nan
    told = run_node(node_modules, root, served, one, inputs, with_json=False)
    bits = via_tritonclient(triton_grpc, served.grpc, one.manifest, inputs)
    assert bits["probabilities"] != one.bits["probabilities"]
    for answer in told.values():
        assert {name: output["hex"] for name, output in answer["outputs"].items()} == bits


def run_node(
    folder: Path, root: Path, served: Served, one: Asked, inputs: dict[str, np.ndarray], *, with_json: bool
) -> dict[str, Any]:
    tensors = [
        {"name": name, "datatype": "FP32", "shape": list(array.shape), "hex": array.tobytes().hex()}
        for name, array in inputs.items()
    ]
    job = {
        "grpc": served.grpc,
        "http": served.http,
        "proto": str(root / "docs" / "wire" / "open_inference.proto"),
        "model": one.manifest.name,
        "version": one.version.name,
        "inputs": tensors,
        "json": with_json,
    }
    done = subprocess.run(
        ["node", "score.mjs"],
        cwd=folder,
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def curl(url: str, body: Path, *headers: str) -> bytes:
    arguments = [part for header in headers for part in ("-H", header)]
    command = ["curl", "-sS", "--fail-with-body", "-X", "POST", url, *arguments, "--data-binary", f"@{body}"]
    done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_example_request_is_answered_with_the_example_numbers(
    asked: list[Asked], served: Served, tmp_path: Path
) -> None:
    """Curl posts the files as they lie there, binary and JSON; a gRPC channel sends the message's bytes."""
    for one in asked:
        out = tmp_path / one.manifest.name
        told = write_example(one.version, out)
        url = f"http://{served.http}{told['http']['request_line'].split()[1]}"
        headers = [line for line in told["http"]["headers"] if not line.startswith(("Host", "Content-Length"))]
        expected = np.array(told["expected"]["probabilities"]["data"], np.float32)
        reference = first_row(one, told, served)

        body = curl(url, out / "request.bin", *headers)
        end = body.rindex(b"}]}") + 3
        described = json.loads(body[:end])
        binary = split(described["outputs"], body[end:])
        assert described["id"] == "example1"

        answer = json.loads(curl(url, out / "request.json", "Content-Type: application/json"))
        text = {each["name"]: each["data"] for each in answer["outputs"]}

        message = via_channel(
            served.grpc, told["grpc"]["method"], bytes.fromhex((out / "request.grpc.hex").read_text())
        )
        grpc_bits = {o.name: raw.hex() for o, raw in zip(message.outputs, message.raw_output_contents, strict=True)}

        assert binary == grpc_bits == reference
        assert np.array(text["probabilities"], np.float32).tobytes().hex() == binary["probabilities"]
        assert text["bundle_id"] == [told["bundle_id"]]
        got = np.frombuffer(bytes.fromhex(binary["probabilities"]), np.float32)
        assert close(one.manifest, got, expected)
        assert int.from_bytes(bytes.fromhex(binary["bundle_id"]), "little", signed=True) == told["bundle_id"]


def first_row(one: Asked, told: dict[str, Any], served: Served) -> Bits:
    """A row of its own: on some processors a net's last bit hangs on how many rows are scored with it."""
    sent = {tensor["name"]: tensor["bytes_hex"] for tensor in told["inputs"]}
    alone = {name: array[:1] for name, array in one.inputs.items()}
    assert sent == {name: array.tobytes().hex() for name, array in alone.items()}
    return via_tritonclient(triton_grpc, served.grpc, one.manifest, alone)


def split(outputs: list[dict[str, Any]], data: bytes) -> Bits:
    found, at = {}, 0
    for output in outputs:
        size = output["parameters"]["binary_data_size"]
        found[output["name"]] = data[at : at + size].hex()
        at += size
    assert at == len(data)
    return found


def via_channel(address: str, method: str, message: bytes) -> Any:
    import grpc

    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(method, response_deserializer=service_pb2.ModelInferResponse.FromString)
        return call(message, timeout=10)


def test_the_committed_example_is_what_the_script_writes(asked: list[Asked], root: Path, tmp_path: Path) -> None:
    """Its numbers are of another run; its shape, its proto and how it is put together are today's."""
    folder = root / "docs" / "wire"
    gbdt = next(one for one in asked if one.manifest.family == "gbdt")
    write_example(gbdt.version, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    assert (folder / "open_inference.proto").read_text() == proto_text()
    kept, fresh = (json.loads((path / "example.json").read_text()) for path in (folder, tmp_path))
    assert skeleton(kept) == skeleton(fresh)
    request = service_pb2.ModelInferRequest.FromString(bytes.fromhex((folder / "request.grpc.hex").read_text()))
    assert (request.model_name, request.model_version, request.id) == (kept["model"], str(kept["version"]), "example1")
    tensor = bytes.fromhex(kept["inputs"][0]["bytes_hex"])
    assert list(request.raw_input_contents) == [tensor]
    assert (folder / "request.bin").read_bytes().endswith(b"}]}" + tensor)
    values = json.loads((folder / "request.json").read_text())["inputs"][0]["data"]
    assert np.array(values, np.float32).tobytes() == tensor
    sizes = {line.partition(": ")[0]: line.partition(": ")[2] for line in kept["http"]["headers"]}
    assert int(sizes["Content-Length"]) == len((folder / "request.bin").read_bytes())
    assert int(sizes["Inference-Header-Content-Length"]) == int(sizes["Content-Length"]) - len(tensor)


def skeleton(value: Any) -> Any:
    """The keys, and the kind of what is under them."""
    if isinstance(value, dict):
        return {key: skeleton(each) for key, each in value.items()}
    if isinstance(value, list):
        return [skeleton(value[0])] if value else []
    return type(value).__name__


def test_the_page_shows_the_example_that_lies_beside_it(root: Path) -> None:
    page = (root / "docs" / "wire.md").read_text()
    kept = json.loads((root / "docs" / "wire" / "example.json").read_text())
    header = (root / "docs" / "wire" / "request.bin").read_bytes().split(b"}]}")[0].decode() + "}]}"
    for shown in (kept["http"]["request_line"], header, str(kept["bundle_id"]), kept["bundle_digest"]):
        assert shown in page
    for name in re.findall(r"\]\(wire/([\w.]+)\)", page):
        assert (root / "docs" / "wire" / name).is_file()

"""One request and its answer, byte for byte, for whoever writes a client in another language.

    python -m export.wire_example --repository model_repository --model simulated-l5-gbdt --out docs/wire

It is a golden row of a published model: the numbers beside it are research's, so a client that gets them is right.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.wire_proto import proto_text
from tickserve.client import InferRequest, Tensor
from tickserve.client._http import encode
from tickserve.errors import TickserveError, UsageError
from tickserve.golden import read_golden
from tickserve.manifest import GOLDEN_NAME, Manifest, load_manifest
from tickserve.pipeline import newest_version
from tickserve.store import write_atomic

REQUEST_ID = "example1"
TIMEOUT_US = 100_000
PROTO = "open_inference.proto"
HOST = "127.0.0.1:8000"


def write_example(version: Path, out: Path) -> dict[str, Any]:
    """Write the files of docs/wire.md for a published `version` into `out`; returns what example.json says.

    Raises ArtifactError for a version that cannot be trusted and UsageError for one without a golden row of numbers.
    """
    manifest = load_manifest(version)
    golden = read_golden(version / GOLDEN_NAME, manifest.inputs, manifest.outputs)
    row = _first_finite([golden[spec.name] for spec in manifest.inputs], manifest.name)
    tensors = tuple(
        Tensor(spec.name, spec.dtype, (1, *spec.shape), golden[spec.name][row : row + 1].tobytes())
        for spec in manifest.inputs
    )
    request = InferRequest(manifest.name, int(version.name), REQUEST_ID, TIMEOUT_US, tensors)
    head, payload = encode(request, HOST)
    headers, _, text = head.partition(b"\r\n\r\n")
    expected = {spec.name: golden[spec.name][row : row + 1] for spec in manifest.outputs if spec.name in golden}
    told = _describe(request, headers.decode().split("\r\n"), manifest, expected)
    write_atomic(out / "request.bin", text + payload)
    write_atomic(out / "request.json", _json(_as_json(request)))
    write_atomic(out / "request.grpc.hex", grpc_request(request).hex().encode() + b"\n")
    write_atomic(out / "example.json", _json(told))
    write_atomic(out / PROTO, proto_text().encode())
    return told


def grpc_request(request: InferRequest) -> bytes:
    """The serialized ModelInferRequest, tensors as raw contents."""
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferRequest(
        model_name=request.model, model_version=str(request.version), id=request.request_id
    )
    message.parameters["timeout"].int64_param = request.timeout_us
    for tensor in request.tensors:
        message.inputs.add(name=tensor.name, datatype=tensor.dtype, shape=tensor.shape)
        message.raw_input_contents.append(tensor.data)
    serialized: bytes = message.SerializeToString(deterministic=True)
    return serialized


def _first_finite(inputs: Sequence[npt.NDArray[Any]], model: str) -> int:
    """JSON has no NaN that every client can write, so the example has none."""
    whole = np.all([np.isfinite(array.reshape(len(array), -1)).all(axis=1) for array in inputs], axis=0)
    rows = np.flatnonzero(whole)
    if not len(rows):
        raise UsageError("every golden row holds a NaN", field="model", expected="a row of numbers", was=model)
    return int(rows[0])


def _describe(
    request: InferRequest, head: list[str], manifest: Manifest, expected: dict[str, npt.NDArray[Any]]
) -> dict[str, Any]:
    return {
        "model": request.model,
        "version": request.version,
        "bundle_digest": manifest.digest(),
        "bundle_id": manifest.bundle_id(),
        "classes": list(manifest.classes),
        "tolerance": manifest.tolerance.model_dump(),
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes_hex": tensor.data.hex(),
            }
            for tensor in request.tensors
        ],
        "expected": {
            name: {"shape": list(array.shape), "data": array.ravel().tolist(), "bytes_hex": array.tobytes().hex()}
            for name, array in expected.items()
        },
        "http": {"request_line": head[0], "headers": head[1:], "body": "request.bin"},
        "http_json": {"request_line": head[0], "headers": ["Content-Type: application/json"], "body": "request.json"},
        "grpc": {"method": "/inference.GRPCInferenceService/ModelInfer", "message": "request.grpc.hex", "proto": PROTO},
    }


def _as_json(request: InferRequest) -> dict[str, Any]:
    """The request with its numbers as text: every float32 has a decimal that reads back as the same bits."""
    inputs = [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "datatype": tensor.dtype,
            "data": np.frombuffer(tensor.data, np.float32).tolist(),
        }
        for tensor in request.tensors
    ]
    return {"id": request.request_id, "inputs": inputs}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def main(arguments: Sequence[str]) -> int:
    """The command of this page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/wire"))
    chosen = parser.parse_args(arguments)
    told = write_example(newest_version(chosen.repository, chosen.model), chosen.out)
    sys.stdout.write(
        f"{told['model']} version {told['version']}: {chosen.out}/example.json, request.bin, {PROTO} ...\n"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TickserveError as error:
        sys.exit(f"error: {error}")

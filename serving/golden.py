"""The golden pairs, asked of a running server over its binary HTTP protocol: does it give research's numbers?

One connection, the standard library, no retry: this is the readiness check, so it shares nothing with the client that
it vouches for. Letters: G golden rows.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tickserve import golden
from tickserve.errors import GateRefusedError, ProtocolError, ServerRejectedError, TransportError
from tickserve.manifest import GOLDEN_NAME, Manifest, load_manifest
from tickserve.model_config import served_rows

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
HEADER_LENGTH = "Inference-Header-Content-Length"


def check_golden(
    http_url: str,
    model: str,
    version: int,
    version_dir: Path,
    *,
    timeout_s: float = 30.0,
    headers: Mapping[str, str] | None = None,
    most_rows: int | None = None,
) -> dict[str, float | int | str]:
    """Score the golden rows of `version_dir` on the server at `http_url` ("host:port"), sending `headers` along.

    A request has at most `most_rows`, without it what the configuration beside the version serves.

    Returns the largest absolute difference from research and the rows compared. Raises GateRefusedError when a number
    lies outside the manifest's tolerance or the bundle_id is another's, ServerRejectedError, TransportError and
    ProtocolError when there is no answer to compare, ArtifactError when the golden pairs cannot be read.
    """
    manifest = load_manifest(version_dir)
    pairs = read_golden(version_dir, manifest)
    rows = len(pairs[manifest.inputs[0].name])
    limit = most_rows or served_rows(version_dir, manifest) or rows
    worst = 0.0
    connection = http.client.HTTPConnection(http_url, timeout=timeout_s)
    try:
        for start in range(0, rows, limit):
            part = {name: values[start : start + limit] for name, values in pairs.items()}
            inputs = {tensor.name: part[tensor.name] for tensor in manifest.inputs}
            answer = infer(connection, model, version, inputs, headers)
            worst = max(worst, _compare(manifest, part, answer))
    finally:
        connection.close()
    return {"model": model, "version": version, "rows": rows, "max_abs_diff": worst}


def read_golden(version_dir: Path, manifest: Manifest) -> Arrays:
    """The arrays of golden.npz: inputs [G, ...] and research's outputs. Raises ArtifactError."""
    return golden.read_golden(version_dir / GOLDEN_NAME, manifest.inputs, manifest.outputs)


def infer(
    connection: http.client.HTTPConnection,
    model: str,
    version: int,
    inputs: Mapping[str, Array],
    headers: Mapping[str, str] | None = None,
) -> dict[str, Array]:
    """One binary HTTP request: inputs [B, ...] by name to outputs [B, ...] by name."""
    head, payload = _encode(inputs)
    sent = {HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream", **(headers or {})}
    try:
        connection.request("POST", f"/v2/models/{model}/versions/{version}/infer", head + payload, sent)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise TransportError(f"no answer: {error or type(error).__name__}", model=model) from error
    if response.status != http.HTTPStatus.OK:
        reason = body[:300].decode("utf-8", "replace")
        raise ServerRejectedError(f"HTTP {response.status}: {reason}", model=model)
    try:
        return _decode(body, int(response.getheader(HEADER_LENGTH, str(len(body)))))
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"cannot read the answer: {error}", model=model) from error


def _encode(inputs: Mapping[str, Array]) -> tuple[bytes, bytes]:
    blobs = {name: np.ascontiguousarray(array).tobytes() for name, array in inputs.items()}
    tensors = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": "INT64" if array.dtype == np.int64 else "FP32",
            "parameters": {"binary_data_size": len(blobs[name])},
        }
        for name, array in inputs.items()
    ]
    head = {"inputs": tensors, "parameters": {"binary_data_output": True}}
    return json.dumps(head).encode(), b"".join(blobs.values())


def _decode(body: bytes, header_length: int) -> dict[str, Array]:
    outputs, offset = {}, header_length
    for tensor in json.loads(body[:header_length])["outputs"]:
        size = tensor["parameters"]["binary_data_size"]
        flat: Array = np.frombuffer(body[offset : offset + size], golden.DTYPES[tensor["datatype"]])
        outputs[tensor["name"]] = flat.reshape(tensor["shape"])
        offset += size
    return outputs


def _compare(manifest: Manifest, part: Arrays, answer: Arrays) -> float:
    tolerance, bundle_id = manifest.tolerance, manifest.bundle_id()
    try:
        return golden.compare(part, answer, manifest.outputs, tolerance=tolerance, bundle_id=bundle_id)
    except GateRefusedError as error:
        raise GateRefusedError(f"model {manifest.name!r}: {error}") from error

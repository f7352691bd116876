"""Stateful models in the manifest: a consistent state or none, and no older digest moves."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tickserve.errors import ArtifactError
from tickserve.features.spec import default_bars_spec
from tickserve.manifest import parse_manifest
from tickserve.testing import make_manifest

# A manifest as the version before state and stream wrote it, and its digest then.
EARLIER = """{"architecture": {"stride": 2}, "classes": ["down", "flat", "up"], "family": "gbdt", "features": {
"columns":
["a", "b"], "digest": "sha256:00", "maximum": [1.0, 1.0], "minimum": [0.0, 0.0], "spec": "s"}, "files": {"model.ubj":
"sha256:11"}, "gates": [], "horizon": {"threshold": 0.0, "unit": "ms", "value": 1000}, "inputs": [{"dtype": "FP32",
"name": "features", "shape": [2]}], "metrics": {}, "model_file": "model.ubj", "name": "old", "nan_policy": "native",
"outputs": [{"dtype": "FP32", "name": "probabilities", "shape": [3]}, {"dtype": "FP32", "name": "score", "shape": [1]},
{"dtype": "INT64", "name": "bundle_id", "shape": [1]}], "parents": [], "precision": "fp32", "provenance": {"created":
"2024-01-01T00:00:00Z", "seed": 7}, "schema_version": 1, "task": "direction", "tolerance": {"atol": 1e-06,
"rtol": 1e-05}}"""


def test_a_manifest_from_before_keeps_its_digest() -> None:
    from hashlib import sha256

    canonical = json.dumps(json.loads(EARLIER), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    manifest = parse_manifest(EARLIER)
    assert manifest.digest() == "sha256:" + sha256(canonical).hexdigest()
    assert (manifest.state, manifest.stream) == (None, None)
    assert "state" not in manifest.stored()
    assert "stream" not in manifest.stored()


def stateful(**changes: Any) -> dict[str, Any]:
    return make_manifest(state=(1, 4), spec=default_bars_spec()).stored() | changes


def test_a_stateful_manifest_reads_back() -> None:
    manifest = parse_manifest(json.dumps(stateful()))
    assert manifest.state is not None
    assert [tensor.name for tensor in manifest.inputs] == ["features", "hidden"]
    assert manifest.outputs[-1].name == "hidden_out"
    assert manifest.state.session_gap_ns == default_bars_spec().session_gap_ns
    assert manifest.stream is not None
    assert manifest.stream.jump_factor == 1.5


def tensor(**changes: Any) -> dict[str, Any]:
    return {"input": "hidden", "output": "hidden_out", "shape": [1, 4]} | changes


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"inputs": stateful()["inputs"][:1]}, "inputs"),
        ({"inputs": stateful()["inputs"][::-1]}, "inputs"),
        ({"outputs": stateful()["outputs"][:3]}, "outputs"),
        ({"state": stateful()["state"] | {"tensors": []}}, r"state\.tensors"),
        ({"state": stateful()["state"] | {"tensors": [tensor(output="score")]}}, r"state\.tensors"),
        ({"state": stateful()["state"] | {"tensors": [tensor(), tensor()]}}, r"state\.tensors"),
        ({"state": stateful()["state"] | {"tensors": [tensor(shape=[1, 0])]}}, r"state\.tensors"),
        ({"state": stateful()["state"] | {"tensors": [tensor(shape=[1, 5])]}}, "inputs"),
        ({"state": stateful()["state"] | {"session_gap_ns": 0}}, r"state\.session_gap_ns"),
        ({"state": stateful()["state"] | {"initial": "ones"}}, r"state\.initial"),
        ({"state": None}, "inputs"),
        ({"stream": stateful()["stream"] | {"stride": 0}}, r"stream\.stride"),
    ],
)
def test_a_state_that_contradicts_its_tensors_is_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ArtifactError, match=field):
        parse_manifest(json.dumps(stateful(**change)))

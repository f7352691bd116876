"""The smallest model that publishes: probabilities = softmax(x W), without training and without its gates."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from export import versions
from export.onnx_graph import serve_graph
from export.publish import NO_TERMS, Release, Terms, publish
from tickserve.config import ExportSettings
from tickserve.manifest import (
    OUTPUTS,
    ExportRecord,
    FeatureContract,
    Horizon,
    Manifest,
    Provenance,
    TensorSpec,
    Tolerance,
)
from tickserve.store import sha256_bytes

FEATURES = 4
NAME = "tiny"
SETTINGS = ExportSettings(max_batch=16, preferred_batch_rows=(4, 8))


def manifest_of(name: str, seed: int, **changes: Any) -> Manifest:
    columns = tuple(f"f{index}" for index in range(FEATURES))
    fields: dict[str, Any] = {
        "name": name,
        "family": "gbdt",
        "horizon": Horizon(unit="ms", value=1_000, threshold=0.0),
        "model_file": "model.ubj",
        "inputs": (TensorSpec(name="features", dtype="FP32", shape=(FEATURES,)),),
        "outputs": OUTPUTS,
        "nan_policy": "native",
        "features": FeatureContract(
            spec="tiny",
            digest=sha256_bytes(b"tiny"),
            columns=columns,
            minimum=(-4.0,) * FEATURES,
            maximum=(4.0,) * FEATURES,
        ),
        "tolerance": Tolerance(atol=1e-6, rtol=1e-5),
        "metrics": {"accuracy": 0.5 + seed / 100},
        "files": {"model.ubj": sha256_bytes(str(seed).encode())},
        "provenance": Provenance(created="2026-01-01T00:00:00Z", seed=seed, simulated=True),
    }
    return Manifest(**(fields | changes))


def release(seed: int, name: str = NAME, max_batch: int = SETTINGS.max_batch, **changes: Any) -> Release:
    """A release as the export job makes one; each seed another model."""
    random = np.random.default_rng(seed)
    weights = random.normal(size=(FEATURES, 3)).astype(np.float32)
    rows = random.normal(size=(16, FEATURES)).astype(np.float32)
    manifest = manifest_of(name, seed, **changes)
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["features", "weights"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "tiny",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weights, "weights")],
    )
    imports = [helper.make_opsetid("", versions.OPSET)]
    model = helper.make_model(body, opset_imports=imports, ir_version=versions.IR_VERSION)
    served = serve_graph(model, manifest.bundle_id(), input_name="features", bundle_digest=manifest.digest())
    graph, golden = served.SerializeToString(deterministic=True), _golden(rows, weights)
    record = ExportRecord(
        bundle_digest=manifest.digest(),
        bundle_id=manifest.bundle_id(),
        onnx_sha256=sha256_bytes(graph),
        golden_sha256=sha256_bytes(golden),
        opset=versions.OPSET,
        ir_version=versions.IR_VERSION,
        gates=(),
        max_batch=max_batch,
    )
    return Release(manifest.model_copy(update={"export": record}), graph, golden)


def _golden(rows: np.ndarray, weights: np.ndarray) -> bytes:
    logits = rows.astype(np.float64) @ weights
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    buffer = io.BytesIO()
    np.savez(buffer, features=rows, probabilities=probabilities, score=probabilities[:, 2:] - probabilities[:, :1])
    return buffer.getvalue()


def publish_seeds(repository: Path, *seeds: int, name: str = NAME, terms: Terms = NO_TERMS) -> list[Path]:
    """Publish one version for each seed, in order, and give their folders."""
    return [publish(release(seed, name), repository, SETTINGS, terms)[1] for seed in seeds]

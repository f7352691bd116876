"""Tiny models published as the real ones are, and one embedded server over them for the whole session."""

from __future__ import annotations

import io
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tritonclient.grpc import model_config_pb2 as schema

from export import versions
from export.onnx_graph import serve_graph
from export.publish import Release, Terms, publish
from serving.embedded import EmbeddedTriton
from serving.supervisor import METRIC
from tickserve.config import ExportSettings, ServeSettings
from tickserve.manifest import (
    ExportRecord,
    FeatureContract,
    Horizon,
    Manifest,
    Provenance,
    TensorSpec,
    Tolerance,
)
from tickserve.reference import reference_of
from tickserve.store import sha256_bytes

FEATURES = 8
GOLDEN_ROWS = 16
ANY_PORTS = ServeSettings(http_port=0, grpc_port=0, metrics_port=0)
# A process scores each model: for what is about those processes, or needs a backend that is spoilt on purpose.
STUBS = ANY_PORTS.model_copy(update={"backend": "python"})
BACKENDS = pytest.mark.parametrize("settings", [ANY_PORTS, STUBS], ids=["native", "python"])


def pending(server: EmbeddedTriton, model: str) -> float:
    """How many requests for the model Triton says are waiting."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        found = METRIC.findall(answer.read().decode())
    return sum(float(value) for kind, name, _, value in found if (kind, name) == ("pending_request_count", model))


@dataclass(frozen=True)
class Tiny:
    """One published model: `probabilities = softmax(x W)` with NaN read as 0, as numpy computes it too."""

    name: str
    weights: np.ndarray
    path: Path
    manifest: Manifest

    def research(self, rows: np.ndarray) -> np.ndarray:
        logits = np.nan_to_num(rows.astype(np.float64)) @ self.weights
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


# Adds nothing to the number, yet fails at run time for a row whose first feature is no index of its table.
FRAGILE = (
    helper.make_node("Gather", ["features", "first"], ["column"], axis=1),
    helper.make_node("Cast", ["column"], ["index"], to=TensorProto.INT64),
    helper.make_node("Gather", ["table", "index"], ["nothing"]),
    helper.make_node("Add", ["product", "nothing"], ["logits"]),
)
FRAGILE_TABLE = (
    numpy_helper.from_array(np.zeros(1, np.int64), "first"),
    numpy_helper.from_array(np.zeros(4, np.float32), "table"),
)


def graph(weights: np.ndarray, *, fragile: bool = False) -> ModelProto:
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    nodes = [
        helper.make_node("IsNaN", ["features"], ["missing"]),
        helper.make_node("Where", ["missing", "zero", "features"], ["filled"]),
        helper.make_node("MatMul", ["filled", "weights"], ["product" if fragile else "logits"]),
        *(FRAGILE if fragile else ()),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    body = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", len(weights)])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])],
        [
            zero,
            numpy_helper.from_array(weights.astype(np.float32), "weights"),
            *(FRAGILE_TABLE if fragile else ()),
        ],
    )
    imports = [helper.make_opsetid("", versions.OPSET)]
    return helper.make_model(body, opset_imports=imports, ir_version=versions.IR_VERSION)


def manifest_of(name: str, seed: int, features: int = FEATURES) -> Manifest:
    contract = FeatureContract(
        spec="tiny",
        digest=sha256_bytes(b"tiny"),
        columns=tuple(f"f{i}" for i in range(features)),
        minimum=(-4.0,) * features,
        maximum=(4.0,) * features,
    )
    return Manifest(
        name=name,
        family="gbdt",
        horizon=Horizon(unit="ms", value=1_000, threshold=0.0),
        model_file="model.ubj",
        inputs=(TensorSpec(name="features", dtype="FP32", shape=(features,)),),
        outputs=(
            TensorSpec(name="probabilities", dtype="FP32", shape=(3,)),
            TensorSpec(name="score", dtype="FP32", shape=(1,)),
            TensorSpec(name="bundle_id", dtype="INT64", shape=(1,)),
        ),
        nan_policy="native",
        features=contract,
        tolerance=Tolerance(atol=1e-6, rtol=1e-5),
        files={"model.ubj": sha256_bytes(str(seed).encode())},
        provenance=Provenance(created="2026-01-01T00:00:00Z", seed=seed, simulated=True),
    )


def golden_bytes(rows: np.ndarray, probabilities: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    probabilities = probabilities.astype(np.float32)
    np.savez(buffer, features=rows, probabilities=probabilities, score=probabilities[:, 2:] - probabilities[:, :1])
    return buffer.getvalue()


def edit_config(model: Path, change: Callable[[Any], object]) -> None:
    """Change config.pbtxt as a person might, after it was published."""
    config = text_format.Parse((model / "config.pbtxt").read_text(), schema.ModelConfig())
    change(config)
    (model / "config.pbtxt").write_text(text_format.MessageToString(config))


def publish_tiny(
    repository: Path,
    name: str,
    seed: int,
    settings: ExportSettings | None = None,
    *,
    fragile: bool = False,
    activate: bool = True,
    reference: bool = False,
) -> Tiny:
    settings = settings or ExportSettings(max_batch=64, preferred_batch_rows=(8, 32))
    random = np.random.default_rng(seed)
    weights = random.normal(size=(FEATURES, 3)).astype(np.float32)
    manifest = manifest_of(name, seed)
    rows = random.normal(size=(GOLDEN_ROWS, FEATURES)).astype(np.float32)
    rows[:, 0] = 1
    if reference:
        manifest = manifest.model_copy(
            update={"reference": reference_of(random.normal(size=(4_000, FEATURES)).astype(np.float32))}
        )
    rows[3, 2] = np.nan
    model = graph(weights, fragile=fragile)
    served = serve_graph(model, manifest.bundle_id(), input_name="features", bundle_digest=manifest.digest())
    onnx_bytes = served.SerializeToString()
    tiny = Tiny(name, weights, repository, manifest)
    golden = golden_bytes(rows, tiny.research(rows))
    record = ExportRecord(
        bundle_digest=manifest.digest(),
        bundle_id=manifest.bundle_id(),
        onnx_sha256=sha256_bytes(onnx_bytes),
        golden_sha256=sha256_bytes(golden),
        opset=versions.OPSET,
        ir_version=versions.IR_VERSION,
        gates=(),
        max_batch=settings.max_batch,
    )
    published = manifest.model_copy(update={"export": record})
    _, path = publish(Release(published, onnx_bytes, golden), repository, settings, Terms(activate=activate))
    # With any queue policy this build's batcher may sleep half a second over a waiting request, so these
    # tests, which are not about queues, serve without one.
    edit_config(repository / name, lambda config: config.dynamic_batching.ClearField("default_queue_policy"))
    return Tiny(name, weights, path, published)


@dataclass(frozen=True)
class Running:
    """The shared server and the models it serves."""

    server: EmbeddedTriton
    tiny: Tiny
    other: Tiny


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    tiny = publish_tiny(folder / "models", "tiny", 1)
    other = publish_tiny(folder / "models", "other", 2)
    with EmbeddedTriton(folder / "models", ANY_PORTS, log=folder / "triton.log") as server:
        yield Running(server, tiny, other)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of its own with one model, for a test to break."""
    publish_tiny(tmp_path / "models", "tiny", 1)
    return tmp_path / "models"

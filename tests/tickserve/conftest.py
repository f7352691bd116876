"""A small model made by hand, its manifest, and the real Triton serving it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tickserve.current import write_current
from tickserve.manifest import (
    ExportRecord,
    FeatureContract,
    Horizon,
    Manifest,
    Provenance,
    TensorSpec,
    Tolerance,
    write_manifest,
)
from tickserve.metrics import MetricsExporter
from tickserve.store import sha256_bytes, sha256_file

FEATURES = 4
MAX_BATCH = 8
COLUMNS = ("spread", "imbalance", "flow", "volatility")
WEIGHTS = np.array([[0.5, -0.2, 0.1], [-0.3, 0.4, 0.9], [0.2, 0.2, -0.7], [0.1, -0.6, 0.3]], np.float32)

MakeManifest = Callable[..., Manifest]


def tensor(name: str, *shape: int, dtype: Any = "FP32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def build_manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "name": "hand-l1-gbdt",
        "family": "gbdt",
        "horizon": Horizon(unit="ms", value=1_000, threshold=1e-5),
        "model_file": "model.ubj",
        "inputs": (tensor("features", FEATURES),),
        "outputs": (tensor("probabilities", 3), tensor("score", 1), tensor("bundle_id", 1, dtype="INT64")),
        "nan_policy": "native",
        "features": FeatureContract(
            spec="hand",
            digest=sha256_bytes(b"hand"),
            columns=COLUMNS,
            minimum=(-5.0,) * FEATURES,
            maximum=(5.0,) * FEATURES,
        ),
        "tolerance": Tolerance(atol=1e-6, rtol=1e-5),
        "files": {"model.ubj": sha256_bytes(b"model")},
        "provenance": Provenance(created="2024-01-01T00:00:00Z", seed=7),
    }
    return Manifest(**(fields | changes))


def exported(manifest: Manifest, *, max_batch: int = MAX_BATCH, onnx: str = "", golden: str = "") -> Manifest:
    record = ExportRecord(
        bundle_digest=manifest.digest(),
        bundle_id=manifest.bundle_id(),
        onnx_sha256=onnx or sha256_bytes(b"onnx"),
        golden_sha256=golden or sha256_bytes(b"golden"),
        opset=17,
        ir_version=8,
        gates=(),
        max_batch=max_batch,
    )
    return manifest.model_copy(update={"export": record})


@pytest.fixture(scope="session")
def make_manifest() -> MakeManifest:
    """Makes the manifest of the hand-made model, as export would leave it, with other fields where given."""
    return lambda **changes: exported(build_manifest(**changes))


@pytest.fixture
def rows() -> np.ndarray:
    """Two good rows: float32 [2, 4]."""
    return np.array([[0.1, -0.2, 0.3, 1.5], [1.0, 2.0, -3.0, 0.0]], np.float32)


def research(rows: np.ndarray) -> np.ndarray:
    """The hand-made model in numpy: NaN counts as 0. float32 [B, 3]."""
    logits = np.nan_to_num(rows.astype(np.float64)) @ WEIGHTS
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def graph() -> Any:
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("IsNaN", ["x"], ["unknown"]),
        helper.make_node("Where", ["unknown", "zero", "x"], ["known"]),
        helper.make_node("MatMul", ["known", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["p"], axis=1),
    ]
    constants = [numpy_helper.from_array(np.zeros(1, np.float32), "zero"), numpy_helper.from_array(WEIGHTS, "weights")]
    shapes = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in (("x", 4), ("p", 3))
    ]
    drawn = helper.make_graph(nodes, "hand", shapes[:1], shapes[1:], constants)
    return helper.make_model(drawn, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def publish(repository: Path, manifest: Manifest) -> Path:
    """A version directory as export writes it, for a model that training did not make."""
    from export.onnx_graph import serve_graph
    from export.triton_config import build_config
    from tickserve.config import ExportSettings

    folder = repository / manifest.name / "1"
    folder.mkdir(parents=True)
    served = serve_graph(graph(), manifest.bundle_id(), input_name="features", bundle_digest=manifest.digest())
    (folder / "model.onnx").write_bytes(served.SerializeToString())
    inputs = np.linspace(-2, 2, 16 * FEATURES, dtype=np.float32).reshape(16, FEATURES)
    inputs[3, 2] = np.nan
    expected = research(inputs)
    score = expected[:, 2:] - expected[:, :1]
    np.savez(folder / "golden.npz", features=inputs, probabilities=expected, score=score)
    digests = {"onnx": sha256_file(folder / "model.onnx"), "golden": sha256_file(folder / "golden.npz")}
    manifest = exported(manifest, **digests)
    write_manifest(folder, manifest)
    settings = ExportSettings(max_batch=MAX_BATCH, preferred_batch_rows=(4, 8))
    text = build_config(manifest, settings, {1: sha256_file(folder / "manifest.json")})
    (folder.parent / "config.pbtxt").write_text(text)
    return folder


@dataclass(frozen=True)
class Triton:
    """The real server over the hand-made model."""

    http: str
    grpc: str
    pid: int
    folder: Path

    @property
    def repository(self) -> Path:
        return self.folder.parent.parent

    @property
    def urls(self) -> tuple[str, str]:
        return self.http, f"grpc://{self.grpc}"


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    from serving.embedded import EmbeddedTriton
    from tickserve.config import ServeSettings

    folder = publish(tmp_path_factory.mktemp("served") / "model_repository", build_manifest())
    ports = ServeSettings(http_port=0, grpc_port=0, metrics_port=0)
    with EmbeddedTriton(folder.parent.parent, ports) as server:
        yield Triton(server.http_url, server.grpc_url, server.pid, folder)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository folder with the hand-made model, to score in this process."""
    return publish(tmp_path_factory.mktemp("journal") / "model_repository", build_manifest()).parent.parent


@pytest.fixture
def repository(tmp_path: Path, make_manifest: MakeManifest) -> Path:
    """Two versions of one model that nobody serves, the first in force."""
    manifest = make_manifest()
    for version in (1, 2):
        folder = tmp_path / "repository" / manifest.name / str(version)
        folder.mkdir(parents=True)
        provenance = manifest.provenance.model_copy(update={"seed": version})
        write_manifest(folder, manifest.model_copy(update={"provenance": provenance, "export": None}))
    write_current(tmp_path / "repository" / manifest.name, 1)
    return tmp_path / "repository"


@pytest.fixture
def metrics() -> Iterator[MetricsExporter]:
    with MetricsExporter(port=0) as exporter:
        yield exporter

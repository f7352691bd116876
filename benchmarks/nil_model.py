"""A model that does next to nothing: whatever a call to it costs is the way there and back.

`p = softmax([0, 0, x])` of the first number of its input. The smallest takes 4 bytes; the largest takes 1 MB, as a
window of 4096 steps of 64 columns.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.onnx_graph import serve_graph
from export.triton_config import build_config
from tickserve.config import ExportSettings
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
from tickserve.store import sha256_bytes, sha256_file

SHAPES = {"4 B": (1,), "64 KB": (256, 64), "1 MB": (4096, 64)}
MAX_BATCH = 16
WIDTH = 512
GOLDEN_ROWS = 4


def name_of(size: str) -> str:
    """The model's name for one of `SHAPES`."""
    return f"nil-{size.replace(' ', '').lower()}"


def example(size: str, rows: int = 1) -> npt.NDArray[np.float32]:
    """Input rows: float32 [rows, *shape]."""
    return np.random.default_rng(7).standard_normal((rows, *SHAPES[size])).astype(np.float32)


def research(inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The model in numpy: float32 [B, 3]."""
    first = inputs.reshape(len(inputs), -1)[:, :1].astype(np.float64)
    powers = np.exp(np.concatenate([np.zeros_like(first), np.zeros_like(first), first], axis=1))
    probabilities: npt.NDArray[np.float32] = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return probabilities


def graph(shape: tuple[int, ...], layers: int = 0) -> ModelProto:
    """`x [B, *shape] -> p [B, 3]`; beside it `layers` matrix products that add nothing to the number but time."""
    ends = len(shape)
    constants = [
        numpy_helper.from_array(np.zeros(ends, np.int64), "starts"),
        numpy_helper.from_array(np.ones(ends, np.int64), "ends"),
        numpy_helper.from_array(np.arange(1, ends + 1), "axes"),
        numpy_helper.from_array(np.array([-1, 1], np.int64), "flat"),
        numpy_helper.from_array(np.array([[0, 0, 1]], np.float32), "weights"),
    ]
    nodes = [
        helper.make_node("Slice", ["x", "starts", "ends", "axes"], ["first"]),
        helper.make_node("Reshape", ["first", "flat"], ["number"]),
        helper.make_node("MatMul", ["number", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["p"], axis=1),
    ]
    if layers:
        constants += _ballast()
        nodes[2].output[0] = "quick"
        nodes.insert(3, helper.make_node("MatMul", ["number", "widen"], ["h0"]))
        for layer in range(layers):
            product = helper.make_node("MatMul", [f"h{layer}", "square"], [f"g{layer}"])
            nodes[-1:-1] = [product, helper.make_node("Tanh", [f"g{layer}"], [f"h{layer + 1}"])]
        nodes.insert(-1, helper.make_node("MatMul", [f"h{layers}", "nought"], ["nothing"]))
        nodes.insert(-1, helper.make_node("Add", ["quick", "nothing"], ["logits"]))
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape]),
        helper.make_tensor_value_info("p", TensorProto.FLOAT, ["batch", 3]),
    ]
    drawn = helper.make_graph(nodes, "nil", values[:1], values[1:], constants)
    return helper.make_model(drawn, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _ballast() -> list[TensorProto]:
    square = np.random.default_rng(7).standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
    named = {"widen": np.full((1, WIDTH), 0.1), "square": square, "nought": np.zeros((WIDTH, 3))}
    return [numpy_helper.from_array(value.astype(np.float32), name) for name, value in named.items()]


def manifest_of(size: str) -> Manifest:
    """Its manifest before export."""
    shape = SHAPES[size]
    columns = tuple(f"column_{number}" for number in range(shape[-1]))
    return Manifest(
        name=name_of(size),
        family="gbdt",
        horizon=Horizon(unit="ms", value=1_000, threshold=1e-5),
        model_file="model.ubj",
        inputs=(TensorSpec(name="x", dtype="FP32", shape=shape),),
        outputs=(
            TensorSpec(name="probabilities", dtype="FP32", shape=(3,)),
            TensorSpec(name="score", dtype="FP32", shape=(1,)),
            TensorSpec(name="bundle_id", dtype="INT64", shape=(1,)),
        ),
        nan_policy="reject",
        features=FeatureContract(
            spec="nil",
            digest=sha256_bytes(b"nil"),
            columns=columns,
            minimum=(-9.0,) * len(columns),
            maximum=(9.0,) * len(columns),
        ),
        tolerance=Tolerance(atol=1e-6, rtol=1e-5),
        files={"model.ubj": sha256_bytes(b"nil")},
        provenance=Provenance(created="2024-01-01T00:00:00Z", seed=7),
    )


def publish(repository: Path, size: str, layers: int = 0) -> Path:
    """A version directory as export writes it; `layers` make the model slow."""
    manifest, inputs = manifest_of(size), example(size, GOLDEN_ROWS)
    folder = repository / manifest.name / "1"
    folder.mkdir(parents=True)
    drawn = graph(SHAPES[size], layers)
    served = serve_graph(drawn, manifest.bundle_id(), input_name="x", bundle_digest=manifest.digest())
    (folder / "model.onnx").write_bytes(served.SerializeToString())
    expected = research(inputs)
    np.savez(folder / "golden.npz", x=inputs, probabilities=expected, score=expected[:, 2:] - expected[:, :1])
    record = ExportRecord(
        bundle_digest=manifest.digest(),
        bundle_id=manifest.bundle_id(),
        onnx_sha256=sha256_file(folder / "model.onnx"),
        golden_sha256=sha256_file(folder / "golden.npz"),
        opset=17,
        ir_version=8,
        gates=(),
        max_batch=MAX_BATCH,
    )
    write_manifest(folder, manifest.model_copy(update={"export": record}))
    settings = ExportSettings(max_batch=MAX_BATCH, preferred_batch_rows=(4, 16))
    text = build_config(manifest, settings, {1: sha256_file(folder / "manifest.json")})
    (folder.parent / "config.pbtxt").write_text(text)
    return folder

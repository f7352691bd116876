"""Children: smaller, the same decisions, the same numbers in any batch; a worse one is refused and leaves nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.check_model import check_safe
from export.onnx_graph import net_to_onnx, serve_graph
from export.runtime import open_session, run
from models.lstm import LstmClassifier
from tests.training.small_nets import drawn
from tickserve.config import CompressSettings
from tickserve.manifest import TensorSpec
from training import quantize
from training.quantize import Teacher, children, hold, quantize_rows, to_fp16, to_int8


@pytest.fixture(scope="module")
def teacher(trained) -> Teacher:  # noqa: ANN001
    bundle = trained.bundles["btcusd-bars-lstm"]
    with np.load(bundle.path / "parity.npz") as arrays:
        inputs, expected = arrays["window"], arrays["probabilities"]
    ret = np.random.default_rng(0).normal(size=len(inputs)) * 0.1 + (expected[:, 2] - expected[:, 0])
    net = LstmClassifier.from_bundle(bundle.path, bundle.manifest)
    return Teacher(net, bundle, bundle.manifest.inputs[0], inputs, expected, ret)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_children_name_their_teacher_and_are_smaller(trained, precision: str) -> None:  # noqa: ANN001
    child = trained.bundles[f"btcusd-bars-lstm-{precision}"]
    assert child.manifest.parents == (trained.bundles["btcusd-bars-lstm"].manifest.digest(),)
    assert child.manifest.precision == precision
    [gate] = child.manifest.gates
    assert gate.passed
    assert gate.measured["size_bytes"] == (child.path / "model.onnx").stat().st_size
    check_safe(onnx.load(child.path / "model.onnx"))
    rows = trained.bundles["btcusd-bars-lstm"].report["children"]
    assert [row["precision"] for row in rows] == ["fp16", "int8"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_childs_numbers_do_not_depend_on_its_batch_or_the_optimiser(trained, precision: str) -> None:  # noqa: ANN001
    child = trained.bundles[f"btcusd-bars-lstm-{precision}"]
    with np.load(child.path / "parity.npz") as arrays:
        inputs, expected = arrays["window"], arrays["probabilities"]
    served = serve_graph(onnx.load(child.path / "model.onnx"), 1).SerializeToString()
    session = open_session(served)
    alone = np.concatenate([run(session, {"window": row[None]})["probabilities"] for row in inputs[:50]])
    np.testing.assert_allclose(alone, expected[:50], atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(run(session, {"window": inputs})["probabilities"], expected, atol=1e-5, rtol=1e-4)


def test_int8_holds_for_stacked_layers_too(teacher: Teacher) -> None:
    net = drawn(LstmClassifier, features=6, window=8, hidden=64, layers=2).eval()
    graph = net_to_onnx(net, TensorSpec(name="window", dtype="FP32", shape=(8, 6)))
    small = to_int8(graph)
    assert sum(node.op_type == "DequantizeLinear" for node in small.graph.node) == 4
    assert len(small.SerializeToString()) < 0.4 * len(graph.SerializeToString())
    rows = np.random.default_rng(0).normal(size=(32, 8, 6)).astype(np.float32)
    wanted, was = (
        run(open_session(model.SerializeToString()), {"window": rows})["probabilities"] for model in (graph, small)
    )
    np.testing.assert_allclose(was, wanted, atol=0.01)


def test_dynamic_quantization_would_let_a_rows_number_depend_on_its_batch(teacher: Teacher, tmp_path: Path) -> None:
    # Why int8 is weight-only here. Should ONNX Runtime ever scale each row by itself, this fails: then think again.
    from onnxruntime.quantization import quantize_dynamic

    graph = net_to_onnx(teacher.net, teacher.tensor)
    quantize_dynamic(graph, tmp_path / "dynamic.onnx")
    dynamic = open_session(tmp_path / "dynamic.onnx")
    extreme = np.concatenate([teacher.inputs[:32], 50 * teacher.inputs[32:64]])
    together = run(dynamic, {"window": extreme})["probabilities"][:32]
    alone = np.concatenate([run(dynamic, {"window": row[None]})["probabilities"] for row in extreme[:32]])
    limits = teacher.bundle.manifest.tolerance
    assert np.abs(together - alone).max() > 10 * (limits.atol + limits.rtol)


def test_int8_rows_are_within_half_a_step() -> None:
    matrix = np.random.default_rng(1).normal(size=(1, 12, 5)).astype(np.float32)
    matrix[0, 3] = 0.0
    quantized, scale = quantize_rows(matrix)
    assert quantized.dtype == np.int8
    assert (np.abs(quantized * scale[None, :, None] - matrix) <= scale[None, :, None] * 0.501).all()


def test_fp16_keeps_the_scaler_in_float32(teacher: Teacher) -> None:
    net = drawn(LstmClassifier, features=2, window=4, hidden=8, layers=1).eval()
    import torch

    net.set_scaler(torch.tensor([1e6, 0.0]), torch.tensor([1e5, 1.0]))  # more than float16 can hold
    small = to_fp16(net_to_onnx(net, TensorSpec(name="window", dtype="FP32", shape=(4, 2))))
    rows = (np.random.default_rng(0).normal(size=(16, 4, 2)) * [1e5, 1] + [1e6, 0]).astype(np.float32)
    was = run(open_session(small.SerializeToString()), {"window": rows})["probabilities"]
    with torch.inference_mode():
        np.testing.assert_allclose(was, net(torch.from_numpy(rows)).numpy(), atol=2e-3)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: p[:, ::-1].copy(), "decides as its teacher"),
        (lambda p: np.full_like(p, np.nan), "not finite"),
        (lambda p: np.roll(p, 1, axis=0), "information coefficient"),
    ],
)
def test_the_gate_refuses_a_child_that_is_worse(teacher: Teacher, spoil, reason: str) -> None:  # noqa: ANN001
    assert hold(teacher, teacher.expected, 10, 100).passed
    gate = hold(teacher, spoil(teacher.expected), 10, 100)
    assert not gate.passed
    assert reason in gate.detail


def test_a_refused_child_leaves_a_report_row_and_no_bundle(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruin(graph: onnx.ModelProto) -> onnx.ModelProto:
        ruined = to_int8(graph)
        for item in ruined.graph.initializer:
            if item.name.endswith(".int8"):
                item.raw_data = bytes(len(item.raw_data))
        return ruined

    name = "btcusd-bars-lstm-int8"
    (tmp_path / name).mkdir()  # an earlier run's child of another teacher
    monkeypatch.setitem(quantize.SHRINK, "int8", ruin)
    decisive = replace(teacher, expected=np.eye(3, dtype=np.float32)[np.arange(len(teacher.inputs)) % 3])
    said: list[str] = []
    made, rows = children(decisive, CompressSettings(fp16=False, int8=True), tmp_path, said.append)
    assert made == []
    assert [row["passed"] for row in rows] == [False]
    assert "refused" in rows[0]["verdict"]
    assert not (tmp_path / name).exists()
    assert name in said[0]

"""A net on windows of real bars: exported once, then looked at from every side; and its quantized child."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.torch import save_file

from export import edge_rows, export_bundle, onnx_graph, parity
from export.check_model import dimensions, read_model
from export.job import Published
from export.runtime import score_onnx
from models.lstm import LstmClassifier
from tickserve.config import ExportSettings
from tickserve.errors import GateRefusedError
from tickserve.manifest import TensorSpec, Tolerance, load_manifest, write_manifest

FEATURES, WINDOW = 6, 5
TENSOR = TensorSpec(name="window", dtype="FP32", shape=(WINDOW, FEATURES))
GATES = ["graph", "parity.recorded", "parity.nan", "parity.extreme", "parity.batch", "parity.composition"]


@pytest.fixture(scope="module")
def net(real_rows: Any) -> LstmClassifier:
    torch.manual_seed(7)
    net = LstmClassifier(FEATURES, WINDOW, hidden=8, layers=1)
    train = torch.from_numpy(real_rows.features[100:2_000])
    net.set_scaler(train.mean(dim=0), train.std(dim=0))
    return net.eval()


@pytest.fixture(scope="module")
def windows(real_rows: Any) -> np.ndarray:
    """Real windows [399, T, F]; the first of them reach into the warm-up, so they hold NaN."""
    view = np.lib.stride_tricks.sliding_window_view(real_rows.features[:1_200], WINDOW, axis=0)
    return np.ascontiguousarray(view.transpose(0, 2, 1)[::3])


def research(net: LstmClassifier, windows: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(net(torch.from_numpy(windows)).numpy())


@pytest.fixture(scope="module")
def net_bundle(
    net: LstmClassifier,
    windows: np.ndarray,
    tmp_path_factory: pytest.TempPathFactory,
    pairs: Callable[..., None],
    describe: Any,
) -> Path:
    folder = tmp_path_factory.mktemp("net") / "btcusd-bars-lstm"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, folder / "model.safetensors")
    pairs(folder, "window", windows, research(net, windows), np.r_[0, 200:215])
    changes = {"family": "lstm", "nan_policy": "impute_mean", "architecture": net.architecture()}
    write_manifest(folder, describe(folder, folder.name, "model.safetensors", TENSOR, **changes))
    return folder


@pytest.fixture(scope="module")
def published(net_bundle: Path, settings: ExportSettings, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return export_bundle(net_bundle, tmp_path_factory.mktemp("served") / "repository", settings)


@pytest.fixture(scope="module")
def graph(net: LstmClassifier) -> onnx.ModelProto:
    return onnx_graph.net_to_onnx(net, TENSOR)


def test_a_net_is_served_with_researchs_numbers(published: Published, net: LstmClassifier, windows: np.ndarray) -> None:
    assert [gate.name for gate in published.gates] == GATES
    for rows in (1, 2, 3, 7, len(windows)):
        served = score_onnx(published.path / "model.onnx", {"window": windows[:rows]})
        np.testing.assert_allclose(served["probabilities"], research(net, windows[:rows]), atol=1e-6)
        assert served["bundle_id"].shape == served["score"].shape == (rows, 1)


def test_only_the_batch_is_dynamic_and_nothing_names_this_machine(published: Published) -> None:
    model = read_model(published.path / "model.onnx")
    assert [dimensions(value) for value in model.graph.input] == [("batch", WINDOW, FEATURES)]
    assert {value.name: dimensions(value) for value in model.graph.output} == {
        "probabilities": ("batch", 3),
        "score": ("batch", 1),
        "bundle_id": ("batch", 1),
    }
    data = (published.path / "model.onnx").read_bytes()
    assert b".py" not in data
    assert b"stack_trace" not in data
    assert str(Path(__file__).parent).encode() not in data


def test_a_net_converts_to_the_same_bytes(net: LstmClassifier, graph: onnx.ModelProto) -> None:
    again = onnx_graph.net_to_onnx(net, TENSOR)
    assert again.SerializeToString(deterministic=True) == graph.SerializeToString(deterministic=True)


def test_a_scaler_that_was_left_out_is_refused(
    net_bundle: Path, tmp_path: Path, settings: ExportSettings, graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = onnx.ModelProto()
    spoiled.CopyFrom(graph)
    for tensor in spoiled.graph.initializer:
        if tensor.name == "std":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(FEATURES, np.float32), "std"))
    monkeypatch.setattr(onnx_graph, "net_to_onnx", lambda *_: spoiled)
    with pytest.raises(GateRefusedError, match=r"parity\.recorded refused: row"):
        export_bundle(net_bundle, tmp_path / "repository", settings)


def quantized(graph: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(graph, folder / "float.onnx")
    quantize_dynamic(folder / "float.onnx", folder / "model.onnx", weight_type=QuantType.QInt8)
    (folder / "float.onnx").unlink()
    return folder / "model.onnx"


@pytest.fixture
def child_bundle(
    graph: onnx.ModelProto,
    net_bundle: Path,
    windows: np.ndarray,
    tmp_path: Path,
    pairs: Callable[..., None],
    describe: Any,
) -> Path:
    folder = tmp_path / "btcusd-bars-lstm-int8"
    folder.mkdir()
    path = quantized(graph, folder)
    scored = score_onnx(path, {"window": windows})["probabilities"]
    pairs(folder, "window", windows, scored, np.r_[0, 200:215])
    changes: dict[str, Any] = {
        "family": "lstm",
        "precision": "int8",
        "nan_policy": "impute_mean",
        "parents": (load_manifest(net_bundle).digest(),),
        "tolerance": Tolerance(atol=0.05, rtol=0.0),
    }
    write_manifest(folder, describe(folder, folder.name, "model.onnx", TENSOR, **changes))
    return folder


def test_a_quantized_child_is_checked_and_served(
    child_bundle: Path, tmp_path: Path, settings: ExportSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GateRefusedError, match=r"tolerance\.atol: wider than a gate for lstm int8 allows"):
        export_bundle(child_bundle, tmp_path / "repository", settings)
    monkeypatch.setitem(parity.CEILINGS, ("lstm", "int8"), Tolerance(atol=0.05, rtol=0.0))
    processor = Path("/proc/cpuinfo").read_text()
    if " avx2 " in processor and not re.search(r"\bavx\w*_vnni\b", processor):
        # Here the plain graph's sums of 8-bit products are cut off, and the optimised one's are not: a gate's business.
        with pytest.raises(GateRefusedError, match=r"gate parity\.\w+ refused"):
            export_bundle(child_bundle, tmp_path / "repository", settings)
        return
    published = export_bundle(child_bundle, tmp_path / "repository", settings)
    used = {(node.domain, node.op_type) for node in read_model(published.path / "model.onnx").graph.node}
    assert ("com.microsoft", "DynamicQuantizeLSTM") in used
    batch = next(gate for gate in published.gates if gate.name == "parity.batch")
    assert float(batch.measured["max_abs_against_alone"] or 0) > 0, "dynamic quantization sees the whole batch"


def test_a_child_whose_answer_depends_on_its_neighbours_is_refused(
    child_bundle: Path, tmp_path: Path, settings: ExportSettings, rewrite: Any
) -> None:
    """Dynamic quantization scales by the largest value in the batch: at a tight tolerance that is drift."""
    rewrite(child_bundle, tolerance={"atol": 1e-6, "rtol": 0.0})
    with pytest.raises(GateRefusedError, match="parity"):
        export_bundle(child_bundle, tmp_path / "repository", settings)
    assert not (tmp_path / "repository" / child_bundle.name).exists()


def test_a_truncated_safetensors_file_is_refused(
    net_bundle: Path, tmp_path: Path, settings: ExportSettings, rewrite: Any
) -> None:
    from tickserve.errors import ArtifactError

    folder = Path(shutil.copytree(net_bundle, tmp_path / net_bundle.name))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    rewrite(folder)
    with pytest.raises(ArtifactError, match="weights do not load"):
        export_bundle(folder, tmp_path / "repository", settings)


def test_rows_with_nan_hold_every_kind_of_hole(windows: np.ndarray) -> None:
    holed = edge_rows.rows_with_nan(windows[-100:])
    assert holed.shape == (100 + FEATURES + WINDOW + 1, WINDOW, FEATURES)
    assert np.isnan(holed[-1]).all()
    for feature in range(FEATURES):
        assert np.isnan(holed[100 + feature, :, feature]).all()
        assert np.isnan(holed[100 + feature]).sum() == WINDOW
    for step in range(WINDOW):
        assert np.isnan(holed[100 + FEATURES + step, step]).all()
        assert np.isnan(holed[100 + FEATURES + step]).sum() == FEATURES


def test_extreme_rows_hold_every_edge(windows: np.ndarray, net_bundle: Path) -> None:
    manifest = load_manifest(net_bundle)
    rows = edge_rows.extreme_rows(windows, manifest)
    edges = len(edge_rows.EDGES) + 2
    assert rows.shape == (edges * (1 + FEATURES) + 4, WINDOW, FEATURES)
    assert {np.float32(np.inf), np.float32(-np.inf), edge_rows.SMALLEST, edge_rows.LARGEST} <= set(rows.ravel())
    assert (rows[:edges] == rows[:edges, :1, :1]).all()
    for number, row in enumerate(rows[edges : edges + FEATURES]):
        assert (row[:, number] == 0).all()
        np.testing.assert_array_equal(np.delete(row, number, 1), np.delete(windows[0], number, 1))
    np.testing.assert_array_equal(rows[-3:, 0, 0], np.array([1.0, -21.0, 21.0], np.float32))
    strict = manifest.model_copy(update={"nan_policy": "reject"})
    assert np.isfinite(edge_rows.extreme_rows(windows[-1:], strict)).all()


def test_a_net_that_imputes_only_nan_is_refused(
    net_bundle: Path, tmp_path: Path, settings: ExportSettings, graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinity that is let through says something else than a hole; no recorded row has one."""
    spoiled = onnx.ModelProto()
    spoiled.CopyFrom(graph)
    nodes = spoiled.graph.node
    (known,) = (node for node in nodes if node.op_type == "LessOrEqual")
    known.op_type, known.input[1] = "Equal", known.input[0]  # only a NaN is not equal to itself
    monkeypatch.setattr(onnx_graph, "net_to_onnx", lambda *_: spoiled)
    with pytest.raises(GateRefusedError, match=r"parity\.extreme refused"):
        export_bundle(net_bundle, tmp_path / "repository", settings)

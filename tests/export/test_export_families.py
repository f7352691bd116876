"""Every family of nets on real rows: exported through every gate, fp16 attention loads, two of them served."""

from __future__ import annotations

import http.client
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxconverter_common.float16 import convert_float_to_float16
from safetensors.torch import save_file

from export import export_bundle, onnx_graph
from export.check_model import dimensions, read_model
from export.job import Published
from export.runtime import open_session, run, score_onnx
from models.latency_shapes import SHAPES
from models.net import Net
from models.registry import NETS
from serving.embedded import EmbeddedTriton
from serving.golden import infer
from tests.models.families import small
from tickserve.config import ExportSettings, ServeSettings
from tickserve.errors import ArtifactError
from tickserve.manifest import TensorSpec, write_manifest

# DeepLOB looks for levels by name; what it does with three real columns is what is tested here.
COLUMNS = ("move", *(f"level_imbalance_{level}" for level in (1, 2, 3)), "past", "longer")
# The LSTM has a file of its own.
KINDS = sorted(set(NETS) - {"lstm"})


def tensor_of(net: Net) -> TensorSpec:
    return TensorSpec(name="window" if len(net.input_shape) == 2 else "features", dtype="FP32", shape=net.input_shape)


@pytest.fixture(scope="module")
def rows(real_rows: Any) -> np.ndarray:
    """Real windows [n, 8, F]; the first of them reach into the warm-up, so they hold NaN."""
    view = np.lib.stride_tricks.sliding_window_view(real_rows.features[:1_200], 8, axis=0)
    return np.ascontiguousarray(view.transpose(0, 2, 1)[::3])


@pytest.fixture(scope="module")
def nets(real_rows: Any) -> dict[str, Net]:
    made = {kind: small(kind, COLUMNS) for kind in KINDS}
    train = torch.from_numpy(real_rows.features[100:2_000])
    for net in made.values():
        net.set_scaler(train.mean(dim=0), train.std(dim=0))
    return made


def inputs(net: Net, rows: np.ndarray) -> np.ndarray:
    return rows if len(net.input_shape) == 2 else np.ascontiguousarray(rows[:, -1])


def bundle(net: Net, rows: np.ndarray, folder: Path, pairs: Callable[..., None], describe: Any, **fields: Any) -> Path:
    folder.mkdir(parents=True)
    given = inputs(net, rows)
    with torch.inference_mode():
        said = net(torch.from_numpy(given)).numpy()
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, folder / "model.safetensors")
    pairs(folder, tensor_of(net).name, given, said, np.r_[0, 200:215])
    changes = {"family": net.kind, "nan_policy": "impute_mean", "architecture": net.architecture()} | fields
    write_manifest(folder, describe(folder, folder.name, "model.safetensors", tensor_of(net), **changes))
    return folder


@pytest.fixture(scope="module")
def published(
    nets: dict[str, Net],
    rows: np.ndarray,
    settings: ExportSettings,
    tmp_path_factory: pytest.TempPathFactory,
    pairs: Callable[..., None],
    describe: Any,
) -> dict[str, Published]:
    folder = tmp_path_factory.mktemp("families")
    made = {}
    for kind in KINDS:
        source = bundle(nets[kind], rows, folder / f"bars-{kind}", pairs, describe)
        made[kind] = export_bundle(source, folder / "repository", settings)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_passes_every_gate(
    kind: str, nets: dict[str, Net], rows: np.ndarray, published: dict[str, Published]
) -> None:
    net, version = nets[kind], published[kind]
    worst = max(float(gate.measured.get("max_abs_probability") or 0) for gate in version.gates)
    assert [gate.name for gate in version.gates][:2] == ["graph", "parity.recorded"]
    assert worst <= 1e-5
    graph = read_model(version.path / "model.onnx")
    assert [dimensions(value) for value in graph.graph.input] == [("batch", *net.input_shape)]
    for count in (1, 3, 33):
        given = inputs(net, rows[:count])
        with torch.inference_mode():
            said = net(torch.from_numpy(given)).numpy()
        served = score_onnx(version.path / "model.onnx", {tensor_of(net).name: given})
        np.testing.assert_allclose(served["probabilities"], said, atol=1e-5)


def test_row_and_window_nets_are_served(
    published: dict[str, Published], nets: dict[str, Net], rows: np.ndarray
) -> None:
    ports = ServeSettings(http_port=0, grpc_port=0, metrics_port=0)
    wanted = [published[kind].model for kind in ("mlp", "tlob")]
    with EmbeddedTriton(published["mlp"].path.parents[1], ports, models=wanted) as server:
        connection = http.client.HTTPConnection(server.http_url, timeout=10)
        for kind in ("mlp", "tlob"):
            given = inputs(nets[kind], rows[:7])
            with torch.inference_mode():
                said = nets[kind](torch.from_numpy(given)).numpy()
            answer = infer(connection, published[kind].model, 1, {tensor_of(nets[kind]).name: given})
            np.testing.assert_allclose(answer["probabilities"], said, atol=1e-5)
        connection.close()


def test_fp16_attention_loads_as_it_is_served(nets: dict[str, Net], rows: np.ndarray) -> None:
    """ONNX Runtime's attention fusions have crashed on fp16 graphs at its default level; this one they leave whole."""
    net = nets["tlob"]
    graph = onnx_graph.net_to_onnx(net, tensor_of(net))
    scaler = [node.name for node in graph.graph.node[: [n.op_type for n in graph.graph.node].index("MatMul")]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        half = convert_float_to_float16(graph, keep_io_types=True, node_block_list=scaler)
    with torch.inference_mode():
        said = net(torch.from_numpy(rows)).numpy()
    for level in (0, 2):
        answer = run(open_session(half.SerializeToString(), graph_level=level), {"window": rows})
        np.testing.assert_allclose(answer["probabilities"], said, atol=5e-3)


def test_an_untrained_latency_shape_is_never_published(
    nets: dict[str, Net],
    rows: np.ndarray,
    tmp_path: Path,
    settings: ExportSettings,
    pairs: Callable[..., None],
    describe: Any,
) -> None:
    labelled = nets["tcn"].architecture() | {"status": SHAPES["a"].architecture["status"]}
    made = bundle(nets["tcn"], rows, tmp_path / "latency", pairs, describe, architecture=labelled)
    with pytest.raises(ArtifactError, match=r"never published: expected a trained model, was untrained latency shape"):
        export_bundle(made, tmp_path / "repository", settings)
    assert not (tmp_path / "repository").exists()

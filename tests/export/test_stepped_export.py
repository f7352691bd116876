"""A stateful net through the export: its graph, its gates, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from export import export_bundle
from export.check_model import dimensions, graph_inputs, read_model
from export.job import Published
from export.packed import feed, pack
from export.research import load_research
from export.runtime import open_session, run
from export.stepping import state_gates
from models.lstm import LstmClassifier
from models.stepped import SteppedLstm, tensors
from tickserve.config import ExportSettings
from tickserve.errors import ArtifactError, GateRefusedError
from tickserve.manifest import Manifest, StateContract, TensorSpec, load_manifest, write_manifest

FEATURES, HIDDEN, LAYERS = 6, 8, 2


@pytest.fixture(scope="module")
def net(real_rows: Any) -> SteppedLstm:
    torch.manual_seed(7)
    net = LstmClassifier(FEATURES, 5, HIDDEN, LAYERS)
    train = torch.from_numpy(real_rows.features[100:2_000])
    net.set_scaler(train.mean(dim=0), train.std(dim=0))
    return SteppedLstm(net).eval()


@pytest.fixture(scope="module")
def arrays(net: SteppedLstm, real_rows: Any) -> dict[str, np.ndarray]:
    """320 consecutive real rows with the state each is met with, and what one step makes of them."""
    kept: dict[str, list[np.ndarray]] = {
        name: [] for name in ("features", "hidden", "cell", "probabilities", "hidden_out", "cell_out")
    }
    state = net.initial()
    with torch.inference_mode():
        for row in torch.from_numpy(real_rows.features[40:360]):
            said = net(row[None], *state)
            for name, tensor in zip(kept, (row[None], *state, *said), strict=True):
                kept[name].append(tensor.numpy())
            state = (said[1], said[2])
    return {name: np.concatenate(parts) for name, parts in kept.items()}


@pytest.fixture(scope="module")
def bundle(
    net: SteppedLstm, arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory, describe: Any
) -> Path:
    folder = tmp_path_factory.mktemp("stepped") / "btcusd-bars-lstm-step"
    folder.mkdir()
    weights = {name: tensor.contiguous() for name, tensor in net.net.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    np.savez(folder / "parity.npz", **arrays)
    probabilities = arrays["probabilities"]
    np.savez(folder / "golden.npz", **{name: array[::20] for name, array in arrays.items()}, score=(
        probabilities[:, 2:] - probabilities[:, :1])[::20])  # fmt: skip
    state = StateContract.model_validate({"tensors": tensors(net), "session_gap_ns": 10**9, "stride": 1})
    shape = (LAYERS, HIDDEN)
    changes = {
        "family": "lstm",
        "nan_policy": "impute_mean",
        "architecture": net.net.architecture(),
        "state": state,
        "inputs": tuple(
            TensorSpec(name=name, dtype="FP32", shape=size)
            for name, size in (("features", (FEATURES,)), ("hidden", shape), ("cell", shape))
        ),
    }
    first = TensorSpec(name="features", dtype="FP32", shape=(FEATURES,))
    described = describe(folder, folder.name, "model.safetensors", first)
    outputs = [TensorSpec(name=each.output, dtype="FP32", shape=each.shape) for each in state.tensors]
    fields = described.stored() | changes | {"outputs": (*described.outputs, *outputs)}
    write_manifest(folder, Manifest.model_validate(fields))
    return folder


@pytest.fixture(scope="module")
def published(bundle: Path, settings: ExportSettings, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return export_bundle(bundle, tmp_path_factory.mktemp("served") / "repository", settings)


@pytest.fixture(scope="module")
def session(published: Published) -> Any:
    return open_session(published.path / "model.onnx")


def test_the_graph_takes_and_gives_the_state_with_one_dynamic_dimension(published: Published) -> None:
    model = read_model(published.path / "model.onnx")
    assert {value.name: dimensions(value) for value in (*graph_inputs(model), *model.graph.output)} == {
        "features": ("batch", FEATURES),
        "hidden": ("batch", LAYERS, HIDDEN),
        "cell": ("batch", LAYERS, HIDDEN),
        "probabilities": ("batch", 3),
        "score": ("batch", 1),
        "bundle_id": ("batch", 1),
        "hidden_out": ("batch", LAYERS, HIDDEN),
        "cell_out": ("batch", LAYERS, HIDDEN),
    }
    assert all(node.op_type not in ("Loop", "Scan", "If") for node in model.graph.node)


def test_every_gate_ran_on_state_too(published: Published) -> None:
    names = [gate.name for gate in published.gates]
    assert {"parity.recorded", "parity.nan", "parity.state", "parity.stepped"} <= set(names)
    stepped = published.gates[names.index("parity.stepped")]
    assert stepped.measured["steps"] == 256
    assert 0 <= stepped.measured["max_abs_cell_out"] < 1e-4  # type: ignore[operator]


def test_streams_of_one_batch_get_the_bits_they_get_alone(session: Any, arrays: dict[str, np.ndarray]) -> None:
    inputs = {name: arrays[name][10:26] for name in ("features", "hidden", "cell")}
    together = run(session, inputs)
    for place in range(16):
        alone = run(session, {name: array[place : place + 1] for name, array in inputs.items()})
        for name, array in alone.items():
            np.testing.assert_allclose(array[0], together[name][place], rtol=1e-6, atol=1e-7, err_msg=name)


def test_the_research_of_a_bundle_answers_with_its_state(bundle: Path, arrays: dict[str, np.ndarray]) -> None:
    manifest = load_manifest(bundle)
    research = load_research(bundle, manifest)
    assert research.answer is not None
    said = research.answer({name: arrays[name] for name in ("features", "hidden", "cell")})
    for name in ("probabilities", "hidden_out", "cell_out"):
        np.testing.assert_allclose(said[name], arrays[name], atol=1e-6)
    np.testing.assert_array_equal(research.predict(pack(arrays, manifest)), said["probabilities"])


def test_packed_rows_come_apart_as_they_were_put_together(bundle: Path, arrays: dict[str, np.ndarray]) -> None:
    manifest = load_manifest(bundle)
    rows = pack(arrays, manifest)
    assert rows.shape == (320, FEATURES + 2 * LAYERS * HIDDEN)
    for name, array in feed(rows, manifest).items():
        np.testing.assert_array_equal(array, arrays[name])
    rows[0] = np.nan
    fed = feed(rows, manifest)
    assert np.isnan(fed["features"][0]).all()
    assert not fed["cell"][0].any()


Change = Callable[[dict[str, np.ndarray]], None]


def spoiled(score: Any, change: Change) -> Any:
    def run_it(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        said = {name: array.copy() for name, array in score(inputs).items()}
        change(said)
        return said

    return run_it


def _late(said: dict[str, np.ndarray]) -> None:
    said["cell_out"] *= np.float32(1 + 9e-6)  # inside the tolerance of one step, not of many


def _wrong(said: dict[str, np.ndarray]) -> None:
    said["hidden_out"][-1, 0, 0] += 0.01


def _nan(said: dict[str, np.ndarray]) -> None:
    said["cell_out"][0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [(_wrong, r"parity\.state.*row 319"), (_nan, r"parity\.state.*row 0"), (_late, r"parity\.stepped.*row \d+")],
)
def test_a_state_that_is_not_researchs_is_refused(
    bundle: Path, session: Any, arrays: dict[str, np.ndarray], change: Change, message: str
) -> None:
    manifest = load_manifest(bundle)
    research = load_research(bundle, manifest)
    assert research.answer is not None

    def score(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return run(session, inputs)

    rows = pack(arrays, manifest)
    assert len(state_gates(score, rows, research.answer, manifest)) == 2
    with pytest.raises(GateRefusedError, match=message):
        state_gates(spoiled(score, change), rows, research.answer, manifest)


def test_a_drifted_stateful_bundle_is_not_published(
    bundle: Path, settings: ExportSettings, tmp_path: Path, rewrite: Any
) -> None:
    import shutil

    folder = Path(shutil.copytree(bundle, tmp_path / bundle.name))
    pairs = dict(np.load(folder / "parity.npz"))
    pairs["probabilities"][5] = pairs["probabilities"][5][::-1]
    np.savez(folder / "parity.npz", **pairs)
    rewrite(folder)
    with pytest.raises(GateRefusedError, match="row 5"):
        export_bundle(folder, tmp_path / "repository", settings)
    assert not (tmp_path / "repository" / bundle.name / "1").exists()


def test_a_state_of_other_sizes_than_the_net_is_refused(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert manifest.state is not None
    other = manifest.state.tensors[0].model_copy(update={"shape": (1, HIDDEN)})
    state = manifest.state.model_copy(update={"tensors": (other, other)})
    with pytest.raises(ArtifactError, match="state"):
        SteppedLstm.from_bundle(bundle, manifest.model_copy(update={"state": state}))


def test_a_graph_with_a_tensor_too_few_is_refused(published: Published) -> None:
    from export.onnx_graph import serve_graph

    model = onnx.load(published.path / "model.onnx")
    with pytest.raises(ArtifactError, match="one input and one output"):
        serve_graph(model, 1)

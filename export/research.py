"""The model of a bundle as research runs it: what every exported number is held against.

Trees are scored by XGBoost, nets by torch; a child that arrives as a graph is scored by ONNX Runtime with every
optimisation off. Letters: N rows, T steps of a window, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from export import check_model, onnx_graph, runtime, trees
from export.packed import feed
from export.parity import Rows
from export.split_rows import Split, read_splits
from models.ordinal import OrdinalLink
from tickserve.errors import ArtifactError
from tickserve.manifest import Manifest

NO_OPTIMIZATION = 2


@dataclass(frozen=True)
class Research:
    """`predict` takes rows [N, ...] and gives probabilities float32 [N, 3]; `to_onnx` converts the same model.

    For a forest, `splits` holds every inner node of its `trees` trees, `second` is another engine for it, and `inplace`
    XGBoost's own without its matrix; a net has none of them. A stateful net's rows are packed (`export.packed`), and
    `answer` gives all its outputs by name, its state too.
    """

    predict: Callable[[Rows], Rows]
    to_onnx: Callable[[], ModelProto]
    splits: tuple[Split, ...] | None = None
    trees: int = 0
    second: Callable[[], Callable[[Rows], Rows]] | None = None
    inplace: Callable[[], Callable[[Rows], Rows]] | None = None
    answer: Callable[[dict[str, Rows]], dict[str, Rows]] | None = None


def load_research(folder: Path, manifest: Manifest) -> Research:
    """The model in a verified bundle. Raises ArtifactError for a kind of file this project does not load."""
    loaders = {".ubj": _trees, ".safetensors": _net, ".onnx": _graph}
    suffix = Path(manifest.model_file).suffix
    if suffix not in loaders:
        expected = ", ".join(sorted(loaders))
        raise ArtifactError("a model file that is never loaded", field="model_file", expected=expected, was=suffix[:20])
    return loaders[suffix](folder, manifest)


def _trees(folder: Path, manifest: Manifest) -> Research:
    (features,) = manifest.inputs[0].shape
    link = OrdinalLink.from_architecture(manifest.architecture)
    loaded = trees.load_booster(folder / manifest.model_file)
    booster = trees.prepare_booster(loaded, features, margin=link is not None)

    def convert() -> ModelProto:
        if link is None:
            return onnx_graph.trees_to_onnx(booster, features)
        return onnx_graph.margin_to_onnx(booster, features, link)

    forest = trees.trees_of(booster)
    return Research(
        trees.matrix_predictor(booster, link),
        convert,
        splits=tuple(read_splits(forest)),
        trees=len(forest),
        second=lambda: trees.treelite_predictor(booster, link),
        inplace=lambda: trees.inplace_predictor(booster, link),
    )


def _net(folder: Path, manifest: Manifest) -> Research:
    import torch

    from models.registry import net_from_bundle

    if manifest.state is not None:
        return _stepped(folder, manifest)
    module = net_from_bundle(folder, manifest)

    def predict(rows: Rows) -> Rows:
        with torch.inference_mode():
            scored: Any = module(torch.from_numpy(np.ascontiguousarray(rows)))
        return np.asarray(scored.numpy(), np.float32)

    return Research(predict, lambda: onnx_graph.net_to_onnx(module, manifest.inputs[0]))


def _stepped(folder: Path, manifest: Manifest) -> Research:
    import torch

    from models.stepped import SteppedLstm

    module = SteppedLstm.from_bundle(folder, manifest)
    state = manifest.state.tensors if manifest.state else ()
    names = [onnx_graph.PROBABILITIES, *(tensor.output for tensor in state)]
    (features,) = manifest.inputs[0].shape

    def answer(inputs: dict[str, Rows]) -> dict[str, Rows]:
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # one row is too little to share out, and waiting for a second thread costs more
        try:
            with torch.inference_mode():
                said: Any = module(*(torch.from_numpy(inputs[tensor.name]) for tensor in manifest.inputs))
        finally:
            torch.set_num_threads(before)
        return {name: tensor.numpy() for name, tensor in zip(names, said, strict=True)}

    def predict(rows: Rows) -> Rows:
        return answer(feed(rows, manifest))[onnx_graph.PROBABILITIES]

    return Research(predict, lambda: onnx_graph.stepped_to_onnx(module, features, state), answer=answer)


def _graph(folder: Path, manifest: Manifest) -> Research:
    model = check_model.read_model(folder / manifest.model_file)
    session = runtime.open_session(model.SerializeToString(), graph_level=NO_OPTIMIZATION)
    name = check_model.graph_inputs(model)[0].name

    def predict(rows: Rows) -> Rows:
        return np.asarray(session.run(None, {name: rows})[0], np.float32)

    return Research(predict, lambda: model)

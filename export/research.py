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
import numpy.typing as npt
from onnx import ModelProto

from export import check_model, onnx_graph, runtime, trees
from tickserve.errors import ArtifactError
from tickserve.manifest import Manifest

Rows = npt.NDArray[np.float32]
NO_OPTIMIZATION = 2


@dataclass(frozen=True)
class Research:
    """`predict` takes rows [N, ...] and gives probabilities float32 [N, 3]; `to_onnx` converts the same model.

    `splits` holds every (feature, threshold) of a forest, and is None for a net.
    """

    predict: Callable[[Rows], Rows]
    to_onnx: Callable[[], ModelProto]
    splits: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None


def load_research(folder: Path, manifest: Manifest) -> Research:
    """The model in a verified bundle. Raises ArtifactError for a kind of file this project does not load."""
    loaders = {".ubj": _trees, ".safetensors": _net, ".onnx": _graph}
    suffix = Path(manifest.model_file).suffix
    if suffix not in loaders:
        expected = ", ".join(sorted(loaders))
        raise ArtifactError("a model file that is never loaded", field="model_file", expected=expected, was=suffix[:20])
    return loaders[suffix](folder, manifest)


def _trees(folder: Path, manifest: Manifest) -> Research:
    import xgboost

    (features,) = manifest.inputs[0].shape
    booster = trees.prepare_booster(trees.load_booster(folder / manifest.model_file), features)

    def predict(rows: Rows) -> Rows:
        return np.asarray(booster.predict(xgboost.DMatrix(rows, missing=np.nan, nthread=1)), np.float32)

    return Research(
        predict, lambda: onnx_graph.trees_to_onnx(booster, features), splits=trees.split_thresholds(booster)
    )


def _net(folder: Path, manifest: Manifest) -> Research:
    import torch

    from models.lstm import LstmClassifier

    module = LstmClassifier.from_bundle(folder, manifest)
    module.eval()
    window, features = manifest.inputs[0].shape

    def predict(rows: Rows) -> Rows:
        with torch.inference_mode():
            scored: Any = module(torch.from_numpy(np.ascontiguousarray(rows)))
        return np.asarray(scored.numpy(), np.float32)

    return Research(predict, lambda: onnx_graph.net_to_onnx(module, window, features))


def _graph(folder: Path, manifest: Manifest) -> Research:
    model = check_model.read_model(folder / manifest.model_file)
    session = runtime.open_session(model.SerializeToString(), graph_level=NO_OPTIMIZATION)
    name = check_model.graph_inputs(model)[0].name

    def predict(rows: Rows) -> Rows:
        return np.asarray(session.run(None, {name: rows})[0], np.float32)

    return Research(predict, lambda: model)

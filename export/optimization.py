"""What ONNX Runtime makes of a graph when it loads it: recorded, because the gates judge the optimised graph."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort

from export.runtime import session_options
from tickserve.errors import ArtifactError
from tickserve.model_config import GRAPH_LEVELS

SERVED_LEVEL = 0


@dataclass(frozen=True)
class Optimization:
    """ONNX Runtime's level and version, and the number of nodes before and after it on this machine's CPU."""

    level: str
    runtime: str
    nodes_before: int
    nodes_after: int


def measure_optimization(graph: bytes, level: int = SERVED_LEVEL) -> Optimization:
    """Optimise a checked graph as a server will when it loads it. `level` is Triton's (0 all, 2 nothing).

    Raises ArtifactError when ONNX Runtime does not load it.
    """
    name = GRAPH_LEVELS[level]
    options = session_options(1, level)
    with tempfile.TemporaryDirectory(prefix="tickserve-optimized-") as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        try:
            ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            after = len(onnx.load(path).graph.node)
        except Exception as error:  # onnxruntime raises a type of its own per cause, all from Exception
            raise ArtifactError("ONNX Runtime does not optimise this graph", field="model.onnx") from error
    before = len(onnx.load_model_from_string(graph).graph.node)
    return Optimization(name, f"onnxruntime {ort.__version__}", before, after)

"""ONNX Runtime in this process, set up as the served config sets it up; and how long one call takes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from tickserve.errors import ArtifactError
from tickserve.model_config import GRAPH_LEVELS

Arrays = dict[str, npt.NDArray[Any]]
ONLY_ERRORS = 3


def open_session(source: Path | bytes, *, threads: int = 1, graph_level: int = 0) -> Any:
    """An ONNX Runtime session on the CPU. `graph_level` is Triton's (0 optimises all, 2 nothing).

    Check the file with `export.check_model.read_model` first. Raises ArtifactError when it does not load.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, GRAPH_LEVELS[graph_level])
    options.log_severity_level = ONLY_ERRORS
    # Spinning threads would take the cores the other stages need; one thread never waits for another.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    content = source if isinstance(source, bytes) else source.read_bytes()
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a type of its own per cause, all from Exception
        reason = str(error).splitlines()[0][:200]
        raise ArtifactError(f"ONNX Runtime does not load this graph: {reason}", field="model.onnx") from error


def run(session: Any, inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Every output of one call, by name."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def score_onnx(source: Path | bytes, inputs: Mapping[str, npt.NDArray[Any]], threads: int = 1) -> Arrays:
    """Load a graph and run it once: `features` [B, F] gives probabilities [B, 3], score [B, 1], bundle_id [B, 1]."""
    return run(open_session(source, threads=threads), inputs)


@dataclass(frozen=True)
class Latency:
    """How long one call in this process took, in microseconds."""

    calls: int
    rows: int
    p50_us: float
    p99_us: float


def measure_latency(
    source: Path | bytes, inputs: Mapping[str, npt.NDArray[Any]], *, calls: int = 1_000, threads: int = 1
) -> Latency:
    """Time `calls` calls, one after the other, after a tenth as many that are not counted."""
    session = open_session(source, threads=threads)
    feed = dict(inputs)
    for _ in range(max(1, calls // 10)):
        session.run(None, feed)
    taken = np.empty(calls, np.int64)
    for call in range(calls):
        start = time.perf_counter_ns()
        session.run(None, feed)
        taken[call] = time.perf_counter_ns() - start
    p50, p99 = np.percentile(taken, [50, 99]) / 1_000
    return Latency(calls, len(next(iter(feed.values()))), float(p50), float(p99))

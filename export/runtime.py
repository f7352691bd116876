"""ONNX Runtime in this process, set up as the served config sets it up; and how long one call takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from export.runtimes.measure import Effort, interleaved, picked, timing
from tickserve.errors import ArtifactError
from tickserve.model_config import GRAPH_LEVELS, SESSION_ENTRIES
from tickserve.runtimes import Timing

Arrays = dict[str, npt.NDArray[Any]]
ONLY_ERRORS = 3
CPU = "CPUExecutionProvider"


def session_options(threads: int, graph_level: int) -> ort.SessionOptions:
    """What every session is opened with."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, GRAPH_LEVELS[graph_level])
    options.log_severity_level = ONLY_ERRORS
    for key, value in SESSION_ENTRIES.items():
        options.add_session_config_entry(key, value)
    return options


def open_session(
    source: Path | bytes, *, threads: int = 1, graph_level: int = 0, providers: Sequence[str] = (CPU,)
) -> Any:
    """An ONNX Runtime session, by default on the CPU. `graph_level` is Triton's (0 optimises all, 2 nothing).

    Check the file with `export.check_model.read_model` first. Raises ArtifactError when it does not load.
    """
    options = session_options(threads, graph_level)
    content = source if isinstance(source, bytes) else source.read_bytes()
    try:
        return ort.InferenceSession(content, options, providers=list(providers))
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


def measure_latency(
    source: Path | bytes,
    inputs: Mapping[str, npt.NDArray[Any]],
    batches: Sequence[int] = (1,),
    *,
    calls: int = 1_000,
    threads: int = 1,
    graph_level: int = 0,
) -> tuple[Timing, ...]:
    """How long a call takes for each of `batches`, warmed up, the sizes in turns: for a gate, and for reports.

    `inputs` are real rows [N, ...] by name, of which every batch takes the same ones each time; `calls` are timed for
    each size. Check the file with `export.check_model.read_model` first. Raises ArtifactError when it does not load.
    """
    session = open_session(source, threads=threads, graph_level=graph_level)
    count = len(next(iter(inputs.values())))

    def call_of(rows: int) -> Any:
        chosen = picked(count, rows)
        feed = {name: np.ascontiguousarray(array[chosen]) for name, array in inputs.items()}
        return lambda: session.run(None, feed)

    sizes = sorted(set(batches))
    taken = interleaved({str(rows): call_of(rows) for rows in sizes}, Effort(0.0, calls, calls))
    return tuple(timing(rows, taken[str(rows)]) for rows in sizes)

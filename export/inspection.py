"""The other side of `export.sandbox`: a process that parses, checks and tries one graph, and says what it found.

It is started for one file and ends with it. What it was started for comes on standard input, what it says goes to
standard output: a line once its limits are in force, then one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, helper

from export import check_model, runtime
from export.sandbox import READY
from tickserve.errors import ArtifactError, UnsafeModelError

TRIAL_ROWS = (1, 2)
OPEN_FILES = 16


def main(memory_bytes: int, cpu_s: int) -> None:
    """Limit this process, then judge the graph on standard input."""
    _limit(memory_bytes, cpu_s)
    _say(READY)
    with open(0, "rb", closefd=False) as source:
        verdict = judge(source.read())
    _say(json.dumps(verdict).encode())
    # Without taking apart what a hostile file built up: that could take longer than all before.
    os._exit(0)


def _limit(memory_bytes: int, cpu_s: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        # No byte is written to any file, and no core dump.
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: OPEN_FILES,
    }
    for kind, limit in limits.items():
        _set(kind, limit, limit)
    # The softer signal first: it says what it was that ended the process.
    _set(resource.RLIMIT_CPU, cpu_s, cpu_s + 1)


def _set(kind: int, soft: int, hard: int) -> None:
    """Never above what this process was given."""
    ceiling = resource.getrlimit(kind)[1]
    allowed = (soft, hard) if ceiling == resource.RLIM_INFINITY else (min(soft, ceiling), min(hard, ceiling))
    resource.setrlimit(kind, allowed)


def _say(text: bytes) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def judge(data: bytes) -> dict[str, Any]:
    """`{"ok": true}`, or why the graph is refused: `error`, `field`, `expected`, `was`."""
    try:
        try_graph(check_model.parse_model(data), data)
    except ArtifactError as error:
        return _refusal(error)
    except MemoryError:
        return _refusal(UnsafeModelError("the graph needs more memory than its check allows", field="model"))
    except Exception as error:  # a parser's own type per cause: whatever a stranger's file raised, it is refused
        return _refusal(UnsafeModelError(f"the check failed with {type(error).__name__}", field="model"))
    return {"ok": True}


def _refusal(error: ArtifactError) -> dict[str, Any]:
    return {"error": str(error), "field": error.field, "expected": error.expected, "was": error.was}


def try_graph(model: ModelProto, data: bytes) -> None:
    """Load the graph as it is served and score rows of zeros: constants are folded and tensors filled here first.

    Raises UnsafeModelError when ONNX Runtime cannot.
    """
    values = check_model.graph_inputs(model)
    try:
        session = runtime.open_session(data)
        for rows in TRIAL_ROWS:
            session.run(None, {value.name: _zeros(value, rows) for value in values})
    except ArtifactError as error:
        raise UnsafeModelError(str(error), field="model.onnx") from error
    except Exception as error:  # onnxruntime raises a type of its own per cause, all from Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UnsafeModelError(f"ONNX Runtime does not score rows of zeros: {reason}", field="model.onnx") from error


def _zeros(value: onnx.ValueInfoProto, rows: int) -> Any:
    shape = [rows, *(int(dim or 0) for dim in (check_model.dimensions(value) or ())[1:])]
    return np.zeros(shape, helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))

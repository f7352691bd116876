"""The other side of `export.sandbox`: a process that parses, checks and tries one model, and says what it found.

It is started for one file and ends with it. What it was started for comes on standard input, what it says goes to
standard output: a line once its limits are in force, then one JSON object.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from export.sandbox import FOREST, GRAPH, READY
from tickserve.errors import ArtifactError, UnsafeModelError

Check = Callable[[bytes], None]
TRIAL_ROWS = (1, 2)
OPEN_FILES = 16


def main(kind: str, memory_bytes: int, cpu_s: int) -> None:
    """Limit this process, then judge the model on standard input."""
    check = {GRAPH: graph_check, FOREST: forest_check}[kind]()
    limit(memory_bytes, cpu_s)
    _say(READY)
    with open(0, "rb", closefd=False) as source:
        verdict = judge(check, source.read())
    _say(json.dumps(verdict).encode())
    # Without taking apart what a hostile file built up: that could take longer than all before.
    os._exit(0)


def limit(memory_bytes: int, cpu_s: int) -> None:
    """Put this process under its limits, for good: address space, CPU time, open files; and no byte to any file."""
    _set(resource.RLIMIT_AS, memory_bytes, memory_bytes)
    _set(resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)
    _set(resource.RLIMIT_FSIZE, 0, 0)
    _set(resource.RLIMIT_CORE, 0, 0)
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


def judge(check: Check, data: bytes) -> dict[str, Any]:
    """`{"ok": true}`, or why the model is refused: `error`, `field`, `expected`, `was`, and whether it is `unsafe`."""
    try:
        check(data)
    except ArtifactError as error:
        return _refusal(error)
    except MemoryError:
        return _refusal(UnsafeModelError("more memory than its check allows", field="model"))
    except Exception as error:  # a parser's own type per cause: whatever a stranger's file raised, it is refused
        return _refusal(UnsafeModelError(f"the check failed with {type(error).__name__}", field="model"))
    return {"ok": True}


def _refusal(error: ArtifactError) -> dict[str, Any]:
    found = {name: getattr(error, name) for name in ("field", "expected", "was")}
    # ONNX Runtime names the source files it was built from.
    return {"error": re.sub(r"/\S+", "...", str(error)), "unsafe": isinstance(error, UnsafeModelError), **found}


def graph_check() -> Check:
    """What a graph is held to: parsed, checked, loaded as it is served, and rows of zeros scored.

    Constants are folded and tensors filled here before they are anywhere else. Libraries are loaded by this call, not
    by the check: afterwards few files may be open.
    """
    from export import check_model, runtime

    def check(data: bytes) -> None:
        inputs = check_model.graph_inputs(check_model.parse_model(data))
        try:
            session = runtime.open_session(data)
            for rows in TRIAL_ROWS:
                session.run(None, {value.name: check_model.zeros(value, rows) for value in inputs})
        except ArtifactError as error:
            raise UnsafeModelError(str(error), field="model.onnx") from error
        except Exception as error:  # onnxruntime raises a type of its own per cause, all from Exception
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UnsafeModelError(f"it does not score rows of zeros: {reason}", field="model.onnx") from error

    return check


def forest_check() -> Check:
    """What a forest is held to: read, checked, and rows of zeros and of nothing scored."""
    import xgboost

    from export import trees

    def check(data: bytes) -> None:
        booster = trees.read_booster(data)
        trees.check_forest(booster)
        for value in (0.0, np.nan):
            rows = np.full((2, booster.num_features()), value, np.float32)
            booster.predict(xgboost.DMatrix(rows, missing=np.nan, nthread=1))

    return check

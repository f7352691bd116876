"""A stranger's model is first parsed, checked and tried in a process of its own, which may die of it; this one may not.

The limits bound what a file can cost: address space, CPU seconds, seconds on the clock; nothing is written. They do not
make a stranger's code safe, and none is run: operators outside ONNX Runtime's own are refused before it loads a graph.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tickserve.errors import ArtifactError, ComponentError, UnsafeModelError
from tickserve.store import sha256_bytes

# What is judged: a graph in ONNX, or an XGBoost forest in UBJSON.
GRAPH, FOREST = "graph", "forest"
READY = b"ready\n"
START_S = 60.0
ENDING_S = 5.0
# A pipe takes this much without a reader, so an honest answer never waits for one.
MAX_ANSWER_BYTES = 16 * 1024
MAX_KNOWN_GOOD = 512
# It ends with the thread that started it (PR_SET_PDEATHSIG is 1): an interrupt may come before there is a handle on it.
WORKER = (
    f"import ctypes, os, sys; ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)}); "
    "os.getppid() == int(sys.argv[4]) or os._exit(1); sys.path[:] = sys.argv[5:]; "
    "from export import inspection; inspection.main(sys.argv[1], *map(int, sys.argv[2:4]))"
)
# One thread each: every thread's stack counts as address space.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Limits:
    """What checking one graph may cost: bytes of address space, seconds of CPU, seconds on the clock."""

    memory_bytes: int = 2 * 1024**3
    cpu_s: int = 20
    wall_s: float = 60.0
    # Parsing and folding hold a file several times over.
    memory_per_byte: int = 8


LIMITS = Limits()
_known_good: dict[str, None] = {}


def inspect(data: bytes, kind: str = GRAPH, limits: Limits = LIMITS) -> None:
    """Return when the model in `data` passed every check of `export.inspection`; the same bytes are checked once.

    Raises UnsafeModelError when its content is not safe, or when the check ran into a limit or died of it,
    ArtifactError when it is no such model, and ComponentError when the process that checks cannot start.
    """
    known = f"{kind} {sha256_bytes(data)}"
    if known in _known_good:
        return
    with _file_in_memory(data) as source, _worker(source, kind, len(data), limits) as worker:
        answer = _answer(worker, limits)
    if answer.get("ok") is not True:
        raise _refusal(answer)
    while len(_known_good) >= MAX_KNOWN_GOOD:
        _known_good.pop(next(iter(_known_good)), None)
    _known_good[known] = None


@contextmanager
def _file_in_memory(data: bytes) -> Iterator[int]:
    """A descriptor that reads `data` from its start: no path, and no writer that could block on a dead reader."""
    descriptor = os.memfd_create("model", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _worker(source: int, kind: str, size: int, limits: Limits) -> Iterator[subprocess.Popen[bytes]]:
    """The process that checks, killed by its own id and waited for, whatever happens."""
    path = [str(Path(entry).resolve()) for entry in sys.path]
    memory_bytes = limits.memory_bytes + limits.memory_per_byte * size
    command = [sys.executable, "-I", "-B", "-c", WORKER, kind, str(memory_bytes), str(limits.cpu_s)]
    command += [str(os.getpid()), *path]
    try:
        process = subprocess.Popen(
            command,
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": os.defpath} | ONE_THREAD,
            # A terminal's Ctrl-C is not for it: a check that died of that would be taken for the model's fault.
            process_group=0,
        )
    except OSError as error:
        raise ComponentError(f"the process that checks model files cannot start: {error.strerror}") from error
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _answer(worker: subprocess.Popen[bytes], limits: Limits) -> dict[str, Any]:
    said = _read(worker, len(READY), time.monotonic() + START_S)
    if said != READY:
        raise ComponentError("the process that checks model files did not start", field="export.inspection")
    text = _read(worker, MAX_ANSWER_BYTES, time.monotonic() + limits.wall_s)
    if text is None:
        return {"error": f"its check took more than {limits.wall_s:g} s", "field": "model"}
    with suppress(subprocess.TimeoutExpired):  # it said all it had to say and then did not end: killed by the caller
        worker.wait(ENDING_S)
    try:
        answer = json.loads(text)
    except ValueError:
        return {"error": f"the check died of it: {_ending(worker.returncode)}", "field": "model"}
    return answer if isinstance(answer, dict) else {}


def _read(worker: subprocess.Popen[bytes], size: int, deadline: float) -> bytes | None:
    """Up to `size` bytes, fewer at the end of the answer; None when the deadline passed first."""
    assert worker.stdout is not None  # noqa: S101 - it was asked for
    descriptor, parts, missing = worker.stdout.fileno(), [], size
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while missing:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1_000):
            return None
        part = os.read(descriptor, missing)
        if not part:
            break
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit status {code}"
    if -code == signal.SIGXCPU:
        return "out of CPU time"
    return signal.Signals(-code).name


def _refusal(answer: dict[str, Any]) -> ArtifactError:
    """The typed error of the other process; its words are shortened, for a stranger's file may have chosen some."""
    kind = ArtifactError if answer.get("unsafe") is False else UnsafeModelError
    words = {
        name: str(answer[name])[:300] if answer.get(name) else None for name in ("error", "field", "expected", "was")
    }
    error = kind(words["error"] or "the check gave no reason")
    error.field, error.expected, error.was = words["field"], words["expected"], words["was"]
    return error

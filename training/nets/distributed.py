"""A fit in several processes of this machine: the task on disk, `torchrun` over it, and what the first process learned.

`python -m training.nets.launch FOLDER` is what each process runs; started by a `torchrun` over several machines that
see the folder, it does the same. Arrays travel as `.npy` files that the processes map, so that there is one copy of
them, in the page cache or in shared memory.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import deque
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from safetensors.torch import load_file

from tickserve import config, errors
from tickserve.errors import ComponentError, TickserveError
from tickserve.store import unwritable, write_json_atomic
from training.job import Watch
from training.nets.task import Task
from training.nets.trainer import Learned

ARRAYS = ("features", "classes", "train", "validation", "mean", "std")
TASK, RESULT, WEIGHTS, FAILURE = "task.json", "result.json", "weights.safetensors", "failure.json"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lives
ROOT = Path(__file__).resolve().parents[2]
LOSS = "tickserve-epoch "
REASON = re.compile(r"Error: |Signal \d+")
STOP_S = 10.0
# Of what torchrun prints, which ends with a table longer than the reason before it.
MOST_LINES = 400
# Runs before torchrun, which is to end with this process however that ends: PR_SET_PDEATHSIG is 1.
DIE_WITH_PARENT = (
    "import ctypes, os, runpy, signal, sys\n"
    f"ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)})\n"
    "if os.getppid() != int(sys.argv.pop(1)): raise SystemExit(1)\n"
    "runpy.run_module('torch.distributed.run', run_name='__main__', alter_sys=True)\n"
)


def learn_together(task: Task, watch: Watch | None = None) -> Learned:
    """Fit a task in `trainer.processes` processes. `watch` is told each epoch's validation loss.

    Raises what the first process failed with, ComponentError when one was lost or the folder cannot be written.
    """
    place = SHARED_MEMORY if task.trainer.shared_memory else None
    with tempfile.TemporaryDirectory(prefix="tickserve-fit-", dir=place) as name:
        folder = Path(name)
        write_task(task, folder)
        _run(folder, task.trainer.processes, watch)
        said = json.loads((folder / RESULT).read_text())
        return Learned(load_file(folder / WEIGHTS), said["best"], said["resumed_at"])


def write_task(task: Task, folder: Path) -> None:
    """Put a task into `folder`; features that are mapped from a file stay where they are. Raises ComponentError."""
    places: dict[str, str] = {}
    try:
        for name in ARRAYS:
            places[name] = _place(getattr(task, name), folder / f"{name}.npy")
    except OSError as error:
        raise unwritable(folder, error) from error
    checkpoints = str(Path(task.trainer.checkpoint_folder).resolve())
    said = {
        "name": task.name,
        "architecture": task.architecture,
        "section": type(task.settings).__name__,
        "settings": task.settings.model_dump(),
        "trainer": task.trainer.model_dump() | {"checkpoint_folder": checkpoints},
        "seed": task.seed,
        "window": task.window,
        "arrays": places,
    }
    write_json_atomic(folder / TASK, said)


def _place(array: Any, path: Path) -> str:
    """Where the array is as a whole `.npy` file: its own, if it is mapped from one, else written to `path`."""
    own = getattr(array, "filename", None)
    if own is not None and np.load(own, mmap_mode="r", allow_pickle=False).shape == array.shape:
        return str(own)
    np.save(path, array, allow_pickle=False)
    return str(path)


def read_task(folder: Path) -> Task:
    """The task that `write_task` put into `folder`, its arrays mapped."""
    said = json.loads((folder / TASK).read_text())
    arrays: dict[str, Any] = {
        name: np.load(path, mmap_mode="r" if name == "features" else None, allow_pickle=False)
        for name, path in said["arrays"].items()
    }
    return Task(
        name=said["name"],
        architecture=said["architecture"],
        settings=getattr(config, said["section"])(**said["settings"]),
        trainer=config.TrainerSettings(**said["trainer"]),
        seed=said["seed"],
        window=said["window"],
        **arrays,
    )


def _run(folder: Path, processes: int, watch: Watch | None) -> None:
    """`torchrun` to its end; what it prints is read as it comes."""
    torchrun = ["--standalone", "--nproc-per-node", str(processes), "-m", "training.nets.launch", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-c", DIE_WITH_PARENT, str(os.getpid()), *torchrun],
        cwd=ROOT,
        # All of them are on this machine: nothing has to listen where others reach it.
        env={"GLOO_SOCKET_IFNAME": "lo"} | os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    last: deque[str] = deque(maxlen=MOST_LINES)
    reader = Thread(target=lambda: last.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        for line in process.stdout or ():
            if watch and line.startswith(LOSS):
                watch(**json.loads(line.removeprefix(LOSS)))
        process.wait()
    finally:
        _stop(process)
        reader.join(STOP_S)
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()
    if process.returncode:
        raise _failure(folder, process.returncode, last)


def _stop(process: subprocess.Popen[str]) -> None:
    """End the processes, which are a group of their own, if they are still there."""
    for kill in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, kill)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)


def _failure(folder: Path, code: int, last: deque[str]) -> TickserveError:
    """What a process said it failed with, else that one was lost."""
    if (folder / FAILURE).is_file():
        said = json.loads((folder / FAILURE).read_text())
        kind = getattr(errors, said["type"], ComponentError)
        return kind(said["message"])
    told = [line.strip() for line in last if REASON.search(line) and "ChildFailedError" not in line]
    reason = told[-1][:300] if told else "it gave no reason"
    return ComponentError(f"a training process was lost (exit code {code}): {reason}", field="trainer.processes")

"""One of the processes of a fit: `torchrun --nproc-per-node 2 -m training.nets.launch FOLDER`.

The folder holds a task (`training.nets.distributed`); the first process puts the weights and what came of it there, and
prints the validation loss of each epoch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import torch.distributed
from safetensors.torch import save_file

from tickserve.errors import TickserveError
from tickserve.store import write_json_atomic
from training.nets.distributed import FAILURE, LOSS, RESULT, WEIGHTS, read_task
from training.nets.trainer import Learned, learn


def main(folder: Path) -> int:
    """Take part in the fit; the exit code."""
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        learned = learn(read_task(folder), _tell if first else None)
    except TickserveError as error:
        write_json_atomic(folder / FAILURE, {"type": type(error).__name__, "message": str(error)})
        return error.exit_code
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if first:
        _answer(folder, learned)
    return 0


def _tell(step: int, loss: float) -> None:
    sys.stdout.write(LOSS + json.dumps({"step": step, "loss": loss}) + "\n")
    sys.stdout.flush()


def _answer(folder: Path, learned: Learned) -> None:
    save_file(learned.weights, folder / WEIGHTS)
    write_json_atomic(folder / RESULT, {"best": learned.best, "resumed_at": learned.resumed_at})


def leave(code: int) -> NoReturn:
    """End this process here: what a distributed torch takes down after the interpreter aborts now and then.

    Everything is written and the group is taken down by then. Without this, one run in ten to thirty of a busy machine
    ends with "terminate called without an active exception" and SIGABRT, in a seven-line script of torch alone too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        code = main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)

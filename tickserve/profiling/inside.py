"""The profiled process: `python -m tickserve.profiling.inside FOLDER TOOL ... -- COMMAND`.

It runs one `tickserve` command as the `tickserve` program would, under cProfile or torch.profiler where the tool is one
of them, and leaves the exit code in a file: a profiler around a process may answer with a code of its own.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tickserve.store import write_atomic, write_json_atomic

EXIT_CODE = "exit_code"
PROF = "profile.prof"
TRACE = "trace.json"
OPERATORS = "operators.json"
PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="tickserve.profiling.inside")
    parser.add_argument("folder", type=Path)
    parser.add_argument("tool")
    parser.add_argument("--stdout", type=int, help="descriptor of the command's output")
    parser.add_argument("--stderr", type=int)
    given, command = _split(arguments)
    chosen = parser.parse_args(given)
    _end_with_the_profiler()
    for number, asked in ((1, chosen.stdout), (2, chosen.stderr)):
        if asked is not None:
            os.dup2(asked, number)
    sys.argv = ["tickserve", *command]
    sys.modules["__main__"].__package__ = None  # or messages would call the program by this module's name
    code = RUNNERS.get(chosen.tool, _plainly)(chosen.folder)
    write_atomic(chosen.folder / EXIT_CODE, str(code).encode())
    return code


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    place = list(arguments).index("--")
    return list(arguments[:place]), list(arguments[place + 1 :])


def _end_with_the_profiler() -> None:
    """Be told to end when the process that started this one is gone: nothing is left running without its profiler."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _command() -> int:
    """The exit code of the command in `sys.argv`."""
    from tickserve import cli

    try:
        cli.main()
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        sys.stderr.write(f"{ended.code}\n")
        return 1
    return 0


def _plainly(_: Path) -> int:
    return _command()


def _cprofile(folder: Path) -> int:
    profiler = cProfile.Profile()
    try:
        return profiler.runcall(_command)
    finally:
        profiler.dump_stats(folder / PROF)


def _torch(folder: Path) -> int:
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) as profiler:
        code = _command()
    profiler.export_chrome_trace(str(folder / TRACE))
    write_json_atomic(folder / OPERATORS, _operators(profiler.key_averages()))
    return code


def _operators(averages: Any) -> list[dict[str, Any]]:
    """Every operator, the one with the most time of its own first; `gpu_us` is None where no GPU worked."""
    rows = [
        {
            "operator": each.key,
            "calls": each.count,
            "own_us": round(each.self_cpu_time_total, 1),
            "total_us": round(each.cpu_time_total, 1),
            "gpu_us": round(each.self_device_time_total, 1) or None,
        }
        for each in averages
    ]
    return sorted(rows, key=lambda row: -(row["own_us"] + (row["gpu_us"] or 0.0)))


RUNNERS: dict[str, Callable[[Path], int]] = {"cprofile": _cprofile, "torch": _torch}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

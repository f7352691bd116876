"""The profilers: the command line of each, what it leaves, and what that is opened with."""

from __future__ import annotations

import json
import pstats
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from tickserve.doctor.installed import program
from tickserve.errors import ComponentError, MissingExtraError, UsageError
from tickserve.profiling.inside import OPERATORS, PROF, TRACE
from tickserve.stages import checkout_root

Tool = Literal["cprofile", "py-spy", "torch", "nsys"]
TOOLS: tuple[Tool, ...] = get_args(Tool)
Format = Literal["speedscope", "flamegraph"]
FORMATS: tuple[Format, ...] = get_args(Format)
RATE = 100
NSYS_NAME = "nsys"
# CUDA calls and kernels, ranges, what waits in the C library, and the two libraries nets spend their time in.
NSYS_TRACES = "cuda,nvtx,osrt,cudnn,cublas"
SPY_FILES: Mapping[Format, str] = {"speedscope": "py-spy.speedscope.json", "flamegraph": "py-spy.svg"}
SPY_LOG = "py-spy.log"
REFUSED = ("permission denied", "operation not permitted", "eperm")
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
SEEN = {
    "cprofile": "Python functions of the main thread",
    "py-spy": "Python stacks of all threads and child processes, sampled",
    "torch": "PyTorch's operators, and its kernels where there is a GPU",
    "nsys": "CUDA calls and kernels, ranges, and what waits in the C library",
}


@dataclass(frozen=True)
class File:
    """A file that a profiler left: what it is and what opens it."""

    path: Path
    what: str
    open_with: str

    def to_json(self) -> dict[str, str]:
        """The file as a JSON object."""
        return {"path": str(self.path), "what": self.what, "open_with": self.open_with}


@dataclass(frozen=True)
class Asked:
    """What is profiled: the tool, the `tickserve` command behind it, and the options of py-spy."""

    tool: Tool
    command: Sequence[str]
    format: Format = "speedscope"
    rate: int = RATE

    def result(self, folder: Path) -> Path:
        """The file that has to be there afterwards."""
        names = {"cprofile": PROF, "py-spy": SPY_FILES[self.format], "torch": TRACE, "nsys": f"{NSYS_NAME}.nsys-rep"}
        return folder / names[self.tool]


def check(asked: Asked) -> None:
    """Refuse what cannot be profiled.

    Raises UsageError for the command, MissingExtraError or ComponentError for a profiler that is not here.
    """
    if not asked.command:
        hint = "e.g. tickserve profile -- train --data FILE"
        raise UsageError("nothing to profile", field="COMMAND", expected="a tickserve command after --", hint=hint)
    if asked.command[0] == "profile":
        raise UsageError("a profiler is not profiled", field="COMMAND", was="profile")
    if asked.tool == "py-spy" and program("py-spy") is None:
        raise MissingExtraError.of("py-spy", "profile")
    if asked.tool == "torch" and find_spec("torch") is None:
        raise MissingExtraError.of("torch", "train")
    if asked.tool == "nsys" and program("nsys") is None:
        hint = "install NVIDIA Nsight Systems, or use --tool torch or py-spy"
        raise ComponentError("Nsight Systems is not on the PATH", field="nsys", hint=hint)


def command_line(asked: Asked, folder: Path, descriptors: tuple[int, int] | None = None) -> list[str]:
    """What is started; `descriptors` are the command's output and errors where the tool takes its own for itself."""
    given = ["--stdout", str(descriptors[0]), "--stderr", str(descriptors[1])] if descriptors else []
    inside = [sys.executable, "-m", "tickserve.profiling.inside", str(folder), asked.tool, *given, "--", *asked.command]
    if asked.tool == "py-spy":
        options = ["--format", asked.format, "--output", str(asked.result(folder)), "--rate", str(asked.rate)]
        return [str(program("py-spy")), "record", *options, "--subprocesses", "--", *inside]
    if asked.tool == "nsys":
        options = [f"--output={folder / NSYS_NAME}", "--force-overwrite=true", f"--trace={NSYS_TRACES}"]
        return [str(program("nsys")), "profile", *options, "--sample=process-tree", *inside]
    return inside


def files(asked: Asked, folder: Path) -> list[File]:
    """What the tool left in `folder`. Raises ComponentError where its result is not there, with the tool's reason."""
    result = asked.result(folder)
    if not result.is_file():
        raise _nothing_left(asked, folder)
    if asked.tool == "cprofile":
        return [File(result, "functions and their callers", f"python -m pstats {result}, or snakeviz {result}")]
    if asked.tool == "py-spy":
        viewer = "https://www.speedscope.app (it stays in the browser)" if asked.format == "speedscope" else "a browser"
        return [File(result, "sampled stacks over time" if asked.format == "speedscope" else "flame graph", viewer)]
    if asked.tool == "torch":
        trace = File(result, "operators over time", "https://ui.perfetto.dev or chrome://tracing")
        return [File(folder / OPERATORS, "time of each operator", "any reader of JSON"), trace]
    return [File(result, "timeline of CPU and GPU", f"nsys-ui {result}, or nsys stats {result}")]


def _nothing_left(asked: Asked, folder: Path) -> ComponentError:
    log = folder / SPY_LOG
    text = log.read_text(errors="replace") if log.is_file() else ""
    said = [line.strip() for line in text.splitlines() if line.strip()]
    if any(word in text.lower() for word in REFUSED):
        hint = "sysctl kernel.yama.ptrace_scope=0, in a container --cap-add SYS_PTRACE; or use --tool cprofile"
        return ComponentError("the kernel does not let py-spy read another process (ptrace)", field="py-spy", hint=hint)
    reason = f": {said[-1][:200]}" if said else ""
    return ComponentError(f"it left no profile{reason}", field=asked.tool)


def top(asked: Asked, folder: Path, count: int) -> list[dict[str, Any]]:
    """Where the time went, the most of it first, for the tools whose result can be read here."""
    if asked.tool == "cprofile":
        return _functions(folder / PROF, count)
    if asked.tool == "torch":
        operators: list[dict[str, Any]] = json.loads((folder / OPERATORS).read_bytes())
        return operators[:count]
    return []


def _functions(path: Path, count: int) -> list[dict[str, Any]]:
    """The functions with the most time of their own; `total_s` is with what they called."""
    stats: Any = pstats.Stats(str(path))
    rows = [
        {"function": _shown(*where), "calls": calls, "own_s": round(own, 4), "total_s": round(total, 4)}
        for where, (_, calls, own, total, _) in stats.stats.items()
    ]
    return sorted(rows, key=lambda row: -row["own_s"])[:count]


def _shown(file: str, line: int, name: str) -> str:
    """A function with its file from the package on: where it is installed says nothing."""
    if file == "~":
        return ADDRESS.sub("", name)
    path = Path(file)
    for base in (checkout_root(), *(each for each in path.parents if each.name == "site-packages")):
        if path.is_relative_to(base):
            return f"{path.relative_to(base)}:{line}({name})"
    return f"{path.name}:{line}({name})"

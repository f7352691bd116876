"""The stub processes of a server, one for each model instance: which there are, and which of them died.

When a stub is killed this build of Triton goes on calling itself and the model ready and answers nothing, so somebody
else has to look.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
RESIDENT = re.compile(r"^(VmRSS|RssAnon|RssShmem):\s+(\d+) kB$", re.MULTILINE)
DEAD = ("Z", "X")
STOPPED = ("T", "t")


@dataclass(frozen=True)
class Stub:
    """One stub: what it scores, and whether it is stopped (SIGSTOP, a debugger), which answers nothing either."""

    pid: int
    model: str
    version: int
    stopped: bool

    def __str__(self) -> str:
        return f"model {self.model!r} version {self.version}"


def stubs_of(server: int) -> dict[int, Stub]:
    """The server's living stubs by process id."""
    found = {}
    for entry in PROC.iterdir():
        if entry.name.isdecimal():
            stub = _stub(entry, server)
            if stub is not None:
                found[stub.pid] = stub
    return found


def resident_bytes(pids: Iterable[int]) -> int:
    """The resident sizes of these processes together; one that has ended counts nothing."""
    total = 0
    for pid in pids:
        with suppress(OSError, ValueError, IndexError):
            total += int((PROC / str(pid) / "statm").read_text().split()[1])
    return total * os.sysconf("SC_PAGE_SIZE")


def allocated_bytes(pids: Iterable[int]) -> int:
    """What these processes have resident of their own: anonymous and shared memory, and no page of a mapped file.

    A library's code is read in when it is first run and dropped when the machine needs the memory, so only this tells a
    leak. Where the kernel does not tell them apart (gVisor) it is the whole resident size.
    """
    total = 0
    for pid in pids:
        with suppress(OSError):
            found = dict(RESIDENT.findall((PROC / str(pid) / "status").read_text("utf-8", "replace")))
            own = [found[kind] for kind in ("RssAnon", "RssShmem") if kind in found]
            total += sum(map(int, own or [found.get("VmRSS", 0)]))
    return total * 1024


def _stub(entry: Path, server: int) -> Stub | None:
    with suppress(OSError, ValueError, IndexError):
        # "pid (name) state parent ...", and the name may hold anything.
        state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        if int(parent) != server or state in DEAD:
            return None
        # Triton's first argument to a stub is the model's file: .../<model>/<version>/model.onnx.
        file = Path((entry / "cmdline").read_text("utf-8", "replace").split("\0")[1])
        return Stub(int(entry.name), file.parts[-3], int(file.parts[-2]), state in STOPPED)
    return None

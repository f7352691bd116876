"""The stub processes of a server, one for each model instance: which there are, and which of them died.

When a stub is killed this build of Triton goes on calling itself and the model ready and answers nothing, so somebody
else has to look.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
DEAD = ("Z", "X")


def stubs_of(server: int) -> dict[int, str]:
    """The server's living stubs by process id, each with the model and version it scores."""
    found = {}
    for entry in PROC.iterdir():
        if entry.name.isdecimal() and _child(entry, server):
            found[int(entry.name)] = _scores(entry)
    return found


def alive(server: int, stub: int) -> bool:
    """Whether `stub` still runs as a child of `server`."""
    return _child(PROC / str(stub), server)


def _child(entry: Path, server: int) -> bool:
    # "pid (name) state parent ...", and the name may hold anything.
    with suppress(OSError, ValueError, IndexError):
        state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        return int(parent) == server and state not in DEAD
    return False


def _scores(entry: Path) -> str:
    """Triton's first argument to a stub is the model's file: .../<model>/<version>/model.onnx."""
    with suppress(OSError, IndexError):
        file = Path((entry / "cmdline").read_text("utf-8", "replace").split("\0")[1])
        return f"model {file.parts[-3]!r} version {file.parts[-2]}"
    return "a model"

"""Run files: how a process of this user finds the server that `tickserve serve` runs on this machine.

A file of a server holds its addresses and the credential of its closed APIs, so it is for its owner alone.
`serving/runfile.py` writes and removes them; here they are only read, by whoever has no more than the package.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tickserve.errors import ComponentError

FILE_MODE = 0o600
FOLDER_MODE = 0o700
MAX_BYTES = 64 * 1024
OTHERS = 0o077
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class LocalServer:
    """What a run file says of a server that runs: its HTTP address and the (header, value) of its closed APIs.

    `exposed` says how others may have come to the file; empty where they cannot.
    """

    http: str
    credential: tuple[str, str]
    exposed: str = ""


def folder() -> Path:
    """Where this user's run files are, or would be."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    return Path(given) / "tickserve" if given else Path(tempfile.gettempdir()) / f"tickserve-run-{os.getuid()}"


def check_folder(found: os.stat_result) -> None:
    """Raises ComponentError for a runtime folder that is not this user's alone."""
    if not stat.S_ISDIR(found.st_mode) or _exposed(found):
        raise ComponentError(
            "the runtime folder is open to others",
            field="XDG_RUNTIME_DIR",
            expected=f"a folder of this user with mode {FOLDER_MODE:o}",
            was=_exposed(found) or "no folder",
        )


def local_servers() -> list[LocalServer]:
    """The servers of this user that run, by their files; nothing is made, changed or removed.

    Raises ComponentError for a folder that is not this user's alone.
    """
    where = folder()
    try:
        check_folder(where.lstat())
        paths = sorted(where.glob("*.json"))
    except OSError:
        return []
    return [server for path in paths if (server := _read(path)) is not None]


def same_server(one: str, other: str) -> bool:
    """Whether two addresses ("host:port") are of one server, by whatever name of this machine's."""
    (one_host, _, one_port), (other_host, _, other_port) = one.lower().rpartition(":"), other.lower().rpartition(":")
    return one_port == other_port and (one_host == other_host or {one_host, other_host} <= set(LOOPBACK))


def started_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot: with it, a process id is never mistaken for a later one's."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _read(path: Path) -> LocalServer | None:
    """The server of one file; None for what is no such file, and for one that a killed server left behind."""
    try:
        # Neither a link is followed nor a pipe waited for.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            value = json.loads(file.read(MAX_BYTES)) if stat.S_ISREG(found.st_mode) else {}
        name, secret = value["credential"]
        if not started_ticks(int(value["pid"])) == value["started"] != 0:
            return None
        return LocalServer(str(value["http"]), (str(name), str(secret)), _exposed(found))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _exposed(found: os.stat_result) -> str:
    if found.st_uid != os.getuid():
        return "another user's"
    return f"mode {stat.S_IMODE(found.st_mode):o}" if found.st_mode & OTHERS else ""

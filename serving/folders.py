"""Folders of servers: temporary ones, each locked by its owner and swept away after it; a user's own for run files."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from tickserve import runfile
from tickserve.runfile import started_ticks as started_ticks
from tickserve.store import unwritable

PREFIX = "tickserve-triton-"
LOCK_NAME = ".owner"
# A folder whose owner has not signed yet is being made.
SIGNED_WITHIN_S = 60.0
OWNED = re.compile(re.escape(PREFIX) + r"([1-9][0-9]*)-.+")


class OwnedFolder:
    """A new temporary folder of this process; `remove` ends it, and so does the next start after a crash.

    Its owner's file is locked for as long as the owner lives, and says when the owner started.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self._lock = (self.path / LOCK_NAME).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._lock.write(str(started_ticks(os.getpid())))
        self._lock.flush()

    def remove(self) -> None:
        """Remove the folder with all in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def sweep() -> None:
    """Remove the folders of this user's processes that are gone, for whatever reason they did not do it themselves."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        match = OWNED.fullmatch(path.name)
        if match and _ours(path) and _abandoned(path, int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _abandoned(path: Path, pid: int) -> bool:
    """Whether the owner is gone: its process id is nobody's, or that of another process, and nobody holds its lock.

    A process id alone proves nothing: in a container each start may have the one that was killed, and a process of
    another container is not seen here at all.
    """
    signed = _signature(path)
    if signed is None or (not signed and _is_fresh(path)):
        return False
    another = signed.isdecimal() and started_ticks(pid) not in (0, int(signed))
    return (another or not _alive(pid)) and not _locked(path)


def _signature(path: Path) -> str | None:
    """What the owner wrote; empty before it did, None when it cannot be read."""
    try:
        return (path / LOCK_NAME).read_text("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError):
        return None


def _is_fresh(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < SIGNED_WITHIN_S
    except OSError:
        return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _ours(path: Path) -> bool:
    try:
        return path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.getuid()
    except OSError:
        return False


def _locked(path: Path) -> bool:
    """Whether an owner holds it whom we cannot see: one in another container that shares the temporary folder."""
    try:
        with (path / LOCK_NAME).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def runtime_folder() -> Path:
    """The folder of this user for such files, made on first use. Raises ComponentError when it is not ours alone."""
    folder = runfile.folder()
    try:
        folder.mkdir(mode=runfile.FOLDER_MODE, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise unwritable(folder, error) from error
    runfile.check_folder(found)
    return folder

"""Folders of servers: temporary ones, each locked by its owner and swept away after it; a user's own for run files."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

from tickserve.errors import ComponentError
from tickserve.store import unwritable

PREFIX = "tickserve-triton-"
LOCK_NAME = ".owner"
FOLDER_MODE = 0o700
OWNED = re.compile(re.escape(PREFIX) + r"([1-9][0-9]*)-.+")


class OwnedFolder:
    """A new temporary folder of this process; `remove` ends it, and so does the next start after a crash."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self._lock = (self.path / LOCK_NAME).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Remove the folder with all in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def sweep() -> None:
    """Remove the folders of this user's processes that are gone, for whatever reason they did not do it themselves."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        match = OWNED.fullmatch(path.name)
        if match and not _alive(int(match[1])) and _ours(path) and not _locked(path):
            shutil.rmtree(path, ignore_errors=True)


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
    given = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(given) / "tickserve" if given else Path(tempfile.gettempdir()) / f"tickserve-run-{os.getuid()}"
    try:
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise unwritable(folder, error) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ComponentError(
            "the runtime folder is open to others",
            field="XDG_RUNTIME_DIR",
            expected=f"a folder of this user with mode {FOLDER_MODE:o}",
            was=f"mode {stat.S_IMODE(found.st_mode):o}",
        )
    return folder

"""One writer of a local repository at a time, by a lock file that a dead writer cannot keep."""

from __future__ import annotations

import fcntl
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tickserve.errors import ComponentError
from tickserve.store import unwritable

LOCK_NAME = ".publish.lock"
LOCK_WAIT_S = 60.0


@contextmanager
def locked(repository: Path, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """Hold the repository's lock file. Raises ComponentError when another publish holds it for longer than `wait_s`."""
    try:
        repository.mkdir(parents=True, exist_ok=True)
        file = (repository / LOCK_NAME).open("a")
    except OSError as error:
        raise unwritable(repository, error) from error
    with file:
        deadline = time.monotonic() + wait_s
        while not _try_lock(file):
            if time.monotonic() >= deadline:
                raise ComponentError("another publish holds this repository", field=LOCK_NAME, hint="try again later")
            time.sleep(0.02)
        yield


def _try_lock(file: io.TextIOWrapper) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

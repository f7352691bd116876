"""Following the version in force: a client that pins a repository folder notices a swap and asks for the new version.

`current.json` (tickserve/current.py) is looked at when a call begins, at most every `follow_ms`: one `stat`, and only
a file that changed is read. There is no thread, so an idle client costs nothing and its next call is right.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tickserve.client._fork import renew_after_fork
from tickserve.current import CURRENT_NAME, folder_in_force
from tickserve.errors import TickserveError, UsageError
from tickserve.manifest import MANIFEST_NAME

log = logging.getLogger("tickserve.client")

Mark = tuple[int, int, int]


class Follower:
    """Repins the models of `repository` through `repin` as their version in force changes. Safe for threads."""

    def __init__(
        self, repository: object, repin: Callable[[dict[str, Path]], None], models: Iterable[str], follow_ms: float
    ) -> None:
        folder = Path(repository) if isinstance(repository, str | Path) else None
        if folder is None or not folder.is_dir() or (folder / MANIFEST_NAME).exists():
            raise UsageError("there is nothing to follow", field="follow_ms", expected="manifest=<repository folder>")
        self._repository, self._repin = folder, repin
        self._every_ns, self._next_ns = int(follow_ms * 1e6), 0
        # They were pinned a moment ago; what has changed since is noticed at the first look.
        self._seen: dict[str, Mark | None] = dict.fromkeys(models)
        self.after_fork()
        renew_after_fork(self)

    def look(self) -> None:
        """Repin what has changed since the last look. What cannot be trusted is logged, and the old pin holds."""
        now = time.monotonic_ns()
        # Another thread that looks just now does it for this one too: its own call begins before the flip or after.
        if now < self._next_ns or not self._lock.acquire(blocking=False):
            return
        try:
            self._next_ns = now + self._every_ns
            for model, seen in self._seen.items():
                mark = _mark(self._repository / model / CURRENT_NAME)
                if mark is not None and mark != seen:
                    self._seen[model] = mark
                    self._take(model)
        finally:
            self._lock.release()

    def after_fork(self) -> None:
        """Another thread of the parent may have held the lock."""
        self._lock = threading.Lock()

    def _take(self, model: str) -> None:
        try:
            folder = folder_in_force(self._repository / model)
            if folder is not None:
                self._repin({model: folder})
        except (TickserveError, OSError) as error:
            log.warning("model %r: the version in force cannot be taken, the old one stays pinned: %s", model, error)


def _mark(path: Path) -> Mark | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size

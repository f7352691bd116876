"""Following the version in force: a client that pins a repository folder notices a swap and asks for the new version.

`current.json` (tickserve/current.py) is looked at when a call begins, at most every `follow_ms`: one `stat`, and only
a file that changed is read. The file says what is wanted, not what is loaded, so the servers are asked before the
client goes over (_ready.py): in a thread that lives for one question, while the calls go on with the old version. Of
these the first one after the answer goes over. While a server does not have the version, it is asked again, and the
log says so once.

Only the call that notices a change after a pause waits for the answer, for half a deadline at most: while nobody
called, the old version may have been drained and be gone. An idle client costs nothing and its next call is right.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tickserve.client._fork import renew_after_fork
from tickserve.client._ready import Servers
from tickserve.client._report import REPORTER
from tickserve.current import CURRENT_NAME, folder_in_force
from tickserve.errors import TickserveError, UsageError
from tickserve.manifest import MANIFEST_NAME

log = logging.getLogger("tickserve.client")

Mark = tuple[int, int, int]
AGAIN_NS = 100_000_000  # between an answer that said no and the next question
PAUSE_NS = 20_000_000  # calls closer together than this leave a swap no time to drain what they ask for


class _Change:
    """A version in force that is not pinned yet, and the question whether it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.version = folder, int(folder.name)
        self.problem: str | None = None
        self.told = False
        self.waited = True  # whether the one call that waits for the answer has come
        self.again_ns = 0
        self.answered: threading.Event | None = None  # of the question that is under way; None: nobody asks


class Follower:
    """Repins the models of `repository` through `repin` as their version in force changes. Safe for threads.

    `servers` are asked first; without them there is nobody to ask. `pinned` says which version of a model is pinned.
    The call that waits does so for at most `patience_s`.
    """

    def __init__(
        self,
        repository: object,
        repin: Callable[[dict[str, Path]], None],
        models: Iterable[str],
        follow_ms: float,
        *,
        servers: Servers | None = None,
        pinned: Callable[[str], int | None] = lambda model: None,
        patience_s: float = 0.0,
    ) -> None:
        folder = Path(repository) if isinstance(repository, str | Path) else None
        if folder is None or not folder.is_dir() or (folder / MANIFEST_NAME).exists():
            raise UsageError("there is nothing to follow", field="follow_ms", expected="manifest=<repository folder>")
        self._repository, self._repin = folder, repin
        self._servers, self._pinned, self._patience_s = servers, pinned, patience_s
        self._every_ns, self._next_ns, self._called_ns = int(follow_ms * 1e6), 0, 0
        # They were pinned a moment ago; what has changed since is noticed at the first look.
        self._seen: dict[str, Mark | None] = dict.fromkeys(models)
        self._changes: dict[str, _Change] = {}
        self.after_fork()
        renew_after_fork(self)

    def look(self) -> None:
        """Repin what has changed since the last look. What cannot be trusted is logged, and the old pin holds."""
        now = time.monotonic_ns()
        called, self._called_ns = self._called_ns, now
        paused = now - called > min(self._every_ns, PAUSE_NS)
        if paused and not all(change.waited for change in list(self._changes.values())):
            self._next_ns = 0  # who looked aside left the waiting to this call
        self._look(now, paused=paused)

    def look_aside(self) -> None:
        """Look for whoever is no call: nothing is waited for, and the next call after a pause still waits."""
        self._look(time.monotonic_ns(), paused=False, aside=True)

    def _look(self, now: int, *, paused: bool, aside: bool = False) -> None:
        # Another thread that looks just now does it for this one too: its own call begins before the flip or after.
        if now < self._next_ns or not self._lock.acquire(blocking=False):
            return
        try:
            self._next_ns = now + self._every_ns
            until = time.monotonic() + (self._patience_s if paused else 0.0)  # for all models together
            for model, seen in self._seen.items():
                mark = _mark(self._repository / model / CURRENT_NAME)
                if mark is not None and mark != seen:
                    self._seen[model] = mark
                    self._notice(model, until, aside=aside)
                elif model in self._changes:
                    change = self._changes[model]
                    if not aside and not change.waited:
                        change.waited = True
                        _wait(change, until)
                    self._go_over(model, change)
        finally:
            self._lock.release()

    def after_fork(self) -> None:
        """Another thread of the parent may have held the lock, and none of them asks in the child."""
        self._lock = threading.Lock()
        for change in self._changes.values():
            change.answered = None

    def _notice(self, model: str, until: float, *, aside: bool) -> None:
        """Take what `current.json` says by now, or begin to ask for it and wait for the answer `until` then."""
        before, folder = self._changes.pop(model, None), self._in_force(model)
        if folder is None:
            return
        change = _Change(folder)
        if self._servers is None or self._pinned(model) == change.version:
            self._take(model, folder)
            return
        change.told = before is not None and before.told and before.version == change.version
        change.waited = not aside
        self._changes[model] = change
        self._ask(model, change)
        _wait(change, until)
        self._go_over(model, change)

    def _go_over(self, model: str, change: _Change) -> None:
        """Repin when the servers are ready; say once that they are not, and ask again."""
        answered = change.answered
        if answered is not None and not answered.is_set():
            return
        if answered is not None and change.problem is None:
            del self._changes[model]
            if self._in_force(model) == change.folder:  # else the next look finds another one, and asks for that
                self._take(model, change.folder)
            return
        if answered is not None and not change.told:
            change.told = True
            held = f"model {model!r}: version {change.version} is in force, but {change.problem}"
            REPORTER.say(logging.WARNING, f"{held}; the old one stays pinned until it is loaded")
        if time.monotonic_ns() >= change.again_ns:
            self._ask(model, change)

    def _ask(self, model: str, change: _Change) -> None:
        """Have a thread ask the servers; `answered` is set when it has."""
        answered = change.answered = threading.Event()
        thread = threading.Thread(
            target=self._find_out, args=(model, change, answered), name="tickserve-follow", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no thread to be had: a later look tries again
            change.answered = None

    def _find_out(self, model: str, change: _Change, answered: threading.Event) -> None:
        assert self._servers is not None  # noqa: S101 - only where there is somebody to ask
        try:
            change.problem = self._servers.missing(model, change.version)
        except Exception as error:  # whatever it is, it is no yes, and this thread's to end
            change.problem = f"the servers could not be asked ({type(error).__name__})"
        change.again_ns = time.monotonic_ns() + AGAIN_NS
        answered.set()
        if change.problem is None:
            self._next_ns = 0  # the next call need not wait for its time to look

    def _in_force(self, model: str) -> Path | None:
        """The folder in force, its manifest held against the choice; None where there is none to be trusted."""
        try:
            return folder_in_force(self._repository / model)
        except (TickserveError, OSError) as error:
            _refuse(model, error)
            return None

    def _take(self, model: str, folder: Path) -> None:
        try:
            self._repin({model: folder})
        except (TickserveError, OSError) as error:
            _refuse(model, error)


def _wait(change: _Change, until: float) -> None:
    left_s = until - time.monotonic()
    if left_s > 0 and change.answered is not None:
        change.answered.wait(left_s)


def _refuse(model: str, error: Exception) -> None:
    log.warning("model %r: the version in force cannot be taken, the old one stays pinned: %s", model, error)


def _mark(path: Path) -> Mark | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size

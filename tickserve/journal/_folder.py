"""The folder of one journal: its segments, when a new one begins, which is removed, and what a crash left behind.

Several processes may write into one folder, each into segments of its own, which it holds locked; the lock goes with
the process, so a segment that can be locked has no writer any more.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tickserve import __version__
from tickserve.config import JournalSettings
from tickserve.errors import UsageError
from tickserve.journal._schema import SCHEMA
from tickserve.journal._segment import SUFFIX, Header, encode_header, torn_from
from tickserve.store import check_writable

HEADER_ROOM = 8 * 1024  # more than any header takes
LOG = logging.getLogger("tickserve.journal")


def path_of(given: object) -> Path:
    """The path that a caller gave. Raises UsageError for what is none."""
    if not isinstance(given, str | os.PathLike) or isinstance(os.fspath(given), bytes):
        raise UsageError("no path", field="path", expected="text or a Path", was=type(given).__name__)
    return Path(given)


def segment_paths(folder: Path) -> list[Path]:
    """The segments of a journal in the order they were begun; a session's own order is kept when a clock goes back."""
    named = [(path.name.removesuffix(SUFFIX).split("-"), path) for path in folder.glob(f"*{SUFFIX}")]
    known = [(parts, path) for parts, path in named if len(parts) == 3 and parts[0].isdigit() and parts[2].isdigit()]
    began: dict[str, int] = {}
    for (created, session, _), _path in known:
        began[session] = min(int(created), began.get(session, int(created)))
    return [path for _, path in sorted(known, key=lambda one: (began[one[0][1]], one[0][1], int(one[0][2])))]


class _Segment:
    """The file that is written to now, locked while it is. What cannot be written raises OSError."""

    def __init__(self, path: Path, header: bytes) -> None:
        self.size, self.opened_ns, self.synced_ns = 0, time.monotonic_ns(), time.monotonic_ns()
        self.unsynced = True
        self.path, self.header_size = path, len(header)
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.write(header)
        except OSError:
            with suppress(OSError):
                self.path.unlink()
            os.close(self.descriptor)
            raise

    def write(self, data: bytes) -> None:
        """Append `data`, whole or not at all."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.descriptor, view) :]
        except OSError:
            os.ftruncate(self.descriptor, self.size)
            os.lseek(self.descriptor, self.size, os.SEEK_SET)
            raise
        self.size += len(data)
        self.unsynced = True

    def sync(self) -> None:
        """Wait for the disk."""
        if self.unsynced:
            os.fsync(self.descriptor)
            self.synced_ns, self.unsynced = time.monotonic_ns(), False

    def close(self) -> None:
        """Sync and let go."""
        try:
            self.sync()
        finally:
            os.close(self.descriptor)


class JournalFolder:
    """Appends frames to the segments of one session. Not safe for threads: one writer calls it.

    What cannot be written raises OSError and leaves whole frames only. Raises ComponentError when the folder cannot be
    made or written to at all.
    """

    def __init__(self, folder: Path, settings: JournalSettings, label: str) -> None:
        self._folder, self._settings, self._label = folder, settings, label
        check_writable(folder)
        self._session, self._number = os.urandom(8).hex(), 0
        self._segment: _Segment | None = None
        repair(folder)

    def after_fork(self) -> None:
        """The open segment is the parent's, and so is its lock: a child only lets go of its descriptor."""
        if self._segment is not None:
            with suppress(OSError):
                os.close(self._segment.descriptor)
        self._session, self._number = os.urandom(8).hex(), 0
        self._segment = None

    def append(self, frame: bytes) -> None:
        """Write one frame, whole or not at all. Raises OSError."""
        if len(frame) > self._settings.segment_bytes - HEADER_ROOM:
            raise OSError(errno.EFBIG, f"a frame of {len(frame)} bytes does not fit a segment")
        segment = self._segment_for(len(frame))
        try:
            segment.write(frame)
        except OSError:
            self._give_up(segment)
            raise
        self.sync_when_due()

    def sync_when_due(self) -> None:
        """Wait for the disk as often as `fsync` says. Raises OSError."""
        segment, policy = self._segment, self._settings.fsync
        if segment is None:
            return
        if policy == "frame" or (policy == "second" and time.monotonic_ns() - segment.synced_ns >= 1e9):
            segment.sync()

    def close(self) -> None:
        """Sync and let go of the segment; the next frame begins another one. Raises OSError."""
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()

    def _give_up(self, segment: _Segment) -> None:
        """A file that failed may fail in other ways: the next frame begins another one. One without a frame goes."""
        self._segment = None
        with suppress(OSError):
            if segment.size == segment.header_size:
                segment.path.unlink()
                self._number -= 1  # a number that is missing means a file that was lost
        with suppress(OSError):
            segment.close()

    def _segment_for(self, coming: int) -> _Segment:
        segment, settings = self._segment, self._settings
        if segment is not None:
            age_s = (time.monotonic_ns() - segment.opened_ns) / 1e9
            if segment.size + coming > settings.segment_bytes or age_s > settings.segment_s:
                self.close()
        if self._segment is None:
            self._make_room()
            self._segment = self._begin()
        return self._segment

    def _begin(self) -> _Segment:
        created_ns, number = time.time_ns(), self._number + 1
        header = Header(SCHEMA, self._session, number, created_ns, __version__, self._label)
        name = f"{created_ns:020d}-{self._session}-{number:06d}{SUFFIX}"
        segment = _Segment(self._folder / name, encode_header(header))
        self._number = number
        return segment

    def _make_room(self) -> None:
        """Keep the journal below its bound, with room for a whole segment more. Raises OSError (EDQUOT).

        Segments that other processes write to are counted as if they were full.
        """
        settings = self._settings
        free = settings.max_bytes - settings.segment_bytes
        sizes = {path: self._bytes_of(path) for path in segment_paths(self._folder)}
        for path in sorted(sizes):
            if sum(sizes.values()) <= free:
                return
            if settings.on_limit == "remove_oldest" and _remove_unused(path):
                sizes[path] = 0
        if sum(sizes.values()) > free:
            raise OSError(errno.EDQUOT, f"the journal has reached its bound of {settings.max_bytes} bytes")

    def _bytes_of(self, path: Path) -> int:
        with _unused(path) as descriptor:
            return _size_of(path) if descriptor is not None else self._settings.segment_bytes


def repair(folder: Path) -> list[str]:
    """Cut the torn tail of every segment that has no writer any more; returns the names of those cut."""
    cut = []
    for path in segment_paths(folder):
        with _unused(path) as descriptor:
            if descriptor is None:
                continue
            if _size_of(path) == 0:
                path.unlink(missing_ok=True)
                continue
            end = torn_from(path)
            if end is not None:
                os.ftruncate(descriptor, end)
                os.fsync(descriptor)
                cut.append(path.name)
                LOG.warning("journal: cut the torn end of %s at byte %d", path.name, end)
    return cut


@contextmanager
def _unused(path: Path) -> Iterator[int | None]:
    """A descriptor of a segment that no process writes to, locked meanwhile; None for one that is written to."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # gone, or not ours to write
        yield None
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def _remove_unused(path: Path) -> bool:
    with _unused(path) as descriptor:
        if descriptor is not None:
            path.unlink(missing_ok=True)
        return descriptor is not None


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another writer of the folder removed it
        return 0

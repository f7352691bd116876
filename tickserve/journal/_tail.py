"""Following a journal while it is written: what is new since the last look, in whole frames.

A frame that has not been written to its end is left for the next look; a damaged one is skipped and counted. A file
that the journal removed meanwhile (its bound) is forgotten. What is kept is one offset a file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tickserve.errors import CorruptFileError
from tickserve.journal._folder import path_of, segment_paths
from tickserve.journal._schema import Record
from tickserve.journal._segment import SUFFIX, Frame, frames, read_header, read_records

LOG = logging.getLogger("tickserve.journal")


class JournalTail:
    """Follows the folder of a journal, of any number of writers; the folder may come later.

    `since_ns`: files that ended before it (wall clock) are not read. `damaged` counts the frames that were skipped.
    Damage to an index ends a file: what lies behind it cannot be found.
    """

    def __init__(self, folder: Path | str, *, since_ns: int = 0) -> None:
        self._folder, self._since_ns = path_of(folder), since_ns
        self._at: dict[Path, int] = {}
        self._ended: set[Path] = set()
        self.damaged = 0

    def poll(self) -> Iterator[Record]:
        """The records that are there by now and were not before. Raises MissingExtraError without zstandard."""
        paths = segment_paths(self._folder)
        self._forget({path for path in (*self._at, *self._ended) if path not in paths})
        for path, following in zip(paths, [*paths[1:], None], strict=False):
            if path in self._ended:
                continue
            newest = following is None or _session(following) != _session(path)
            if not newest and following is not None and _created_ns(following) < self._since_ns:
                self._ended.add(path)
                continue
            yield from self._more(path, newest=newest)
            if not newest:
                self._at.pop(path, None)
                self._ended.add(path)

    def _more(self, path: Path, *, newest: bool) -> Iterator[Record]:
        at = self._at.get(path, 0)
        try:
            if path.stat().st_size <= at:
                return
            with path.open("rb") as file:
                if not at:
                    read_header(file, path.name)
                    at = file.tell()
                file.seek(at)
                yield from self._frames(file, path, newest=newest)
        except FileNotFoundError:  # removed between two looks
            return
        except CorruptFileError as error:
            if not newest:  # nobody writes here any more, so this is no half-written frame
                self._skip(error)

    def _frames(self, file: BinaryIO, path: Path, *, newest: bool) -> Iterator[Record]:
        """Raises CorruptFileError where the file ends inside a frame, or where there is none."""
        for frame in frames(file, path.name):
            try:
                records = list(read_records(file, frame, path.name))
            except CorruptFileError as error:
                if _unfinished(file, frame, newest=newest):
                    return
                self._skip(error)
                records = []
            self._at[path] = frame.end
            yield from records
            file.seek(frame.end)

    def _skip(self, error: CorruptFileError) -> None:
        self.damaged += 1
        LOG.warning("journal: skipped while following: %s", error)

    def _forget(self, gone: set[Path]) -> None:
        self._ended -= gone
        for path in gone:
            self._at.pop(path, None)


def _unfinished(file: BinaryIO, frame: Frame, *, newest: bool) -> bool:
    """Whether the frame may still be on its way: nothing lies behind it, and its writer may be there."""
    return newest and frame.end >= file.seek(0, 2)


def _session(path: Path) -> str:
    return path.name.split("-")[1]


def _created_ns(path: Path) -> int:
    return int(path.name.removesuffix(SUFFIX).split("-")[0])

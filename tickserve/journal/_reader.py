"""Reading a journal back: records in the order they were written, and never a damaged one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from tickserve.errors import CorruptFileError, EmptyDataError
from tickserve.journal._folder import path_of, segment_paths
from tickserve.journal._schema import ActionRecord, Record
from tickserve.journal._segment import SUFFIX, Header, frames, read_header, read_records, torn_from

LOG = logging.getLogger("tickserve.journal")


def read_journal(path: Path | str, *, tolerant: bool = False) -> Iterator[Record]:
    """The records of a journal folder, or of one of its files, one frame in memory at a time.

    What is cut or damaged raises CorruptFileError naming file and offset, after every record before it was given, and
    so does a file that is missing between two of its session. With `tolerant`, a file that ends as a crash leaves it
    (or that is being written just now) ends at its last whole frame, and a missing one costs a line of the log; damage
    that no crash explains costs the rest of its file and a line of the log, and the first of it is raised all the same,
    once the files after it were given too. Raises EmptyDataError where there is no journal.
    """
    numbers: dict[str, int] = {}
    damage: CorruptFileError | None = None
    for segment in journal_files(path):
        _check_follows(segment, numbers, tolerant)
        try:
            yield from _segment_records(segment, tolerant)
        except CorruptFileError as error:
            if not tolerant:
                raise
            damage = damage or error
            LOG.warning("journal: the rest of a file is not read: %s", error)
    if damage is not None:
        raise damage


def _check_follows(path: Path, numbers: dict[str, int], tolerant: bool) -> None:
    """Hold a file's number against the last of its session: the oldest may be removed, one in the middle is lost."""
    _, _, place = path.name.removesuffix(SUFFIX).partition("-")
    session, _, number = place.partition("-")
    if not number.isdigit():
        return  # one file, by a name of its own
    expected = numbers.get(session, int(number) - 1) + 1
    numbers[session] = int(number)
    if int(number) == expected:
        return
    if not tolerant:
        raise CorruptFileError(
            "a file of the journal is missing before this one",
            field=path.name,
            expected=f"number {expected} of its session",
            was=str(int(number)),
            hint="--tolerant reads on without it",
        )
    LOG.warning("journal: %d files are missing before %s", int(number) - expected, path.name)


def journal_files(path: Path | str) -> list[Path]:
    """The files of the journal at `path`, in order. Raises EmptyDataError, and UsageError for what is no path."""
    path = path_of(path)
    found = segment_paths(path) if path.is_dir() else [path] * path.is_file()
    files = [file for file in found if file.stat().st_size]  # a writer that has just made its file
    if not files:
        raise EmptyDataError("no journal here", field=path.name, expected="a folder of *.tsj files, or one of them")
    return files


def journal_header(path: Path) -> Header:
    """Who wrote the file at `path`, and when. Raises CorruptFileError."""
    with path.open("rb") as file:
        return read_header(file, path.name)


def read_actions(path: Path | str, *, tolerant: bool = False) -> dict[str, list[ActionRecord]]:
    """What the engine did, by the request id of the decision it did it about."""
    actions: dict[str, list[ActionRecord]] = {}
    for record in read_journal(path, tolerant=tolerant):
        if isinstance(record, ActionRecord):
            actions.setdefault(record.request_id, []).append(record)
    return actions


def _segment_records(path: Path, tolerant: bool) -> Iterator[Record]:
    end = torn_from(path) if tolerant else None
    with path.open("rb") as file:
        read_header(file, path.name)
        try:
            for frame in frames(file, path.name):
                if end is not None and frame.offset >= end:
                    return
                yield from read_records(file, frame, path.name)
                file.seek(frame.end)
        except CorruptFileError:
            if end is None or file.tell() < end:
                raise
            LOG.warning("journal: %s ends torn at byte %d", path.name, end)

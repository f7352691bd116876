"""What a full disk, a killed process and a fork cost a journal, and how it comes back."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal as signals
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.tickserve.test_journal_files import gaps, ids, make_decision
from tickserve import Client
from tickserve.config import JournalSettings
from tickserve.errors import ComponentError
from tickserve.journal import Journal, journal_files

MODEL = "hand-l1-gbdt"


def over_the_limit(folder: Path, published: Path, limit: int) -> None:
    """A file size limit stands for the full disk. Exits 7 when all calls were answered and the journal came back."""
    signals.signal(signals.SIGXFSZ, signals.SIG_IGN)  # the write then fails half-way with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.levelname)  # type: ignore[method-assign]
    logging.getLogger("tickserve.journal").addHandler(handler)
    journal = Journal(folder, JournalSettings(segment_s=0.1))
    with Client(f"local://{published}", observer=journal) as client:
        rows = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
        for _ in range(3):
            for _ in range(10):
                assert client.score(MODEL, rows).ok
            assert journal.flush()
        assert journal.stats.failing
        assert journal.stats.lost == 30
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert client.score(MODEL, rows).ok
        assert journal.flush()
    assert (journal.stats.written, journal.stats.failing) == (1, False)
    assert lines == ["ERROR", "WARNING"]
    journal.close()
    os._exit(7)


def test_a_full_disk_never_reaches_a_call_and_is_marked_as_a_gap(published: Path, tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=over_the_limit, args=(tmp_path, published, 600))
    child.start()
    child.join(60)
    assert child.exitcode == 7
    assert len(ids(tmp_path)) == 1  # strict: nothing half-written is there
    (gap,) = gaps(tmp_path)
    assert (gap.count, gap.reason) == (30, "it could not be written")
    assert len(list(tmp_path.iterdir())) == 1  # nor a file that holds nothing


def full_after_the_first(folder: Path) -> None:
    """The disk is full in the middle of the second frame; the process ends without closing the journal."""
    signals.signal(signals.SIGXFSZ, signals.SIG_IGN)
    journal = Journal(folder)
    journal.decided(make_decision(request_id="a"))
    assert journal.flush()
    (file,) = journal_files(folder)
    limit = file.stat().st_size + 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    journal.decided(make_decision(request_id="b"))
    assert journal.flush()
    assert journal.stats.failing
    os._exit(7)


def test_a_frame_that_was_half_written_is_taken_back(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=full_after_the_first, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == 7
    assert ids(tmp_path) == ["a"]  # strict


def test_a_folder_that_went_away_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    with Journal(folder, JournalSettings(segment_s=0.1)) as journal:
        journal.decided(make_decision(request_id="a"))
        assert journal.flush()
        folder.rename(tmp_path / "away")
        time.sleep(0.15)
        journal.decided(make_decision(request_id="lost"))
        assert journal.flush()
        assert journal.stats.failing
        (tmp_path / "away").rename(folder)
        journal.decided(make_decision(request_id="b"))
        assert journal.flush()
    assert ids(folder) == ["a", "b"]
    assert [gap.count for gap in gaps(folder)] == [1]


def test_an_unwritable_folder_is_a_typed_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ComponentError, match="cannot write"):
        Journal(tmp_path / "file" / "journal")


WRITER = """
import sys
from tests.tickserve.test_journal_files import make_decision
from tickserve.config import JournalSettings
from tickserve.journal import Journal

journal = Journal(sys.argv[1], JournalSettings(flush_ms=1))
for index in range(int(sys.argv[2])):
    journal.decided(make_decision(request_id=f"r-{index}"))
    if sys.argv[3] == "forever" and index % 10 == 9:
        assert journal.flush()
        print(index + 1, flush=True)
"""


def writer(root: Path, folder: Path, count: int, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), str(count), how]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


def test_what_was_flushed_survives_a_kill_and_the_end_is_mended(root: Path, tmp_path: Path) -> None:
    with writer(root, tmp_path, 10**9, "forever") as process:
        assert process.stdout is not None
        flushed = 0
        while flushed < 200:
            flushed = int(process.stdout.readline())
        process.kill()
        flushed = int((process.stdout.read().splitlines() or [flushed])[-1])
    found = ids(tmp_path, tolerant=True)
    assert len(found) >= flushed
    assert found == [f"r-{index}" for index in range(len(found))]
    (file,) = journal_files(tmp_path)
    with file.open("ab") as handle:  # and the machine went down inside the next frame
        handle.write(b"\x52\x2a\x4d\x18\x10\0\0\0\x50\0\0\0")
    with Journal(tmp_path) as journal:
        journal.decided(make_decision(request_id="after"))
    assert ids(tmp_path) == [*found, "after"]


FLAT_OUT = """
import sys, time
from tests.tickserve.test_journal_files import make_decision
from tickserve.config import JournalSettings
from tickserve.journal import Journal

journal = Journal(sys.argv[1], JournalSettings(queue_records=10**7, queue_bytes=10**10))
count = 0
while True:
    for _ in range(500):
        journal.decided(make_decision(request_id=f"r-{count}"))
        count += 1
    print(count, time.monotonic_ns(), flush=True)
"""
SPARED_NS = int(2e9)  # what is older than this was written long ago, on a slow and busy machine too


@pytest.mark.system
def test_a_kill_flat_out_costs_the_last_moments_only(root: Path, tmp_path: Path) -> None:
    command, told = [sys.executable, "-c", FLAT_OUT, str(tmp_path)], [(0, 0)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while len(told) < 3 or told[-1][1] - told[1][1] < 2 * SPARED_NS:
            count, at = process.stdout.readline().split()
            told.append((int(count), int(at)))
        process.kill()
        killed_ns = time.monotonic_ns()
    found = ids(tmp_path, tolerant=True)
    owed = max(count for count, at in told if at < killed_ns - SPARED_NS)
    assert owed > 1_000
    assert len(found) >= owed
    assert found == [f"r-{index}" for index in range(len(found))]


def test_an_interpreter_that_ends_writes_what_is_queued(root: Path, tmp_path: Path) -> None:
    with writer(root, tmp_path, 5_000, "once") as process:
        assert process.wait(60) == 0
    assert len(ids(tmp_path)) == 5_000


def test_one_that_writes_is_not_mended_by_another(tmp_path: Path) -> None:
    with Journal(tmp_path) as first:
        first.decided(make_decision(request_id="a"))
        assert first.flush()
        (file,) = journal_files(tmp_path)
        with file.open("ab") as handle:
            handle.write(b"half")
        with Journal(tmp_path) as second:
            assert file.read_bytes().endswith(b"half")
            second.decided(make_decision(request_id="b"))
    assert len(journal_files(tmp_path)) == 2


def test_a_forked_child_writes_segments_of_its_own(tmp_path: Path) -> None:
    def child(journal: Journal) -> None:
        journal.decided(make_decision(request_id="child"))
        journal.close()
        os._exit(0)

    with Journal(tmp_path, JournalSettings(flush_ms=5_000)) as journal:
        journal.decided(make_decision(request_id="a"))
        process = multiprocessing.get_context("fork").Process(target=child, args=(journal,))
        process.start()
        process.join(30)
        assert process.exitcode == 0
        journal.decided(make_decision(request_id="b"))
        assert journal.flush()
    assert len(journal_files(tmp_path)) == 2
    assert sorted(ids(tmp_path)) == ["a", "b", "child"]

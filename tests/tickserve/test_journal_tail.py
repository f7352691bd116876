"""Following a journal that is written: every record once, nothing half-written, through rotation and a kill."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tickserve.test_journal_files import make_decision, tensor_of
from tickserve.config import JournalSettings
from tickserve.journal import ActionRecord, DecisionRecord, Journal, JournalTail, Record, journal_files, read_journal

# Two flushes are two frames: no timer writes a part of them before.
UNTIMED = JournalSettings(flush_ms=60_000)
SMALL = JournalSettings(segment_bytes=16 * 1024, max_bytes=4 * 16 * 1024, flush_ms=5, level=1)


def ids(records: Iterable[Record]) -> list[str]:
    return [each.request_id for each in records if isinstance(each, DecisionRecord)]


def write(journal: Journal, start: int, count: int) -> list[str]:
    names, random = [f"r-{number}" for number in range(start, start + count)], np.random.default_rng(start)
    for name in names:
        noise = tensor_of("features", random.normal(size=(1, 30)).astype(np.float32))  # that no compression shrinks
        journal.decided(make_decision(request_id=name, tensors=(noise,)))
    assert journal.flush()
    return names


def test_each_record_comes_once_and_what_is_new_comes_later(tmp_path: Path) -> None:
    tail = JournalTail(tmp_path / "later")
    assert list(tail.poll()) == []
    with Journal(tmp_path / "later") as journal:
        first = write(journal, 0, 5)
        assert ids(tail.poll()) == first
        assert list(tail.poll()) == []
        second = write(journal, 5, 3)
        journal.outcome("r-5", realised="up", pnl_bp=1.5, turnover=2, row=1)
        assert journal.flush()
        records = list(tail.poll())
    assert ids(records) == second
    (outcome,) = [each for each in records if isinstance(each, ActionRecord)]
    assert (outcome.request_id, outcome.action) == ("r-5", "outcome")
    assert outcome.fields == {"realised": "up", "pnl_bp": "1.5", "turnover": "2", "row": "1"}
    assert list(tail.poll()) == []


def test_files_that_turn_over_are_followed_and_those_removed_are_forgotten(tmp_path: Path) -> None:
    tail, seen, written = JournalTail(tmp_path), [], []
    with Journal(tmp_path, SMALL) as journal:
        for start in range(0, 2_000, 100):
            written += write(journal, start, 100)
            seen += ids(tail.poll())
    seen += ids(tail.poll())
    assert seen == written
    first = int(journal_files(tmp_path)[0].name.split("-")[2].split(".")[0])
    assert first > 1  # the bound has removed files meanwhile
    assert len(tail._at) + len(tail._ended) <= len(journal_files(tmp_path))


def test_who_follows_too_slowly_misses_what_was_removed_and_goes_on(tmp_path: Path) -> None:
    tail = JournalTail(tmp_path)
    with Journal(tmp_path, SMALL) as journal:
        written = write(journal, 0, 100)
        assert ids(tail.poll()) == written
        for start in range(100, 3_000, 100):
            written += write(journal, start, 100)
        seen = ids(tail.poll())
    assert seen
    assert seen == written[-len(seen) :]


def test_several_writers_are_followed_at_once(tmp_path: Path) -> None:
    tail = JournalTail(tmp_path)
    with Journal(tmp_path) as one, Journal(tmp_path) as two:
        write(one, 0, 2)
        write(two, 10, 2)
        assert sorted(ids(tail.poll())) == ["r-0", "r-1", "r-10", "r-11"]
        write(one, 2, 1)
        write(two, 12, 1)
        assert sorted(ids(tail.poll())) == ["r-12", "r-2"]


def test_a_frame_that_is_being_written_is_left_for_the_next_look(tmp_path: Path) -> None:
    with Journal(tmp_path / "whole", UNTIMED) as journal:
        write(journal, 0, 3)
        write(journal, 3, 3)
    (path,) = journal_files(tmp_path / "whole")
    data = path.read_bytes()
    (tmp_path / "live").mkdir()
    growing = tmp_path / "live" / path.name
    for cut in range(1, len(data) + 1, 7):
        growing.write_bytes(data[:cut])
        tail = JournalTail(tmp_path / "live")
        early = ids(tail.poll())
        assert early in ([], ["r-0", "r-1", "r-2"])
        growing.write_bytes(data)
        assert early + ids(tail.poll()) == [f"r-{number}" for number in range(6)]
        assert tail.damaged == 0


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 10**6), value=st.integers(1, 255))
def test_a_byte_that_was_changed_costs_its_frame_and_gives_no_other_record(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    with Journal(folder, UNTIMED) as journal:
        for start in range(0, 9, 3):
            write(journal, start, 3)
    (path,) = journal_files(folder)
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= value
    path.write_bytes(data)
    tail = JournalTail(folder)
    seen = ids(tail.poll()) + ids(tail.poll())
    assert set(seen) <= {f"r-{number}" for number in range(9)}
    assert len(seen) == len(set(seen)) <= 6 or tail.damaged == 0  # what the header says may be changed within a text


def test_a_damaged_frame_in_the_middle_is_skipped_and_counted(tmp_path: Path) -> None:
    with Journal(tmp_path, UNTIMED) as journal:
        sizes = [journal_files(tmp_path)[0].stat().st_size for start in range(0, 9, 3) if write(journal, start, 3)]
    (path,) = journal_files(tmp_path)
    data = bytearray(path.read_bytes())
    data[sizes[1] - 5] ^= 0xFF
    path.write_bytes(data)
    tail = JournalTail(tmp_path)
    assert ids(tail.poll()) == ["r-0", "r-1", "r-2", "r-6", "r-7", "r-8"]
    assert tail.damaged == 1


def test_files_of_before_the_window_are_not_read(tmp_path: Path) -> None:
    with Journal(tmp_path, SMALL) as journal:
        for start in range(0, 500, 100):
            write(journal, start, 100)
    files = journal_files(tmp_path)
    assert len(files) > 2
    last = int(files[-1].name.split("-")[0])
    tail = JournalTail(tmp_path, since_ns=last + 1)
    expected = [each.request_id for each in read_journal(files[-1]) if isinstance(each, DecisionRecord)]
    assert ids(tail.poll()) == expected


KILLED = """
import sys
import time
import numpy as np
from tests.tickserve.test_journal_files import make_decision
from tickserve.config import JournalSettings
from tickserve.journal import Journal

journal = Journal(sys.argv[1], JournalSettings(flush_ms=5))
count = 0
while True:
    journal.decided(make_decision(request_id=f"{sys.argv[2]}-{count}"))
    count += 1
    if count % 10 == 0:
        print(count, flush=True)
        time.sleep(0.002)
"""


def test_a_writer_that_is_killed_and_comes_back_is_followed(tmp_path: Path) -> None:
    tail, seen = JournalTail(tmp_path), []
    for life in ("a", "b"):
        command = [sys.executable, "-c", KILLED, str(tmp_path), life]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
            assert process.stdout is not None
            for _ in range(40):
                process.stdout.readline()
                seen += ids(tail.poll())
            process.kill()
        seen += ids(tail.poll())
    with Journal(tmp_path):  # opening it cuts what a kill left
        seen += ids(tail.poll())
    kept = [each.request_id for each in read_journal(tmp_path) if isinstance(each, DecisionRecord)]
    assert seen == kept
    assert len(seen) > 100
    assert tail.damaged == 0

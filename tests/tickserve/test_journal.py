"""The journal as a client's observer: what it keeps, what it bounds, and that no sink can hurt a call."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import resource
import signal as signals
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tickserve.conftest import build_manifest, publish
from tests.tickserve.test_journal_files import ids, make_decision
from tickserve import Client
from tickserve.client import Tensor
from tickserve.config import JournalSettings
from tickserve.errors import ComponentError, ConfigError, InputRejectedError, UsageError
from tickserve.journal import ActionRecord, DecisionRecord, GapRecord, Journal, journal_files, read_journal
from tickserve.journal._folder import JournalFolder
from tickserve.settings import load_settings
from tickserve.signal import Signal

MODEL = "hand-l1-gbdt"
RANDOM = np.random.default_rng(7)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository folder with the hand-made model, to score in this process."""
    return publish(tmp_path_factory.mktemp("journal") / "model_repository", build_manifest()).parent.parent


@pytest.fixture
def rows() -> np.ndarray:
    return RANDOM.normal(size=(2, 4)).astype(np.float32)


def decisions(path: Path) -> list[DecisionRecord]:
    return [record for record in read_journal(path) if isinstance(record, DecisionRecord)]


def gaps(path: Path) -> list[GapRecord]:
    return [record for record in read_journal(path) if isinstance(record, GapRecord)]


def test_every_call_of_a_client_is_there(published: Path, tmp_path: Path, rows: np.ndarray) -> None:
    now = time.time_ns()
    with Journal(tmp_path) as journal, Client(f"local://{published}", observer=journal, max_age_ms=500) as client:
        signal = client.score(MODEL, rows, newest_event_ns=now)
        journal.action(signal.request_id, "buy 1 @ 100", price=100.0)
        stale = client.score(MODEL, rows, newest_event_ns=now - 10**10)
        with pytest.raises(InputRejectedError):
            client.score(MODEL, rows.astype(np.float64), newest_event_ns=now, request_id="refused")
    good, old, refused = decisions(tmp_path)
    assert (good.request_id, good.status, good.model, good.version) == (signal.request_id, "OK", MODEL, 1)
    assert (good.bundle_digest, good.bundle_id) == (signal.bundle_digest, signal.bundle_id)
    assert (good.feature_digest, good.newest_event_ns) == (signal.feature_digest, now)
    assert good.tensors == (Tensor("features", "FP32", (2, 4), rows.tobytes()),)
    assert signal.probabilities is not None
    assert signal.score is not None
    assert good.outputs["probabilities"].tobytes() == signal.probabilities.tobytes()
    assert good.outputs["score"].tobytes() == signal.score.tobytes()
    assert good.decision == signal.decision
    assert good.stage_us == dict(signal.stage_us)
    assert good.event_age_us == signal.event_age_us
    assert now - 10**9 < good.wall_ns <= time.time_ns()
    assert 0 < good.monotonic_ns <= time.monotonic_ns()
    assert (old.status, old.reason, old.outputs) == ("STALE", stale.reason, {})
    assert (refused.request_id, refused.status, refused.error_type) == ("refused", "ERROR", "InputRejectedError")
    assert "float64" in refused.error
    assert refused.stage_us["total"] > 0
    (action,) = [record for record in read_journal(tmp_path) if isinstance(record, ActionRecord)]
    assert (action.request_id, action.action, action.fields) == (signal.request_id, "buy 1 @ 100", {"price": "100.0"})


def test_what_the_caller_does_to_its_array_later_changes_nothing(published: Path, tmp_path: Path) -> None:
    rows = np.ones((1, 4), np.float32)
    with Journal(tmp_path) as journal, Client(f"local://{published}", observer=journal) as client:
        client.score(MODEL, rows)
        rows[:] = 7
    assert decisions(tmp_path)[0].tensors[0].data == np.ones((1, 4), np.float32).tobytes()


def test_threads_share_a_journal(published: Path, tmp_path: Path, rows: np.ndarray) -> None:
    with Journal(tmp_path) as journal, Client(f"local://{published}", observer=journal) as client:
        with ThreadPoolExecutor(16) as pool:
            asked = list(pool.map(lambda _: client.score(MODEL, rows).request_id, range(400)))
        assert journal.flush()
        assert journal.stats.written == 400
    assert sorted(ids(tmp_path)) == sorted(asked)


def test_files_are_rotated_and_the_oldest_go(tmp_path: Path) -> None:
    bound = 4 * 16_384
    settings = JournalSettings(segment_bytes=16_384, max_bytes=bound, flush_ms=1)
    with Journal(tmp_path, settings) as journal:
        for index in range(300):
            noise = Tensor("features", "FP32", (64, 4), RANDOM.bytes(1024))
            journal.decided(make_decision(request_id=f"r-{index}", tensors=(noise,)))
            if index % 3 == 0:
                assert journal.flush()
                assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= bound
        assert journal.flush()
        assert (journal.stats.written, journal.stats.lost) == (300, 0)
    kept = ids(tmp_path)
    assert 20 < len(kept) < 100
    assert kept == [f"r-{index}" for index in range(300 - len(kept), 300)]
    assert all(path.stat().st_size <= 16_384 for path in journal_files(tmp_path))


def test_a_journal_that_may_not_forget_refuses_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = JournalSettings(segment_bytes=16_384, max_bytes=2 * 16_384, on_limit="refuse")
    with Journal(tmp_path, settings) as journal:
        for index in range(60):
            noise = Tensor("features", "FP32", (64, 4), RANDOM.bytes(1024))
            journal.decided(make_decision(request_id=f"r-{index}", tensors=(noise,)))
            assert journal.flush()
        stats = journal.stats
    kept = ids(tmp_path)
    assert kept == [f"r-{index}" for index in range(len(kept))]
    assert (stats.written, stats.lost, stats.failing) == (len(kept), 60 - len(kept), True)
    assert 10 < len(kept) < 40
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "bound" in caplog.text


def test_files_are_rotated_by_age(tmp_path: Path) -> None:
    with Journal(tmp_path, JournalSettings(segment_s=0.1)) as journal:
        for index in range(3):
            journal.decided(make_decision(request_id=f"r-{index}"))
            assert journal.flush()
            time.sleep(0.15)
    assert len(journal_files(tmp_path)) == 3
    assert ids(tmp_path) == ["r-0", "r-1", "r-2"]


class Stuck:
    """A disk that does not answer: `append` waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.entered = threading.Event(), threading.Event()
        append = JournalFolder.append

        def wait(folder: JournalFolder, frame: bytes) -> None:
            self.entered.set()
            assert self.go.wait(60)
            append(folder, frame)

        monkeypatch.setattr(JournalFolder, "append", wait)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    disk = Stuck(monkeypatch)
    yield disk
    disk.go.set()


def test_a_disk_that_hangs_costs_records_and_no_call(
    published: Path, tmp_path: Path, rows: np.ndarray, stuck: Stuck
) -> None:
    with Journal(tmp_path, JournalSettings(queue_records=50, flush_ms=1)) as journal:
        with Client(f"local://{published}", observer=journal) as client:
            first = client.score(MODEL, rows)
            assert stuck.entered.wait(10)
            with ThreadPoolExecutor(8) as pool:
                signals = list(pool.map(lambda _: client.score(MODEL, rows), range(200)))
            assert all(signal.ok for signal in signals)
        assert journal.stats.queued <= 50 + 8
        stuck.go.set()
        assert journal.flush()
        stats = journal.stats
    assert stats.written + stats.lost == 201
    assert stats.lost >= 200 - 58
    kept = ids(tmp_path)
    assert kept[0] == first.request_id
    assert len(kept) == stats.written
    (gap,) = gaps(tmp_path)
    assert (gap.count, gap.reason) == (stats.lost, "the queue was full")
    assert gap.first_ns < gap.last_ns


def test_the_queue_is_bounded_in_bytes_too(tmp_path: Path, stuck: Stuck) -> None:
    big = Tensor("features", "FP32", (250, 1), bytes(1_000))
    with Journal(tmp_path, JournalSettings(queue_bytes=20_000, flush_ms=1)) as journal:
        journal.decided(make_decision())
        assert stuck.entered.wait(10)
        for _ in range(100):
            journal.decided(make_decision(tensors=(big,)))
        assert 20 <= journal.stats.queued <= 21
        stuck.go.set()


def test_a_call_may_wait_for_room_but_not_for_ever(tmp_path: Path, stuck: Stuck) -> None:
    settings = JournalSettings(queue_records=1, on_full="block", block_ms=2_000, flush_ms=1)
    with Journal(tmp_path, settings) as journal:
        journal.decided(make_decision(request_id="a"))
        assert stuck.entered.wait(10)
        journal.decided(make_decision(request_id="b"))
        threading.Timer(0.2, stuck.go.set).start()
        journal.decided(make_decision(request_id="c"))  # waits for the disk
        assert stuck.go.is_set()
        assert journal.flush()
        assert journal.stats.lost == 0
    assert ids(tmp_path) == ["a", "b", "c"]


def test_a_wait_for_room_ends(tmp_path: Path, stuck: Stuck) -> None:
    settings = JournalSettings(queue_records=1, on_full="block", block_ms=20, flush_ms=1)
    with Journal(tmp_path, settings) as journal:
        journal.decided(make_decision())
        assert stuck.entered.wait(10)
        journal.decided(make_decision())
        started = time.monotonic()
        journal.decided(make_decision())
        assert 0.02 <= time.monotonic() - started < 5
        assert not journal.flush(0.05)
        stuck.go.set()
        assert journal.flush()
        assert journal.stats.lost == 1


def test_a_record_that_cannot_be_encoded_is_lost_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong: Any = make_decision(tensors=(Tensor("features", "FP32", (-1, 4), b""),))
    with Journal(tmp_path) as journal:
        journal.decided(make_decision(request_id="a"))
        journal.decided(wrong)
        journal.decided(make_decision(request_id="b"))
        assert journal.flush()
        assert (journal.stats.written, journal.stats.lost) == (2, 1)
    assert ids(tmp_path) == ["a", "b"]
    assert "could not be encoded" in caplog.text


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


def test_callers_that_never_rest_lose_nothing_and_each_keeps_its_order(tmp_path: Path) -> None:
    def call(caller: int) -> None:
        for index in range(2_000):
            journal.decided(make_decision(request_id=f"{caller}-{index}"))

    with Journal(tmp_path, JournalSettings(flush_ms=1)) as journal:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(call, range(4)))
        assert journal.flush()
        assert (journal.stats.written, journal.stats.lost, journal.stats.queued) == (8_000, 0, 0)
    found = ids(tmp_path)
    for caller in range(4):
        own = [each for each in found if each.startswith(f"{caller}-")]
        assert own == [f"{caller}-{index}" for index in range(2_000)]


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


def test_after_close_nothing_is_written_and_nothing_raises(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    journal = Journal(tmp_path)
    journal.decided(make_decision())
    journal.close()
    journal.close()
    journal.decided(make_decision())
    journal.action("r-1", "too late")
    assert journal.flush()
    assert (journal.stats.written, journal.stats.lost) == (1, 2)
    assert "tickserve-journal" not in {thread.name for thread in set(threading.enumerate()) - before}


def test_an_idle_journal_leaves_no_file(tmp_path: Path) -> None:
    with Journal(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_descriptors_and_threads_come_back(tmp_path: Path) -> None:
    def held() -> tuple[set[str], int]:
        gc.collect()  # what earlier tests left is not this test's
        links = []
        for path in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # another thread's, closed meanwhile
                links.append(str(path.readlink()))
        mine = {link for link in links if link.startswith(str(tmp_path))}
        return mine, sum(thread.name == "tickserve-journal" for thread in threading.enumerate())

    threads = held()[1]
    for turn in range(20):
        journal = Journal(tmp_path / str(turn))
        journal.decided(make_decision())
        assert journal.flush()
        assert len(held()[0]) == 1
        journal.close()
    assert held() == (set(), threads)


def test_the_settings_are_those_of_the_configuration(tmp_path: Path) -> None:
    assert load_settings(environ={}).config.journal == JournalSettings()
    with pytest.raises(ConfigError, match=r"journal.max_bytes: expected at least two segments"):
        load_settings(environ={}, overrides={"journal.max_bytes": 40_000})
    with pytest.raises(UsageError, match="label"):
        Journal(tmp_path, label="x" * 2_000)


def test_a_signal_is_not_changed_by_being_observed(published: Path, tmp_path: Path, rows: np.ndarray) -> None:
    url = f"local://{published}"
    with Journal(tmp_path) as journal, Client(url) as plain, Client(url, observer=journal) as watched:
        one, other = plain.score(MODEL, rows), watched.score(MODEL, rows)
    assert isinstance(one, Signal)
    np.testing.assert_array_equal(one.probabilities, other.probabilities)
    assert one.decision == other.decision

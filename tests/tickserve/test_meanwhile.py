"""What an observer put off is done by a call's own thread while that call waits, and never instead of its answer."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.tickserve.conftest import Triton
from tests.tickserve.test_journal_files import ids, make_decision
from tickserve.client import AsyncClient, Client, Decision, Tensor, _meanwhile
from tickserve.client._meanwhile import dismiss, enlist, work_meanwhile
from tickserve.client._socket import NS_PER_MS, SPIN_NS, Line
from tickserve.config import JournalSettings
from tickserve.journal import Journal, _journal
from tickserve.journal._folder import JournalFolder
from tickserve.journal._journal import FRAME_BYTES
from tickserve.metrics import MetricsExporter

LATER = JournalSettings(flush_ms=60_000)  # nothing is done by the journal's own thread
SOON_NS = 10**9
POLL = select.poll


@pytest.fixture(autouse=True)
def only_what_a_test_enlists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_meanwhile, "_works", [])


@pytest.fixture
def worked() -> Iterator[list[str]]:
    """The threads in which work was done."""
    threads: list[str] = []

    def work() -> None:
        threads.append(threading.current_thread().name)

    enlist(work)
    yield threads
    dismiss(work)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


class Answering:
    """A connection whose peer answers while work is done, or when the line is asked for the second time."""

    def __init__(self, ours: socket.socket, theirs: socket.socket, rest: int, others: int = 0) -> None:
        self.line = Line(ours, busy := set())
        busy.update([self.line, *[Line(theirs, set()) for _ in range(others)]])
        self.line._rest = rest
        self._theirs, self.asked = theirs, 0
        poll = self.line._poll.poll

        def asked(*arguments: Any) -> Any:
            self.asked += 1
            if self.asked == 2:
                self.answer()
            return poll(*arguments)

        self.line._poll = SimpleNamespace(poll=asked)

    def answer(self) -> None:
        self._theirs.send(b"answer")

    def more(self, within_ns: int = SOON_NS) -> bytes:
        return self.line.more(time.monotonic_ns() + within_ns)


@pytest.mark.parametrize("rest", [0, 1], ids=["awake", "asleep"])
def test_a_lone_call_that_waits_does_it_once_in_its_own_thread(ends: Any, worked: list[str], rest: int) -> None:
    assert Answering(*ends, rest).more() == b"answer"
    assert worked == [threading.current_thread().name]


@pytest.mark.parametrize("rest", [0, 1], ids=["awake", "asleep"])
def test_an_answer_that_is_there_comes_first(ends: Any, worked: list[str], rest: int) -> None:
    lone = Answering(*ends, rest)
    lone.answer()
    assert lone.more() == b"answer"
    assert worked == []


@pytest.mark.parametrize("rest", [0, 1], ids=["awake", "asleep"])
def test_beside_another_call_it_waits(ends: Any, worked: list[str], rest: int) -> None:
    assert Answering(*ends, rest, others=1).more() == b"answer"
    assert worked == []


@pytest.mark.parametrize("rest", [0, 1], ids=["awake", "asleep"])
def test_the_rest_of_an_answer_that_has_begun_comes_first(ends: Any, worked: list[str], rest: int) -> None:
    lone = Answering(*ends, rest)
    lone.line.heard = True
    assert lone.more() == b"answer"
    assert worked == []


def test_with_the_deadline_near_there_is_no_time_for_it(ends: Any, worked: list[str]) -> None:
    Answering(*ends, 0).line._spin(time.monotonic_ns() + NS_PER_MS // 2)
    assert worked == []


def test_an_answer_that_came_while_it_was_done_is_taken_though_the_deadline_passed(ends: Any) -> None:
    lone = Answering(*ends, 1)

    def work() -> None:
        lone.answer()
        time.sleep(0.02)

    enlist(work)
    lone.asked = 2  # nobody else answers
    assert lone.more(10 * 10**6) == b"answer"


def test_it_does_not_count_as_looking_in_vain(ends: Any) -> None:
    lone = Answering(*ends, 0)

    def work() -> None:
        lone.answer()
        time.sleep(2 * SPIN_NS / 1e9)

    enlist(work)
    lone.asked = 2
    assert lone.more() == b"answer"
    assert lone.line._rest == 0


def test_it_is_enlisted_once_and_dismissed_for_good(worked: list[str]) -> None:
    calls: list[int] = []

    def work() -> None:
        calls.append(1)

    enlist(work)
    enlist(work)
    work_meanwhile()
    dismiss(work)
    dismiss(work)
    work_meanwhile()
    assert (calls, len(worked)) == ([1], 2)


def test_a_journal_is_encoded_meanwhile_and_no_more_once_it_is_closed(tmp_path: Path) -> None:
    asked = [f"r-{number}" for number in range(5)]
    with Journal(tmp_path, LATER) as journal:
        for identity in asked:
            journal.decided(make_decision(request_id=identity))
        assert (len(journal._queue), len(journal._encoded)) == (5, 0)
        work_meanwhile()
        assert (len(journal._queue), len(journal._encoded)) == (2, 3)
        with journal._encoding:  # its own thread is at it
            work_meanwhile()
        assert len(journal._queue) == 2
        work_meanwhile()
        work_meanwhile()
        assert len(journal._queue) == 0
        assert journal.flush()
    assert _meanwhile._works == []
    assert ids(tmp_path) == asked


def test_a_large_record_is_left_to_the_journals_own_thread(tmp_path: Path) -> None:
    large = Tensor("features", "FP32", (1_024, 4), bytes(16 * 1024 + 4))
    with Journal(tmp_path, LATER) as journal:
        for identity, tensors in (("small", ()), ("large", (large,)), ("behind", ())):
            journal.decided(make_decision(request_id=identity, tensors=tensors))
        work_meanwhile()
        work_meanwhile()
        assert (len(journal._queue), len(journal._encoded)) == (2, 1)


class AlarmError(Exception):
    """What an engine's own signal handler raises."""


class StopError(BaseException):
    """Another, of the kind of KeyboardInterrupt."""


def test_what_a_signal_handler_raises_goes_to_the_call_and_costs_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, alarms = _journal.encode_decision, [StopError(), AlarmError()]

    def interrupted(decision: Decision) -> bytes:
        if alarms and threading.current_thread() is threading.main_thread():
            raise alarms.pop()
        return encode(decision)

    monkeypatch.setattr(_journal, "encode_decision", interrupted)
    with Journal(tmp_path, LATER) as journal:
        for identity in ("a", "b"):
            journal.decided(make_decision(request_id=identity))
        for kind in (AlarmError, StopError):
            with pytest.raises(kind):
                work_meanwhile()
        work_meanwhile()
        assert journal.flush()
        assert (journal.stats.written, journal.stats.lost) == (2, 0)
    assert ids(tmp_path) == ["a", "b"]


def test_a_record_that_cannot_be_told_is_the_journals_own_trouble(tmp_path: Path) -> None:
    with Journal(tmp_path, LATER) as journal:
        journal.decided(make_decision(wall_ns="no time"))
        work_meanwhile()
        assert journal.flush()
        assert (journal.stats.written, journal.stats.lost) == (0, 1)


def test_the_bytes_of_what_is_being_written_count_until_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hangs holds up no more than the bound says: what was taken to be written has left no room."""
    hangs, goes_on = threading.Event(), threading.Event()
    append = JournalFolder.append

    def hanging(folder: JournalFolder, frame: bytes) -> None:
        hangs.set()
        assert goes_on.wait(10)
        append(folder, frame)

    monkeypatch.setattr(JournalFolder, "append", hanging)
    row = Tensor("features", "FP32", (1, 256), bytes(1_024))
    with Journal(tmp_path, JournalSettings(flush_ms=1, queue_bytes=4_096)) as journal:
        journal.decided(make_decision(tensors=(row,)))
        assert hangs.wait(10)
        for _ in range(8):
            journal.decided(make_decision(tensors=(row,)))
            work_meanwhile()
        assert (journal.stats.queued, journal.stats.lost) == (3, 5)
        goes_on.set()
        assert journal.flush()
        assert (journal.stats.queued, journal._queued_bytes) == (0, 0)


def test_a_full_frame_is_written_though_calls_encode_it(tmp_path: Path) -> None:
    row = Tensor("features", "FP32", (1, 2_048), bytes(8_192))
    with Journal(tmp_path, LATER) as journal:
        for _ in range(FRAME_BYTES // 8_192 + 1):
            journal.decided(make_decision(tensors=(row,)))
            work_meanwhile()
        end = time.monotonic() + 10
        while not journal.stats.written and time.monotonic() < end:
            time.sleep(0.001)
        assert journal.stats.written


def test_who_waits_and_the_journals_thread_keep_the_order_between_them(tmp_path: Path) -> None:
    ended = threading.Event()

    def wait_for_answers() -> None:
        while not ended.is_set():
            work_meanwhile()
            time.sleep(0)

    threads = [threading.Thread(target=wait_for_answers) for _ in range(3)]
    asked = [f"r-{number}" for number in range(300)]
    with Journal(tmp_path, JournalSettings(flush_ms=1)) as journal:
        for thread in threads:
            thread.start()
        for identity in asked:
            journal.decided(make_decision(request_id=identity))
        assert journal.flush()
        ended.set()
        for thread in threads:
            thread.join()
    assert ids(tmp_path) == asked


def test_a_forked_childs_journal_is_encoded_once_too(tmp_path: Path) -> None:
    with Journal(tmp_path, LATER) as journal:
        journal.decided(make_decision(request_id="parent"))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                journal.decided(make_decision(request_id="child"))
                work_meanwhile()
                code = 0 if (len(_meanwhile._works), len(journal._encoded)) == (1, 1) else 2
                journal.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sorted(ids(tmp_path)) == ["child", "parent"]


def test_an_exporter_counts_meanwhile_and_no_more_once_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetricsExporter, "_run", lambda self: None)  # nothing is done by its own thread
    with MetricsExporter(serve=False) as exporter:
        for _ in range(5):
            exporter.decided(make_decision())
        work_meanwhile()
        assert len(exporter._queue) == 2
        with exporter._counting:
            work_meanwhile()
        assert len(exporter._queue) == 2
        work_meanwhile()
        work_meanwhile()
        assert len(exporter._queue) == 0
        assert "m" in exporter._models
    assert _meanwhile._works == []


class Odd:
    """What an engine made up for a number of seconds."""

    def __float__(self) -> float:
        raise RuntimeError("not now")


def test_what_an_engine_made_up_is_left_to_the_exporters_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetricsExporter, "_run", lambda self: None)
    with MetricsExporter(serve=False) as exporter:
        exporter.decided(make_decision())
        exporter.observe_stage("m", "features", 0.1)
        exporter.observe_stage("m", "features", Odd())  # type: ignore[arg-type]
        exporter.decided(make_decision())
        work_meanwhile()
        work_meanwhile()
        assert len(exporter._queue) == 2
        exporter.render()
        assert (len(exporter._queue), exporter.lost) == (0, 1)


class SlowToSee:
    """A poll whose first look, of every two, sees nothing: on a busy machine an answer is there before the first."""

    def __init__(self) -> None:
        self._poll, self._looks = POLL(), 0
        self.register = self._poll.register

    def poll(self, timeout: int) -> Any:
        self._looks += timeout == 0
        return [] if timeout == 0 and self._looks % 2 else self._poll.poll(timeout)


@pytest.mark.parametrize("scheme", ["", "grpc://"])
def test_real_calls_leave_the_last_record_alone(
    scheme: str, triton: Triton, rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "poll", SlowToSee)
    url = triton.http if not scheme else scheme + triton.grpc
    with (
        Journal(tmp_path, LATER) as journal,
        Client(url, manifest=triton.folder, deadline_ms=5_000, observer=journal) as client,
    ):
        for _ in range(10):
            client.score(next(iter(client.manifests)), rows)
        assert (len(journal._queue), len(journal._encoded)) == (1, 9)


async def many(url: str, folder: Path, rows: np.ndarray, journal: Journal) -> None:
    async with AsyncClient(url, manifest=folder, deadline_ms=5_000, observer=journal) as client:
        name = next(iter(client.manifests))
        for _ in range(10):
            await client.score(name, rows)


@pytest.mark.parametrize("scheme", ["", "grpc://"])
def test_real_calls_of_a_loop_leave_the_last_record_alone(
    scheme: str, triton: Triton, rows: np.ndarray, tmp_path: Path
) -> None:
    url = triton.http if not scheme else scheme + triton.grpc
    with Journal(tmp_path, LATER) as journal:
        asyncio.run(many(url, triton.folder, rows, journal))
        assert len(journal._queue) <= 1
        assert len(journal._encoded) >= 9

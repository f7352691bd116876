"""What an observer put off is done by a call's own thread while that call waits, and never instead of its answer."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tickserve.conftest import Triton
from tests.tickserve.test_journal_files import ids, make_decision
from tickserve.client import AsyncClient, Client, _meanwhile
from tickserve.client._meanwhile import dismiss, enlist, work_meanwhile
from tickserve.client._socket import Line
from tickserve.config import JournalSettings
from tickserve.journal import Journal
from tickserve.metrics import MetricsExporter

LATER = JournalSettings(flush_ms=60_000)  # nothing is done by the journal's own thread
ANSWER_S = 0.002


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


def received(ours: socket.socket, theirs: socket.socket, busy: set[Line], answer_s: float | None) -> bytes:
    line = Line(ours, busy)
    busy.add(line)
    if answer_s is None:
        theirs.send(b"answer")
        return line.more(time.monotonic_ns() + 10**9)
    timer = threading.Timer(answer_s, theirs.send, (b"answer",))
    timer.start()
    try:
        return line.more(time.monotonic_ns() + 10**9)
    finally:
        timer.join()


def test_a_lone_call_that_waits_does_it_once_in_its_own_thread(ends: Any, worked: list[str]) -> None:
    assert received(*ends, set(), ANSWER_S) == b"answer"
    assert worked == [threading.current_thread().name]


def test_one_that_sleeps_through_its_wait_does_it_before(ends: Any, worked: list[str]) -> None:
    line = Line(ends[0], set())
    line._rest = 1
    timer = threading.Timer(ANSWER_S, ends[1].send, (b"answer",))
    timer.start()
    assert line.more(time.monotonic_ns() + 10**9) == b"answer"
    assert worked == [threading.current_thread().name]
    timer.join()


def test_an_answer_that_is_there_comes_first(ends: Any, worked: list[str]) -> None:
    assert received(*ends, set(), None) == b"answer"
    assert worked == []


def test_beside_another_call_it_waits(ends: Any, worked: list[str]) -> None:
    other = Line(ends[1], set())
    assert received(*ends, {other}, ANSWER_S) == b"answer"
    assert worked == []


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


def test_who_waits_and_the_journals_thread_keep_the_order_between_them(tmp_path: Path) -> None:
    ended = threading.Event()

    def wait_for_answers() -> None:
        while not ended.is_set():
            work_meanwhile()

    threads = [threading.Thread(target=wait_for_answers) for _ in range(3)]
    asked = [f"r-{number}" for number in range(2_000)]
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


@pytest.mark.parametrize("scheme", ["", "grpc://"])
def test_real_calls_leave_the_last_record_alone(scheme: str, triton: Triton, rows: np.ndarray, tmp_path: Path) -> None:
    url = triton.http if not scheme else scheme + triton.grpc
    with (
        Journal(tmp_path, LATER) as journal,
        Client(url, manifest=triton.folder, deadline_ms=5_000, observer=journal) as client,
    ):
        for _ in range(10):
            client.score(next(iter(client.manifests)), rows)
        assert len(journal._queue) <= 1
        assert len(journal._encoded) >= 9


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

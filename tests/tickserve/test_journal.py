"""The journal as a client's observer: what it keeps, what it bounds, and that no sink can hurt a call."""

from __future__ import annotations

import gc
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tickserve.test_journal_files import gaps, ids, make_decision
from tickserve import Client
from tickserve.client import Tensor
from tickserve.config import JournalSettings
from tickserve.errors import ConfigError, InputRejectedError, UsageError
from tickserve.journal import ActionRecord, DecisionRecord, Journal, JournalTail, journal_files, read_journal
from tickserve.journal._folder import JournalFolder
from tickserve.settings import load_settings
from tickserve.signal import Signal
from tickserve.testing import UP_ANSWER, make_manifest, mock_client

MODEL = "hand-l1-gbdt"
SECONDS_MS = 5_000
RANDOM = np.random.default_rng(7)


@pytest.fixture
def rows() -> np.ndarray:
    return RANDOM.normal(size=(2, 4)).astype(np.float32)


def decisions(path: Path) -> list[DecisionRecord]:
    return [record for record in read_journal(path) if isinstance(record, DecisionRecord)]


def test_every_call_of_a_client_is_there(published: Path, tmp_path: Path, rows: np.ndarray) -> None:
    options: dict[str, Any] = {"max_age_ms": SECONDS_MS, "deadline_ms": SECONDS_MS}
    with Journal(tmp_path) as journal, Client(f"local://{published}", observer=journal, **options) as client:
        now = time.time_ns()
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
    with Journal(tmp_path) as journal, Client(f"local://{published}", observer=journal, deadline_ms=20_000) as client:
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
        with Client(f"local://{published}", observer=journal, deadline_ms=20_000) as client:
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


@pytest.mark.parametrize("path", [None, 3, b"journal"])
def test_what_is_no_path_is_named(path: Any) -> None:
    for use in (Journal, JournalTail, lambda given: list(read_journal(given))):
        with pytest.raises(UsageError, match=r"path: expected text or a Path, was") as caught:
            use(path)
        assert caught.value.field == "path"


@pytest.mark.parametrize(("field", "wrong"), [("label", 3), ("settings", {"flush_ms": 1})])
def test_a_wrong_argument_is_named(tmp_path: Path, field: str, wrong: Any) -> None:
    with pytest.raises(UsageError, match=field):
        Journal(tmp_path / "journal", **{field: wrong})
    assert not (tmp_path / "journal").exists()


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError


WRONG = [
    ("realised", "sideways"),
    ("realised", 1),
    ("pnl_bp", "a"),
    ("pnl_bp", "1.5"),
    ("pnl_bp", float("nan")),
    ("pnl_bp", True),
    ("turnover", float("-inf")),
    ("turnover", Unspeakable()),
    ("row", -1),
    ("row", 1.5),
    ("row", np.zeros(2)),
]


def test_an_outcome_that_no_reader_could_use_is_counted_and_not_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Journal(tmp_path) as journal:
        for field, wrong in WRONG:
            journal.outcome("r", **{field: wrong})
        journal.outcome("r", realised="up", pnl_bp=np.float32(1.5), turnover=Decimal("2.5"), row=np.int64(3))
        journal.outcome("r", row=0)
    assert (journal.stats.refused, journal.stats.written, journal.stats.lost) == (len(WRONG), 2, 0)
    assert caplog.text.count("an outcome with no usable") == 1
    assert "realised ('sideways')" in caplog.text
    first, second = [record.fields for record in read_journal(tmp_path) if isinstance(record, ActionRecord)]
    assert first == {"realised": "up", "pnl_bp": "1.5", "turnover": "2.5", "row": "3"}
    assert second == {}


def test_the_pages_code_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "journal.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)

    def client(url: str, *, manifest: str, **options: Any) -> Any:
        return mock_client(make_manifest("simulated-l5-gbdt"), [UP_ANSWER], deadline_ms=20_000, **options)

    monkeypatch.setattr("tickserve.Client", client, raising=False)
    for block in blocks:
        exec(block.replace("(1, 40)", "(1, 3)"), {})  # the columns of the stand-in
    decision, action = read_journal("journal")
    assert isinstance(decision, DecisionRecord)
    assert isinstance(action, ActionRecord)
    assert (decision.status, action.request_id) == ("OK", decision.request_id)

"""The journal's files: every byte of a record, what a crash leaves, and that nothing damaged is ever read."""

from __future__ import annotations

import os
import struct
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tickserve.client import Decision, Tensor
from tickserve.config import JournalSettings
from tickserve.errors import CorruptFileError, DeadlineExceededError, EmptyDataError, MissingExtraError
from tickserve.journal import (
    ActionRecord,
    DecisionRecord,
    GapRecord,
    Journal,
    journal_files,
    read_actions,
    read_journal,
)
from tickserve.journal._folder import JournalFolder, repair
from tickserve.journal._schema import (
    _encode_usual,
    decode,
    encode_action,
    encode_any,
    encode_decision,
    encode_gap,
)
from tickserve.journal._segment import Header, encode_frame, encode_header, frame_record
from tickserve.manifest import StateContract, StateTensor
from tickserve.signal import Signal

CLASSES = ("down", "flat", "up")
ROW = np.array([[0.25, float("nan"), -1.5]], np.float32)


def tensor_of(name: str, array: np.ndarray, dtype: str = "FP32") -> Tensor:
    return Tensor(name, dtype, array.shape, array.tobytes())


def make_signal(**changes: Any) -> Signal:
    fields: dict[str, Any] = {
        "status": "OK",
        "probabilities": np.array([[0.2, 0.3, 0.5]], np.float32),
        "score": np.array([0.3], np.float32),
        "decision": ("up",),
        "classes": CLASSES,
        "model": "m",
        "version": 3,
        "bundle_digest": "sha256:b",
        "bundle_id": -5,
        "feature_digest": "sha256:f",
        "request_id": "r-1",
        "event_age_us": 12.5,
        "stage_us": {"check": 1.0, "total": 9.25},
        "flags": ("out_of_range:spread",),
        "replica": "127.0.0.1:8000",
        "attempts": 2,
    }
    return Signal(**(fields | changes))


def make_decision(**changes: Any) -> Decision:
    fields: dict[str, Any] = {
        "wall_ns": 1_700_000_000_000_000_001,
        "monotonic_ns": 17,
        "model": "m",
        "request_id": "r-1",
        "tensors": (tensor_of("features", ROW),),
        "newest_event_ns": 1_699_999_999_999_999_999,
        "version": 3,
        "bundle_digest": "sha256:b",
        "feature_digest": "sha256:f",
        "state": None,
        "stage_us": {"check": 1.0, "total": 9.25},
        "signal": make_signal(),
        "error": None,
    }
    return Decision(**(fields | changes))


def decision_of(payload: bytes) -> DecisionRecord:
    record = decode(payload)
    assert isinstance(record, DecisionRecord)
    return record


def test_a_decision_comes_back_as_it_was() -> None:
    record = decision_of(encode_decision(make_decision()))
    assert (record.wall_ns, record.monotonic_ns) == (1_700_000_000_000_000_001, 17)
    assert (record.newest_event_ns, record.event_age_us) == (1_699_999_999_999_999_999, 12.5)
    assert (record.model, record.version_asked, record.version, record.bundle_id) == ("m", 3, 3, -5)
    assert (record.bundle_digest, record.feature_digest, record.classes) == ("sha256:b", "sha256:f", CLASSES)
    assert (record.request_id, record.status, record.reason, record.fallback) == ("r-1", "OK", "", "")
    assert (record.error_type, record.error, record.replica, record.attempts) == ("", "", "127.0.0.1:8000", 2)
    assert (record.flags, record.stage_us) == (("out_of_range:spread",), {"check": 1.0, "total": 9.25})
    assert record.tensors == (tensor_of("features", ROW),)  # NaN and all, byte for byte
    assert record.outputs["probabilities"].tobytes() == np.array([[0.2, 0.3, 0.5]], np.float32).tobytes()
    assert record.outputs["score"].shape == (1,)
    assert record.decision == ("up",)


def test_an_error_a_stale_signal_and_one_without_a_manifest_come_back() -> None:
    error = DeadlineExceededError("too late", field="deadline")
    error.replica, error.attempts = "127.0.0.1:8000", 3
    failed = decision_of(encode_decision(make_decision(signal=None, error=error, tensors=())))
    assert (failed.status, failed.error_type, failed.error) == ("ERROR", "DeadlineExceededError", "deadline: too late")
    assert (failed.outputs, failed.tensors, failed.decision, failed.version, failed.bundle_id) == (
        {},
        (),
        None,
        None,
        None,
    )
    assert (failed.bundle_digest, failed.replica, failed.attempts) == ("sha256:b", "127.0.0.1:8000", 3)
    stale = make_signal(status="STALE", probabilities=None, score=None, decision=None, reason="too old")
    found = decision_of(encode_decision(make_decision(signal=stale)))
    assert (found.status, found.reason, found.version, found.version_asked) == ("STALE", "too old", None, 3)
    unknown = make_decision(signal=None, error=error, bundle_digest=None, feature_digest=None, version=None)
    assert decision_of(encode_decision(unknown)).bundle_digest == ""


def test_state_is_named_by_the_output_it_came_from() -> None:
    state = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    contract = StateContract(
        tensors=(StateTensor(input="h", output="h_next", shape=(2, 3)),), session_gap_ns=10**9, stride=1
    )
    decision = make_decision(
        state=contract,
        tensors=(tensor_of("features", ROW), tensor_of("h", state)),
        signal=make_signal(state={"h": state + 1}),
    )
    record = decision_of(encode_decision(decision))
    assert list(record.outputs) == ["probabilities", "score", "h_next"]
    np.testing.assert_array_equal(record.outputs["h_next"], state + 1)
    assert record.tensors[1].data == state.tobytes()


def test_the_bytes_of_schema_1_do_not_change() -> None:
    """Journals are read for years: what is written here was written by the first release."""
    action = encode_action(ActionRecord(1, 2, "r", "buy", {"n": "1"}))
    assert (
        action.hex()
        == "02" + "0100000000000000" + "0200000000000000" + "010072" + "0300627579" + "0200" + "01006e" + "010031"
    )
    gap = encode_gap(GapRecord(1, 2, 3, "q"))
    assert gap.hex() == "03" + "0100000000000000" + "0200000000000000" + "0300000000000000" + "010071"
    decision = encode_decision(make_decision())
    assert len(decision) == 308
    assert zlib.crc32(decision) == CRC_OF_SCHEMA_1
    assert decision[:2] == bytes([1, 0b111111])
    assert struct.unpack_from("<qq", decision, 2) == (1_700_000_000_000_000_001, 17)


CRC_OF_SCHEMA_1 = 62_399_270

RARELY = st.sampled_from([False] * 9 + [True])


@st.composite
def decisions(draw: st.DrawFn) -> Decision:
    """Answered calls of many shapes; now and then one with something to remark on."""
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    names = draw(st.sampled_from(["x", "xy", "é"]))
    several = [tensor_of(name, np.full((rows, width), place, np.float32)) for place, name in enumerate(names)]
    optional = st.none() | st.integers(0, 2**62)
    state = {"h": np.ones((rows, 2, 2), np.float32)} if draw(RARELY) else None
    signal = make_signal(
        status=draw(st.sampled_from(["OK", "FALLBACK"])),
        probabilities=None if draw(RARELY) else np.full((rows, 3), draw(st.floats(width=32)), np.float32),
        score=None if draw(RARELY) else np.full(rows, 0.5, np.float32),
        decision=tuple(draw(st.lists(st.sampled_from(CLASSES), min_size=rows, max_size=rows))),
        version=draw(optional),
        bundle_id=draw(st.integers(-(2**63), 2**63 - 1)),
        event_age_us=draw(st.none() | st.floats()),
        flags=("drift",) if draw(RARELY) else (),
        reason="late" if draw(RARELY) else None,
        fallback="hold" if draw(RARELY) else None,
        replica=draw(st.sampled_from([None, "a:1", "127.0.0.1:8000"])),
        attempts=draw(st.integers(0, 3)),
        state=state,
    )
    tensors = (StateTensor(input="h", output="h_next", shape=(2, 2)),)
    contract = StateContract(tensors=tensors, session_gap_ns=10**9, stride=1)
    return make_decision(
        request_id=draw(st.text(max_size=20)),
        tensors=() if draw(RARELY) else tuple(several),
        newest_event_ns=draw(optional),
        version=draw(optional),
        bundle_digest=draw(st.sampled_from([None, "", "sha256:b"])),
        state=None if state is None else contract,
        stage_us=draw(st.dictionaries(st.sampled_from(["check", "decode", "total"]), st.floats())),
        signal=signal,
    )


@given(decisions())
@settings(max_examples=150, deadline=None)
def test_the_short_way_writes_the_same_bytes(decision: Decision) -> None:
    assert encode_decision(decision) == encode_any(decision)


def test_a_usual_decision_goes_the_short_way() -> None:
    usual = make_decision(signal=make_signal(flags=()))
    assert _encode_usual(usual) == encode_any(usual)
    assert _encode_usual(make_decision()) is None


@given(st.text(), st.text(max_size=200), st.dictionaries(st.text(), st.text()), st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=100, deadline=None)
def test_any_text_is_written_and_never_fails(request_id: str, action: str, fields: dict[str, str], wall: int) -> None:
    record = decode(encode_action(ActionRecord(wall, 0, request_id, action, fields)))
    assert record == ActionRecord(wall, 0, request_id, action, fields)


def test_text_that_is_no_unicode_or_too_long_is_kept_as_far_as_it_goes() -> None:
    record = decode(encode_action(ActionRecord(0, 0, "\ud800", "é" * 40_000, {})))
    assert isinstance(record, ActionRecord)
    assert record.request_id == "\\ud800"
    assert record.action == "é" * 32_767


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_record_are_refused(data: st.DataObject) -> None:
    payload = bytearray(encode_decision(make_decision()))
    if data.draw(st.booleans()):
        payload = payload[: data.draw(st.integers(0, len(payload) - 1))]
    else:
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(CorruptFileError):  # a changed number is another number: the crc32 around it is what refuses that
        decode(bytes(payload))


def test_bytes_behind_a_record_are_refused() -> None:
    for payload in (encode_decision(make_decision()), encode_gap(GapRecord(1, 2, 3, "why"))):
        with pytest.raises(CorruptFileError, match="left over"):
            decode(payload + b"\0")


def fill(folder: Path, count: int, **options: Any) -> None:
    with Journal(folder, JournalSettings(**({"flush_ms": 60_000} | options)), label="test") as journal:
        for index in range(count):
            journal.decided(make_decision(request_id=f"r-{index}"))
            journal.action(f"r-{index}", "buy 1", price=100.5)
            if index % 5 == 4:
                assert journal.flush()


def ids(path: Path, **options: Any) -> list[str]:
    return [record.request_id for record in read_journal(path, **options) if isinstance(record, DecisionRecord)]


def gaps(path: Path) -> list[GapRecord]:
    return [record for record in read_journal(path) if isinstance(record, GapRecord)]


def test_what_was_written_is_read_in_order_with_its_actions(tmp_path: Path) -> None:
    fill(tmp_path, 12)
    assert ids(tmp_path) == [f"r-{index}" for index in range(12)]
    (file,) = journal_files(tmp_path)
    assert ids(file) == ids(tmp_path)
    actions = read_actions(tmp_path)
    assert [(one.action, one.fields) for one in actions["r-3"]] == [("buy 1", {"price": "100.5"})]


def test_any_zstd_reads_the_records(tmp_path: Path) -> None:
    fill(tmp_path, 7)
    (file,) = journal_files(tmp_path)
    with file.open("rb") as handle:
        raw = zstandard.ZstdDecompressor().stream_reader(handle, read_across_frames=True).read()
    found, at = [], 0
    while at < len(raw):
        size, crc32 = struct.unpack_from("<II", raw, at)
        payload = raw[at + 8 : at + 8 + size]
        assert zlib.crc32(payload) == crc32
        found.append(decode(payload))
        at += 8 + size
    assert [one.request_id for one in found if isinstance(one, DecisionRecord)] == ids(tmp_path)


def test_a_header_tells_no_host(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    (file,) = journal_files(tmp_path)
    data = file.read_bytes()
    head = data[: 12 + int.from_bytes(data[4:8], "little")]
    assert b'"label":"test"' in head
    for secret in (os.uname().nodename, str(tmp_path), str(os.getpid())):
        assert secret.encode() not in head


@pytest.fixture
def segment(tmp_path: Path) -> Path:
    """A file of three frames, five decisions and five actions in each."""
    fill(tmp_path / "whole", 15)
    (file,) = journal_files(tmp_path / "whole")
    return file


def test_a_torn_end_costs_the_last_frame_wherever_it_was_cut(segment: Path, tmp_path: Path) -> None:
    data = segment.read_bytes()
    starts = [at for at in range(len(data)) if data.startswith(b"\x52\x2a\x4d\x18\x10\0\0\0", at)]
    assert len(starts) == 3
    torn = tmp_path / "torn" / segment.name
    torn.parent.mkdir()
    for cut in (*range(starts[2] + 1, starts[2] + 40), *range(starts[2] + 40, len(data), 7), len(data) - 1):
        torn.write_bytes(data[:cut])
        with pytest.raises(CorruptFileError, match=f"at offset {starts[2]}"):
            ids(torn)
        assert ids(torn, tolerant=True) == [f"r-{index}" for index in range(10)]
        assert repair(torn.parent) == [torn.name]
        assert torn.read_bytes() == data[: starts[2]]
        assert ids(torn) == [f"r-{index}" for index in range(10)]
    torn.write_bytes(data + bytes(5_000))  # a file system that had made the file longer before it was filled
    assert ids(torn, tolerant=True) == ids(segment)
    torn.write_bytes(data[:-20] + bytes(20))  # or had not filled to its end
    assert ids(torn, tolerant=True) == [f"r-{index}" for index in range(10)]
    torn.write_bytes(data + bytes(5_000))
    assert repair(torn.parent) == [torn.name]
    assert torn.read_bytes() == data


def test_a_changed_byte_is_never_read_as_a_record(segment: Path, tmp_path: Path) -> None:
    data, good = segment.read_bytes(), ids(segment)
    broken = tmp_path / "broken" / segment.name
    broken.parent.mkdir()
    for at in range(0, len(data), 5):
        broken.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
        found: list[str] = []
        with pytest.raises(CorruptFileError):
            found.extend(one.request_id for one in read_journal(broken) if isinstance(one, DecisionRecord))
        assert found == good[: len(found)]


@pytest.mark.parametrize("find", [bytes.index, bytes.rindex], ids=["first frame", "last frame"])
def test_damage_that_is_no_torn_end_is_reported_and_left_alone(segment: Path, find: Callable[..., int]) -> None:
    whole = segment.read_bytes()
    data = bytearray(whole)
    data[find(whole, b"\x52\x2a\x4d\x18\x10\0\0\0") + 60] ^= 1
    segment.write_bytes(data)
    assert repair(segment.parent) == []
    assert segment.read_bytes() == data
    with pytest.raises(CorruptFileError, match="crc32"):
        ids(segment, tolerant=True)


def test_a_file_missing_between_two_is_reported_and_the_oldest_may_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (1, 2, 3, 4):
        header = encode_header(Header(1, "5e55", number, number, "0", ""))
        (tmp_path / f"{number:020d}-5e55-{number:06d}.tsj").write_bytes(header)
    oldest, second, third, _ = journal_files(tmp_path)
    oldest.unlink()
    assert list(read_journal(tmp_path)) == []
    third.unlink()
    with pytest.raises(CorruptFileError, match=r"000004\.tsj.*missing.*number 3"):
        list(read_journal(tmp_path))
    assert list(read_journal(second)) == []
    assert list(read_journal(tmp_path, tolerant=True)) == []
    assert "1 files are missing before" in caplog.text


def test_a_file_that_could_not_be_begun_leaves_no_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, frame = JournalFolder(tmp_path, JournalSettings(), ""), encode_frame([], zstandard.ZstdCompressor())
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "no space left")

    def header_only(descriptor: int, data: bytes) -> int:
        return write(descriptor, data) if len(data) > len(frame) else full(descriptor, data)

    for failing in (full, header_only):
        monkeypatch.setattr(os, "write", failing)
        with pytest.raises(OSError, match="no space"):
            folder.append(frame)
    monkeypatch.setattr(os, "write", write)
    folder.append(frame)
    folder.close()
    assert [path.name[-10:] for path in journal_files(tmp_path)] == ["000001.tsj"]


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(100), b"\x51\x2a\x4d\x18", b"x"])
def test_what_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.tsj").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"some\.tsj"):
        list(read_journal(tmp_path / "some.tsj"))


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(EmptyDataError, match="no journal here"):
            list(read_journal(path))


def test_another_schema_is_refused_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "next.tsj"
    path.write_bytes(encode_header(Header(2, "s", 1, 0, "9.9", "")))
    with pytest.raises(CorruptFileError, match="another schema: expected 1, was 2"):
        list(read_journal(path))


def test_a_frame_that_unpacks_to_more_than_it_says_is_refused(tmp_path: Path) -> None:
    bomb = encode_frame([bytes(100_000_000)], zstandard.ZstdCompressor())
    lie = bytearray(bomb)
    lie[12:16] = struct.pack("<I", 100)
    path = tmp_path / "bomb.tsj"
    path.write_bytes(encode_header(Header(1, "s", 1, 0, "0", "")) + lie)
    with pytest.raises(CorruptFileError, match="not that of its index"):
        list(read_journal(path))


def test_a_missing_zstandard_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"tickserve\[journal\]"):
        Journal(tmp_path)


def test_a_record_of_a_frame_is_checked_on_its_own(tmp_path: Path) -> None:
    record = bytearray(frame_record(encode_gap(GapRecord(1, 2, 3, "why"))))
    record[12] ^= 1
    path = tmp_path / "one.tsj"
    frame = encode_frame([bytes(record)], zstandard.ZstdCompressor())
    path.write_bytes(encode_header(Header(1, "s", 1, 0, "0", "")) + frame)
    with pytest.raises(CorruptFileError, match="crc32"):
        list(read_journal(path))

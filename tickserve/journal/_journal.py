"""The journal: an observer that writes down every decision of a client, off the path of the call.

A call hands over references and goes on. What waits is encoded by the next call while that waits for its answer, and by
a thread of the journal's own, a little at a time, so that a call never waits for it longer than a fraction of a
millisecond; the thread compresses and writes. Callers that never rest leave it no interpreter to encode with: once it
falls behind, each call encodes a few of the oldest as it ends.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from tickserve.client import Decision
from tickserve.client._fork import renew_after_fork
from tickserve.client._meanwhile import AT_ONCE, BROKEN, dismiss, enlist
from tickserve.config import JournalSettings
from tickserve.errors import UsageError
from tickserve.journal._folder import JournalFolder, path_of
from tickserve.journal._schema import OUTCOME, ActionRecord, GapRecord, encode_action, encode_decision, encode_gap
from tickserve.journal._segment import encode_frame, frame_record, load_zstandard
from tickserve.manifest import CLASSES

LOG = logging.getLogger("tickserve.journal")
FRAME_BYTES = 256 * 1024  # raw; more records compress better, and a longer frame is more to lose
# The interpreter lock is let go after so much encoding, for so long: a call that comes back meanwhile finds it free.
SLICE_NS, PAUSE_S = 30_000, 0.0002
# A call encodes a few while it waits for its answer; and as it ends, once so many wait to be encoded, or the oldest may
# have waited so many flush_ms (calls in process wait for nothing).
HELP_RECORDS, HELP_FLUSHES = 512, 1.5
LARGE = 16 * 1024  # bytes of tensors: a record of more takes longer than a call should be held up
# And rests so long, so often: calls that let go of the interpreter lock for moments can keep it from a thread for long.
REST_S, REST_EVERY_NS = 0.00005, 1_000_000
CATCH_UP = 8  # frames of so many times FRAME_BYTES where more waits: each frame costs turns at the interpreter
CLOSE_S = 10.0

_Flushed = threading.Event  # a place in the queue: set when everything before it is written
_Item = Decision | ActionRecord | _Flushed
_Encoded = bytes | _Flushed | Exception  # what could not be encoded, the worker tells of


class JournalStats(NamedTuple):
    """What a journal has done so far; `lost` were dropped at a full queue or could not be written (`failing`: now).

    `refused`: outcomes that no reader could use (`Journal.outcome`); nothing of them is written.
    """

    written: int
    lost: int
    queued: int
    frames: int
    bytes: int
    failing: bool
    refused: int = 0


class Journal:
    """Writes every decision into the folder `path`: `Client(url, manifest=..., observer=Journal("journal"))`.

    Give one journal to as many clients as there are; close it after them. What a crash of the process can lose is
    what came in the last few `flush_ms` (docs/journal.md), or in a disk's own delay; a crash of the machine, what came
    since the last fsync. A disk that is full or gone costs records, which are counted and marked as a gap, and no
    call.

    Safe for threads; a forked child writes segments of its own. Raises UsageError for a wrong argument,
    MissingExtraError without zstandard and ComponentError for a folder that cannot be written.
    """

    def __init__(self, path: Path | str, settings: JournalSettings | None = None, *, label: str = "") -> None:
        place = path_of(path)
        _check(label, settings)
        self._settings = settings or JournalSettings()
        self._frame_bytes = min(FRAME_BYTES, self._settings.segment_bytes // 2)
        self._most_bytes = min(CATCH_UP * FRAME_BYTES, self._settings.segment_bytes // 2)
        self._patience_ns = int(HELP_FLUSHES * self._settings.flush_ms * 1e6)
        self._compressor = load_zstandard().ZstdCompressor(level=self._settings.level)
        self._folder = JournalFolder(place, self._settings, label)
        self._closed = False
        self.after_fork()
        renew_after_fork(self)
        atexit.register(self.close)

    def after_fork(self) -> None:
        """A child starts with an empty queue and no thread; what its parent has not written yet, its parent writes."""
        self._folder.after_fork()
        self._queue: deque[_Item] = deque()
        self._queued_bytes = 0
        self._encoding = threading.Lock()  # of who moves records from the queue to the encoded, which keeps their order
        self._encoded, self._encoded_bytes, self._encoded_tensors = list[_Encoded](), 0, 0
        self._caught_up_ns = self._rested_ns = time.monotonic_ns()
        self._drops, self._drops_read, self._drops_seen = itertools.count(), 0, 0
        self._counting = threading.Lock()  # of those who read the counter of drops; who adds to it takes none
        self._lost = self._refused = 0
        self._pending_lost, self._lost_since_ns, self._lost_reason = 0, time.time_ns(), ""
        self._written = self._frames = self._bytes = 0
        self._failing = False
        self._starting, self._wake = threading.Lock(), threading.Event()
        self._worker: threading.Thread | None = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def decided(self, decision: Decision) -> None:
        """Write `decision` down, later. Takes microseconds and never raises.

        A full queue drops it and counts it; with `on_full = "block"` it waits first, at most `block_ms`.
        """
        self._put(decision, _size_of(decision))

    def action(self, request_id: str, action: str, **fields: object) -> None:
        """Write down what the engine did about the decision `request_id`; `fields` are kept as text. Never raises."""
        texts = {name: str(value) for name, value in fields.items()}
        self._put(ActionRecord(time.time_ns(), time.monotonic_ns(), str(request_id), str(action), texts), 0)

    def outcome(
        self,
        request_id: str,
        *,
        realised: str | None = None,
        pnl_bp: float | None = None,
        turnover: float | None = None,
        row: int = 0,
    ) -> None:
        """Write down how the decision `request_id` turned out, an action of the name `outcome`. Never raises.

        `realised`: the class that came true (down, flat, up), by the model's own horizon and band; `pnl_bp`: what the
        engine made of it, after costs, in basis points; `turnover`: what it traded for that, in its own unit; `row`: of
        a request of several. None is not known; each is counted once (docs/drift.md).

        Another class, what is no finite number, or no row is not written: `stats.refused` counts such outcomes, and the
        first is a line of the log.
        """
        wrong = _wrong_in(realised, pnl_bp, turnover, row)
        if wrong is not None:
            self._refuse(*wrong)
            return
        told = {"realised": realised, "pnl_bp": pnl_bp, "turnover": turnover, "row": row or None}
        self.action(request_id, OUTCOME, **{name: value for name, value in told.items() if value is not None})

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until all that was handed over before is written, or known to be lost; False when that took too long."""
        if self._closed:
            return True
        flushed = _Flushed()
        self._queue.append(flushed)
        self._start()
        self._wake.set()
        return flushed.wait(timeout_s)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what is queued, sync, and end the thread; idempotent. What comes after is counted as lost."""
        if self._closed:
            return
        if self._waiting():
            self._start()
        self._closed = True
        atexit.unregister(self.close)
        dismiss(self._meanwhile)
        self._wake.set()
        if self._worker is not None:
            self._worker.join(timeout_s)

    @property
    def stats(self) -> JournalStats:
        """What was written and lost so far."""
        self._count_drops()
        lost, waiting = self._lost, self._waiting()
        return JournalStats(self._written, lost, waiting, self._frames, self._bytes, self._failing, self._refused)

    # The caller's side.

    def _refuse(self, field: str, was: object) -> None:
        with self._counting:
            self._refused += 1
            first = self._refused == 1
        if first:
            LOG.warning(
                "journal: an outcome with no usable %s (%s) is not written; more are only counted", field, _shown(was)
            )

    def _put(self, item: _Item, size: int) -> None:
        if self._closed or (self._full() and not self._room_in_time()):
            next(self._drops)  # a counter that two threads cannot spoil
            return
        self._queued_bytes += size
        self._queue.append(item)
        if self._worker is None:
            self._start()
        else:
            self._help()

    def _help(self) -> None:
        now = time.monotonic_ns()
        late = now - self._caught_up_ns > self._patience_ns
        if late or len(self._queue) > HELP_RECORDS:
            self._encode_some()
        if late and now - self._rested_ns > REST_EVERY_NS:
            self._rested_ns = now
            time.sleep(REST_S)

    def _meanwhile(self) -> None:
        if self._queue:
            self._encode_some(LARGE)

    def _encode_some(self, size: float = math.inf) -> None:
        """Encode a few, up to one of more than `size` bytes."""
        encoding = self._encoding
        if not encoding.acquire(blocking=False):
            return
        try:
            for _ in range(AT_ONCE):
                if not self._queue or not self._encode(size, BROKEN):
                    break
        finally:
            encoding.release()
        if self._encoded_bytes >= self._frame_bytes:
            self._wake.set()

    def _waiting(self) -> int:
        return len(self._queue) + len(self._encoded)

    def _full(self) -> bool:
        settings = self._settings
        return self._waiting() >= settings.queue_records or self._queued_bytes >= settings.queue_bytes

    def _room_in_time(self) -> bool:
        if self._settings.on_full == "drop":
            return False
        end = time.monotonic() + self._settings.block_ms / 1e3
        while not self._failing and time.monotonic() < end:
            self._wake.set()
            time.sleep(0.0005)
            if not self._full():
                return True
        return False

    def _start(self) -> None:
        with self._starting:
            if self._worker is None and not self._closed:
                self._worker = threading.Thread(target=self._run, name="tickserve-journal", daemon=True)
                self._worker.start()
                enlist(self._meanwhile)

    # The worker's side.

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(self._settings.flush_ms / 1e3)
            self._wake.clear()
            self._drain()
            self._attempt(self._folder.sync_when_due)
        self._drain()
        self._attempt(self._folder.close)

    def _drain(self) -> None:
        while self._queue:
            end = time.perf_counter_ns() + SLICE_NS
            with self._encoding:
                while self._queue and time.perf_counter_ns() < end:
                    self._encode(math.inf, (Exception,))
            if self._encoded_bytes >= self._frame_bytes:
                self._write_encoded()
            if self._queue:
                self._breathe()
        self._write_encoded()
        self._caught_up_ns = time.monotonic_ns()

    def _breathe(self) -> None:
        pressed = self._closed or 2 * self._waiting() > self._settings.queue_records
        time.sleep(0 if pressed else PAUSE_S)

    def _write_encoded(self) -> None:
        """Write what is encoded, in frames, and tell those who wait for it."""
        with self._encoding:
            tensors, taken = self._encoded_tensors, self._encoded
            self._encoded, self._encoded_bytes, self._encoded_tensors = [], 0, 0
        framed, size, flushed = list[bytes](), 0, list[_Flushed]()
        for each in taken:
            if isinstance(each, bytes):
                if size + len(each) > self._most_bytes:
                    self._write(framed)
                    framed, size = [], 0
                framed.append(each)
                size += len(each)
            elif isinstance(each, _Flushed):
                flushed.append(each)
            else:
                self._lose(1, "it could not be encoded")
                LOG.error("journal: a record could not be encoded", exc_info=each)
        self._write(framed)
        with self._encoding:  # what is being written holds memory, too
            self._queued_bytes -= tensors
            if not self._waiting():
                self._queued_bytes = 0  # threads that add at once may miscount; here it is known again
        for each in flushed:
            each.set()

    # Either side's, with `_encoding` held.

    def _encode(self, most: float, caught: tuple[type[Exception], ...]) -> bool:
        """Encode the oldest of the queue; False for one of more than `most` bytes.

        It leaves the queue last: what raises here may come from a signal handler.
        """
        item = self._queue[0]
        size = _size_of(item)
        if size > most:
            return False
        encoded: _Encoded
        try:
            if isinstance(item, _Flushed):
                encoded = item
            else:
                encoded = frame_record(encode_action(item) if isinstance(item, ActionRecord) else encode_decision(item))
        except caught as error:  # one record that cannot be told must not end the journal, nor a call
            encoded = error
        self._encoded.append(encoded)
        self._queue.popleft()
        if isinstance(encoded, bytes):
            self._encoded_bytes += len(encoded)
        self._encoded_tensors += size
        return True

    # The worker's side again.

    def _write(self, framed: list[bytes]) -> None:
        """One frame of what is there, and of the gap before it. What cannot be written is lost, and counted."""
        self._count_drops(wait=self._closed)
        gap = self._pending_lost
        if not framed and not (gap and self._closed):
            return  # a gap goes with what comes after it: alone, its few bytes may fit where no record would
        now = time.time_ns()
        if gap:
            record = GapRecord(self._lost_since_ns, now, gap, self._lost_reason)
            framed = [frame_record(encode_gap(record)), *framed]
        frame = encode_frame(framed, self._compressor)
        records = len(framed) - bool(gap)
        if not self._attempt(lambda: self._folder.append(frame)):
            self._lose(records, "it could not be written")
            return
        if self._failing:
            self._failing = False
            LOG.warning("journal: writing again; %d records were lost", gap)
        self._pending_lost -= gap
        self._lost_since_ns = now
        self._written += records
        self._frames += 1
        self._bytes += len(frame)

    def _attempt(self, work: Callable[[], None]) -> bool:
        """Whether `work` could be done. An outage costs one line of the log, whatever it lasts."""
        try:
            work()
        except OSError as error:
            if not self._failing:
                self._failing = True
                LOG.error("journal: cannot write (%s); records are lost and counted until it can", error.strerror)
            return False
        return True

    def _lose(self, count: int, reason: str) -> None:
        self._lost += count
        self._pending_lost += count
        self._lost_reason = reason

    def _count_drops(self, wait: bool = True) -> None:
        if not self._counting.acquire(blocking=wait):
            return  # who reads `stats` in a loop has just counted, and would keep the worker from its turn
        try:
            total = next(self._drops) - self._drops_read
            self._drops_read += 1
            dropped, self._drops_seen = total - self._drops_seen, total
            if dropped:
                self._lose(dropped, "the queue was full")
        finally:
            self._counting.release()


def _size_of(item: _Item) -> int:
    """Bytes of its tensors."""
    size = 0
    if isinstance(item, Decision):
        for tensor in item.tensors:
            size += len(tensor.data)
    return size


def _check(label: object, settings: object) -> None:
    """Raises UsageError for an argument that is none."""
    if not isinstance(label, str):
        raise UsageError("no text", field="label", expected="text", was=type(label).__name__)
    if len(label) > 1_000:
        raise UsageError("too long", field="label", expected="at most 1000 characters", was=str(len(label)))
    if settings is not None and not isinstance(settings, JournalSettings):
        expected, was = "JournalSettings (load_settings().config.journal)", type(settings).__name__
        raise UsageError("no settings of a journal", field="settings", expected=expected, was=was)


def _wrong_in(realised: object, pnl_bp: object, turnover: object, row: object) -> tuple[str, object] | None:
    """The argument of an outcome that no reader could use, by name, and what it is; None where all are good."""
    if realised is not None and not (isinstance(realised, str) and realised in CLASSES):
        return "realised", realised
    for name, number in (("pnl_bp", pnl_bp), ("turnover", turnover)):
        if number is not None and not _reads_as(number, lambda text: math.isfinite(float(text))):
            return name, number
    return None if _reads_as(row, lambda text: int(text) >= 0) else ("row", row)


def _reads_as(value: object, test: Callable[[str], bool]) -> bool:
    """Whether the text that is written for `value` passes: NumPy's numbers and Decimal do; what is a text does not."""
    if isinstance(value, str | bytes):
        return False
    try:
        return test(str(value))
    except Exception:  # whatever an engine hands over: this is on its hot path
        return False


def _shown(value: object) -> str:
    try:
        return repr(value)[:60]
    except Exception:  # an object that cannot even be shown
        return type(value).__name__

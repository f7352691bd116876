"""Requests sent when the recording says, whatever the server does: latency counts from the intended time of sending.

A closed loop waits for each answer before it asks again, so a server that stalls is asked less and looks better than it
is. Here every request has its time; when all connections wait another is opened. How late the driver itself was is
reported, so that a machine too slow to drive the load is not mistaken for a slow server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from export.batching import Arrivals
from export.batching.arrivals import of_times
from tickserve.client._transport import DTYPES
from tickserve.errors import ComponentError
from tickserve.model_config import BULK_LANE, SINGLE_LANE

FIRST_CONNECTIONS = 32
OK = 200
LEAD_S = 0.05
COARSE_S = 0.002


@dataclass(frozen=True)
class Feed:
    """What to send: `model` on `authority` (host:port), rows taken from the front of each of its `inputs`, [B, ...]."""

    authority: str
    model: str
    inputs: Mapping[str, npt.NDArray[Any]]
    deadline_ms: float
    lanes: bool = False


@dataclass
class OpenLoop:
    """What N requests saw. `latency_us` float64 [N] from the intended time, NaN where no answer came in time."""

    latency_us: npt.NDArray[np.float64]
    lane: npt.NDArray[np.int64]
    late_us: npt.NDArray[np.float64]
    outcome: list[str] = field(default_factory=list)

    def of_lane(self, lane: int) -> npt.NDArray[np.float64]:
        """The latencies of the answered requests of one lane."""
        mine: npt.NDArray[np.float64] = self.latency_us[(self.lane == lane) & np.isfinite(self.latency_us)]
        return mine

    def to_json(self) -> dict[str, Any]:
        """Counts by outcome, percentiles of each lane over all its requests, and how late the driver sent."""
        result: dict[str, Any] = {
            "requests": len(self.outcome),
            "outcomes": dict(Counter(self.outcome).most_common()),
            "driver_late_p99_us": round(float(np.percentile(self.late_us, 99)), 1),
        }
        for name, lane in (("single", SINGLE_LANE), ("bulk", BULK_LANE)):
            everyone = np.sort(np.nan_to_num(self.latency_us[self.lane == lane], nan=np.inf))
            if len(everyone):
                ranks = {f"p{q:g}_us": everyone[max(0, int(np.ceil(q / 100 * len(everyone))) - 1)] for q in (50, 99)}
                shown = {key: round(float(value), 1) if np.isfinite(value) else None for key, value in ranks.items()}
                result[name] = {"requests": len(everyone), **shown}
        return result


class _Connection(asyncio.Protocol):
    """One kept-alive connection with at most one request under way."""

    def __init__(self, driver: _Driver) -> None:
        self._driver, self._received = driver, bytearray()
        self._index: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, index: int, message: bytes, limit_s: float) -> None:
        """Send request `index`; it is given up, and the connection with it, after `limit_s`."""
        if self._transport is None:
            raise ComponentError("the connection is not open")
        self._index = index
        self._timer = asyncio.get_running_loop().call_later(max(0.0, limit_s), self._end, "no answer by the deadline")
        self._transport.write(message)

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0 or self._index is None or len(self._received) < end + 4 + _length(self._received[:end]):
            return
        status, text = int(self._received[9:12]), bytes(self._received[end + 4 :])
        self._received.clear()
        index = self._release()
        self._driver.finished(index, "answered" if status == OK else _refusal(status, text))
        self._driver.idle.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._end("connection lost")

    def close(self) -> None:
        """Give up what is under way."""
        if self._transport is not None:
            self._transport.abort()

    def _release(self) -> int:
        index, self._index = self._index, None
        if self._timer is not None:
            self._timer.cancel()
        return -1 if index is None else index

    def _end(self, outcome: str) -> None:
        if self in self._driver.idle:
            self._driver.idle.remove(self)
        if self._index is not None:
            self._driver.finished(self._release(), outcome)
        self.close()


class _Driver:
    def __init__(self, feed: Feed, arrivals: Arrivals) -> None:
        self._feed, self._arrivals = feed, arrivals
        self.idle: deque[_Connection] = deque()
        self._waiting: set[asyncio.Task[None]] = set()
        self._intended: list[float] = []
        self._left = count = len(arrivals)
        self._done = asyncio.Event()
        kinds = set(zip(arrivals.rows.tolist(), arrivals.lane.tolist(), strict=True))
        self._messages = {kind: message(feed, *kind) for kind in kinds}
        self.result = OpenLoop(np.full(count, np.nan), arrivals.lane, np.zeros(count), ["not sent"] * count)

    async def run(self) -> OpenLoop:
        """Send everything at its time; connections are opened before the first, and more when all are in use."""
        for _ in range(FIRST_CONNECTIONS):
            self.idle.append(await self._connect())
        start = time.perf_counter() + LEAD_S
        self._intended = (start + self._arrivals.times_ns / 1e9).tolist()
        for index, intended in enumerate(self._intended):
            await _until(intended)
            if self.idle:
                self._send(index, self.idle.pop())
            else:
                task = asyncio.create_task(self._send_on_new(index))
                self._waiting.add(task)
                task.add_done_callback(self._waiting.discard)
        await self._done.wait()
        for connection in list(self.idle):
            connection.close()
        return self.result

    async def run_lone(self, gap_s: float, after: Callable[[], None]) -> OpenLoop:
        """Send each request `gap_s` after all before are answered."""
        self.idle.append(await self._connect())
        for index in range(len(self._arrivals)):
            self._intended.append(time.perf_counter() + gap_s)
            await _until(self._intended[index])
            self._send(index, self.idle.pop() if self.idle else await self._connect())
            while self._left > len(self._arrivals) - index - 1:
                await asyncio.sleep(0)
            after()
        for connection in list(self.idle):
            connection.close()
        return self.result

    def finished(self, index: int, outcome: str) -> None:
        """Note how request `index` ended."""
        if outcome == "answered":
            self.result.latency_us[index] = (time.perf_counter() - self._intended[index]) * 1e6
        self.result.outcome[index] = outcome
        self._left -= 1
        if not self._left:
            self._done.set()

    def _send(self, index: int, connection: _Connection) -> None:
        intended = self._intended[index]
        late = time.perf_counter() - intended
        self.result.late_us[index] = late * 1e6
        message = self._messages[int(self._arrivals.rows[index]), int(self._arrivals.lane[index])]
        connection.send(index, message, self._feed.deadline_ms / 1e3 - late)

    async def _send_on_new(self, index: int) -> None:
        try:
            connection = await self._connect()
        except ComponentError:
            self.finished(index, "no connection")
            return
        self._send(index, connection)

    async def _connect(self) -> _Connection:
        host, _, port = self._feed.authority.rpartition(":")
        try:
            return (await asyncio.get_running_loop().create_connection(lambda: _Connection(self), host, int(port)))[1]
        except OSError as error:
            raise ComponentError("no server answers", field="authority", was=self._feed.authority[:100]) from error


async def _until(intended: float) -> None:
    """Wait for `intended`, reading answers in between, also when that time is over.

    The event loop rounds waits up to whole milliseconds, so the last two are spent looking at the clock.
    """
    await asyncio.sleep(max(0.0, intended - time.perf_counter() - COARSE_S))
    while time.perf_counter() < intended:
        await asyncio.sleep(0)


def _length(head: bytes | bytearray) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def _refusal(status: int, text: bytes) -> str:
    lower = text.lower()
    if b"maximum queue size" in lower:
        return "refused: queue full"
    if b"timeout expired" in lower:
        return "refused: waited too long"
    return f"HTTP {status}"


def message(feed: Feed, rows: int, lane: int) -> bytes:
    """One binary request over HTTP with `rows` rows, the deadline as its queue timeout, and its lane."""
    parameters: dict[str, Any] = {"timeout": int(feed.deadline_ms * 1e3), "binary_data_output": True}
    if feed.lanes:
        parameters["priority"] = lane
    tensors, contents = [], []
    for name, values in take(feed.inputs, rows).items():
        dtype = next(kind for kind, code in DTYPES.items() if code.kind == values.dtype.kind)
        contents.append(np.ascontiguousarray(values, DTYPES[dtype]).tobytes())
        size = {"binary_data_size": len(contents[-1])}
        tensors.append({"name": name, "shape": list(values.shape), "datatype": dtype, "parameters": size})
    head = json.dumps({"parameters": parameters, "inputs": tensors}).encode()
    body = b"".join([head, *contents])
    return (
        f"POST /v2/models/{feed.model}/infer HTTP/1.1\r\nHost: {feed.authority}\r\n"
        f"Content-Length: {len(body)}\r\nInference-Header-Content-Length: {len(head)}\r\n\r\n"
    ).encode() + body


def take(inputs: Mapping[str, npt.NDArray[Any]], rows: int) -> dict[str, npt.NDArray[Any]]:
    """The first `rows` rows of every input, repeated where there are fewer."""
    return {name: np.concatenate([values] * -(-rows // len(values)))[:rows] for name, values in inputs.items()}


def drive(feed: Feed, arrivals: Arrivals) -> OpenLoop:
    """Send `arrivals` at their times; returns after the last answer or deadline. ComponentError without a server."""
    return asyncio.run(_run(feed, arrivals))


async def _run(feed: Feed, arrivals: Arrivals) -> OpenLoop:
    return await _Driver(feed, arrivals).run()


def drive_lone(feed: Feed, calls: int, gap_s: float, after: Callable[[], None]) -> OpenLoop:
    """`calls` requests of one row, each `gap_s` after the one before was answered and `after` was called.

    The same sender on the same path as `drive`, with nothing waiting before any request.
    """
    return asyncio.run(_run_lone(feed, calls, gap_s, after))


async def _run_lone(feed: Feed, calls: int, gap_s: float, after: Callable[[], None]) -> OpenLoop:
    return await _Driver(feed, of_times(np.arange(calls, dtype=np.int64))).run_lone(gap_s, after)

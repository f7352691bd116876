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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from export.batching import Arrivals
from tickserve.errors import ComponentError
from tickserve.model_config import BULK_LANE, SINGLE_LANE

MAX_CONNECTIONS = 512
LEAD_S = 0.05


@dataclass(frozen=True)
class Feed:
    """What to send: `model` on `authority` (host:port), rows taken from the front of `features` float32 [B, ...]."""

    authority: str
    model: str
    input_name: str
    features: npt.NDArray[np.float32]
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


class _Driver:
    def __init__(self, feed: Feed, arrivals: Arrivals) -> None:
        self._feed, self._arrivals = feed, arrivals
        self._idle: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = deque()
        self._open = 0
        count = len(arrivals)
        self._messages = {
            (rows, lane): _message(feed, rows, lane)
            for rows, lane in set(zip(arrivals.rows.tolist(), arrivals.lane.tolist(), strict=True))
        }
        self.result = OpenLoop(np.full(count, np.nan), arrivals.lane, np.zeros(count), ["not sent"] * count)

    async def run(self) -> OpenLoop:
        start = time.perf_counter() + LEAD_S
        tasks = []
        for index, offset in enumerate((self._arrivals.times_ns / 1e9).tolist()):
            intended = start + offset
            wait = intended - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(self._one(index, intended)))
            if wait <= 0 and index % 32 == 0:
                await asyncio.sleep(0)  # behind the recording: let answers be read all the same
        await asyncio.gather(*tasks)
        for _, writer in self._idle:
            writer.close()
        return self.result

    async def _one(self, index: int, intended: float) -> None:
        message = self._messages[int(self._arrivals.rows[index]), int(self._arrivals.lane[index])]
        limit = intended + self._feed.deadline_ms / 1e3 - time.perf_counter()
        try:
            async with asyncio.timeout(limit):
                status, text = await self._exchange(index, intended, message)
        except TimeoutError:
            self.result.outcome[index] = "no answer by the deadline"
            return
        except (OSError, asyncio.IncompleteReadError) as error:
            self.result.outcome[index] = f"connection: {type(error).__name__}"
            return
        if status == 200:
            self.result.latency_us[index] = (time.perf_counter() - intended) * 1e6
            self.result.outcome[index] = "answered"
        else:
            self.result.outcome[index] = _refusal(status, text)

    async def _exchange(self, index: int, intended: float, message: bytes) -> tuple[int, bytes]:
        reader, writer = await self._connection()
        whole = False
        try:
            self.result.late_us[index] = (time.perf_counter() - intended) * 1e6
            writer.write(message)
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(_length(head))
            whole = True
            return int(head[9:12]), body
        finally:
            # A connection with an answer still to come can carry no other request.
            if whole:
                self._idle.append((reader, writer))
            else:
                self._open -= 1
                writer.close()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._idle:
            return self._idle.pop()
        if self._open >= MAX_CONNECTIONS:
            raise ConnectionError("every connection waits")
        self._open += 1
        host, _, port = self._feed.authority.rpartition(":")
        try:
            return await asyncio.open_connection(host, int(port))
        except BaseException:
            self._open -= 1
            raise


def _length(head: bytes) -> int:
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


def _message(feed: Feed, rows: int, lane: int) -> bytes:
    """One binary request over HTTP with `rows` rows, the deadline as its queue timeout, and its lane."""
    repeats = -(-rows // len(feed.features))
    values = np.ascontiguousarray(np.concatenate([feed.features] * repeats)[:rows], "<f4")
    parameters: dict[str, Any] = {"timeout": int(feed.deadline_ms * 1e3), "binary_data_output": True}
    if feed.lanes:
        parameters["priority"] = lane
    tensor = {"name": feed.input_name, "shape": list(values.shape), "datatype": "FP32"}
    head = json.dumps(
        {"parameters": parameters, "inputs": [tensor | {"parameters": {"binary_data_size": values.nbytes}}]}
    ).encode()
    return (
        f"POST /v2/models/{feed.model}/infer HTTP/1.1\r\nHost: {feed.authority}\r\n"
        f"Content-Length: {len(head) + values.nbytes}\r\nInference-Header-Content-Length: {len(head)}\r\n\r\n"
    ).encode() + head + values.tobytes()  # fmt: skip


def drive(feed: Feed, arrivals: Arrivals) -> OpenLoop:
    """Send `arrivals` at their times; returns after the last answer or deadline. ComponentError without a server."""
    result = asyncio.run(_Driver(feed, arrivals).run())
    if all(outcome.startswith("connection") for outcome in result.outcome):
        raise ComponentError("no server answers", field="authority", was=feed.authority[:100])
    return result

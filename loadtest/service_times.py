"""How long a served model is busy with a batch, and what the caller waits beside it.

Lone requests of each size give the samples; after each the server's own statistics say how much of it was spent in the
instance. What else a caller waits is measured on the path that `loadtest/open_loop.py` sends on, with a pause before
each request: caches go cold and threads go to sleep between the sparse requests of a recording, too. Concurrent lone
rows, which the server batches, show what each further request adds to a batch of the same rows.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from export.batching import ServiceTimes
from export.batching.service import sizes_up_to
from loadtest.open_loop import Feed, drive_lone, take
from tickserve.client import Client
from tickserve.errors import ComponentError, DeadlineExceededError, OverloadedError

CALL_MS = 10_000.0
CONCURRENT, CONCURRENT_S = 8, 1.0
GAP_S = 0.005
# An execution shows in the statistics a moment after its answer.
COUNTED_S = 1.0
COMPUTE = ("compute_input", "compute_infer", "compute_output")

Inputs = Mapping[str, npt.NDArray[Any]]


def measure_service(
    http_url: str, client: Client, model: str, inputs: Inputs, max_batch: int, calls: int
) -> ServiceTimes:
    """Measure `model` on the server at `http_url` with `calls` lone requests of each size (1, 2, 4, ..., `max_batch`).

    `inputs` [B, ...] are the rows to send by name, repeated where a batch needs more. Raises RequestError of a call,
    ComponentError when the server's statistics cannot be read or do not count the calls.
    """
    samples = {}
    for rows in sizes_up_to(max_batch):
        batch = take(inputs, rows)
        client.score(model, batch, deadline_ms=CALL_MS)
        counter = _Counter(http_url, model)
        for _ in range(calls):
            client.score(model, batch, deadline_ms=CALL_MS)
            counter.read()
        samples[rows] = np.array(counter.busy_us)
    path = _paths(http_url, model, inputs, calls)
    lone = ServiceTimes(samples, 0.0, 0.0, "")
    per_request = _per_request(http_url, client, model, take(inputs, 1), lone)
    source = "the served model, over HTTP on this machine"
    return ServiceTimes(samples, per_request, float(np.median(path)), source, tuple(path))


def _paths(http_url: str, model: str, inputs: Inputs, calls: int) -> list[float]:
    """What each of `calls` lone requests of one row waited off the instance, in microseconds."""
    counter = _Counter(http_url, model)
    seen = drive_lone(Feed(http_url, model, inputs, CALL_MS), calls, GAP_S, counter.read)
    if not np.isfinite(seen.latency_us).all():
        raise ComponentError("a lone request was not answered", field="statistics", was=str(seen.to_json()["outcomes"]))
    return [max(0.0, taken - busy) for taken, busy in zip(seen.latency_us.tolist(), counter.busy_us, strict=True)]


class _Counter:
    """Microseconds the instance was busy with each request, read after each one."""

    def __init__(self, http_url: str, model: str) -> None:
        self._http_url, self._model = http_url, model
        self._last = _settled(http_url, model)
        self.busy_us: list[float] = []

    def read(self) -> None:
        """Wait until the one request since the last reading is counted, and keep its time."""
        give_up = time.monotonic() + COUNTED_S
        now = _statistics(self._http_url, self._model)
        # The server counts an execution a moment before it adds what it took.
        while now["execution_count"] == self._last["execution_count"] or _compute_us(self._last, now) <= 0:
            if time.monotonic() > give_up:
                raise ComponentError("the server does not count an answered request", field="statistics")
            now = _statistics(self._http_url, self._model)
        self.busy_us.append(_compute_us(self._last, now) / (now["execution_count"] - self._last["execution_count"]))
        self._last = now


def _settled(http_url: str, model: str) -> dict[str, Any]:
    """The statistics once they stand still: what came before is counted."""
    last = _statistics(http_url, model)
    for _ in range(100):
        time.sleep(0.01)
        now = _statistics(http_url, model)
        if now["execution_count"] == last["execution_count"]:
            return now
        last = now
    raise ComponentError("somebody else uses the model while it is measured", field="statistics")


def _statistics(http_url: str, model: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"http://{http_url}/v2/models/{model}/stats", timeout=10) as answer:
            stats: list[dict[str, Any]] = json.load(answer)["model_stats"]
    except (OSError, ValueError, KeyError) as error:
        raise ComponentError(f"no statistics of {model!r}: {type(error).__name__}", field="statistics") from error
    return max(stats, key=lambda version: int(version["version"]))


def _compute_us(before: dict[str, Any], after: dict[str, Any]) -> float:
    kind = "inference_stats"
    return sum(float(after[kind][part]["ns"]) - float(before[kind][part]["ns"]) for part in COMPUTE) / 1_000


def _per_request(http_url: str, client: Client, model: str, row: Inputs, lone: ServiceTimes) -> float:
    """What a further request adds to a batch: batches of lone rows against lone batches of as many rows."""
    before = _by_batch(_statistics(http_url, model))
    stop = time.monotonic() + CONCURRENT_S
    threads = [threading.Thread(target=_ask, args=(client, model, row, stop)) for _ in range(CONCURRENT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    extra, weight = 0.0, 0
    for size, (count, total_us) in _by_batch(_statistics(http_url, model)).items():
        was_count, was_us = before.get(size, (0, 0.0))
        if size > 1 and count > was_count:
            busy = (total_us - was_us) / (count - was_count)
            extra += max(0.0, busy - lone.mean_us(size)) / (size - 1) * (count - was_count)
            weight += count - was_count
    return extra / weight if weight else 0.0


def _ask(client: Client, model: str, row: Inputs, stop: float) -> None:
    while time.monotonic() < stop:
        try:
            client.score(model, row, deadline_ms=CALL_MS)
        except (OverloadedError, DeadlineExceededError):  # a bounded queue may refuse; only executions are counted
            time.sleep(0.001)


def _by_batch(stats: dict[str, Any]) -> dict[int, tuple[int, float]]:
    return {
        int(batch["batch_size"]): (
            int(batch["compute_infer"]["count"]),
            sum(batch[part]["ns"] for part in COMPUTE) / 1_000,
        )
        for batch in stats.get("batch_stats", [])
    }

"""How long a served model is busy with a batch: what occupies an instance, and what the caller waits beside it.

Lone requests of each size give the samples; the server's own statistics say how much of each was spent in the instance.
Concurrent lone rows, which the server batches, show what each further request adds to a batch of the same rows.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from typing import Any

import numpy as np
import numpy.typing as npt

from export.batching import ServiceTimes
from export.batching.service import sizes_up_to
from tickserve.client import Client
from tickserve.errors import ComponentError, DeadlineExceededError, OverloadedError

CALL_MS = 10_000.0
CONCURRENT, CONCURRENT_S = 8, 1.0
COMPUTE = ("compute_input", "compute_infer", "compute_output")


def measure_service(
    http_url: str, client: Client, model: str, features: npt.NDArray[np.float32], max_batch: int, calls: int
) -> ServiceTimes:
    """Measure `model` on the server at `http_url` with `calls` lone requests of each size (1, 2, 4, ..., `max_batch`).

    `features` float32 [B, ...] are the rows to send, repeated where a batch needs more. Raises RequestError of a call,
    ComponentError when the server's statistics cannot be read.
    """
    samples, overheads = {}, []
    for rows in sizes_up_to(max_batch):
        batch = np.concatenate([features] * (-(-rows // len(features))))[:rows]
        client.score(model, batch, deadline_ms=CALL_MS)
        before = _statistics(http_url, model)
        taken = np.array([_timed(client, model, batch) for _ in range(calls)])
        after = _statistics(http_url, model)
        busy = _compute_us(before, after) / max(1, after["execution_count"] - before["execution_count"])
        overhead = max(0.0, float(np.mean(taken)) - busy)
        overheads.append(overhead)
        samples[rows] = np.maximum(taken - overhead, busy / 2)
    lone = ServiceTimes(samples, 0.0, 0.0, "")
    per_request = _per_request(http_url, client, model, features, lone)
    return ServiceTimes(
        samples, per_request, float(np.median(overheads)), "the served model, over HTTP on this machine"
    )


def _timed(client: Client, model: str, batch: npt.NDArray[np.float32]) -> float:
    start = time.perf_counter_ns()
    client.score(model, batch, deadline_ms=CALL_MS)
    return (time.perf_counter_ns() - start) / 1_000


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


def _per_request(
    http_url: str, client: Client, model: str, features: npt.NDArray[np.float32], lone: ServiceTimes
) -> float:
    """What a further request adds to a batch: batches of lone rows against lone batches of as many rows."""
    before = _by_batch(_statistics(http_url, model))
    stop = time.monotonic() + CONCURRENT_S
    threads = [threading.Thread(target=_ask, args=(client, model, features[:1], stop)) for _ in range(CONCURRENT)]
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


def _ask(client: Client, model: str, row: npt.NDArray[np.float32], stop: float) -> None:
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

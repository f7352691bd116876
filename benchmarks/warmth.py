"""What a pause costs an engine: the latency of the first call, and of a call after an idle time, kept warm and not.

    python -m benchmarks.warmth --repository model_repository

Over HTTP, gRPC and `local://`, one row a call. Clients that differ in `keep_warm_ms` alone take turns in an order drawn
anew for each pause; each is called a few times, left alone for the pause with the others closed, and timed once. Each
first call is that of a new client to a server that is warm, after `warm()` and without. Medians, since a lone call on a
machine that others use is at their mercy. The calls "back to back" say what keeping warm costs an engine that is busy.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.harness import Subject, as_command, as_inputs, machine, one_row, options, served, subject
from tickserve.client import Client
from tickserve.client._check import Inputs

WITHOUT = "without"
BEFORE = 20  # calls before each pause
BACK_TO_BACK = 100
# The longer a pause, the fewer of them: at most about so many seconds of it for each contestant and round.
SPENT_S = 0.4


def opened(url: str, model: Subject, keep_warm_ms: float | None) -> Client:
    """A client of `model`."""
    manifest = None if url.startswith("local://") else model.manifest
    return Client(url, manifest=manifest, deadline_ms=5_000, keep_warm_ms=keep_warm_ms)


def timed(client: Client, name: str, inputs: Inputs) -> float:
    """Microseconds of one call."""
    start = time.perf_counter_ns()
    client.score(name, inputs)
    return (time.perf_counter_ns() - start) / 1e3


def first_call(url: str, model: Subject, inputs: Inputs, *, warmed: bool) -> float:
    """Microseconds of the first call of a new client."""
    with opened(url, model, None) as client:
        if warmed:
            client.warm(model.manifest.name)
        return timed(client, model.manifest.name, inputs)


def after_pause(url: str, model: Subject, inputs: Inputs, pause_ms: float, keep_warm_ms: float | None) -> list[float]:
    """Microseconds of the calls back to back before a pause, then of the one after it."""
    name = model.manifest.name
    with opened(url, model, keep_warm_ms) as client:
        client.warm(name)
        times = [timed(client, name, inputs) for _ in range(BEFORE + (BACK_TO_BACK if pause_ms == 0 else 0))]
        time.sleep(pause_ms / 1e3)
        return [*times[BEFORE:], timed(client, name, inputs)]


def compare(
    url: str, model: Subject, pauses: list[float], contestants: dict[str, float | None], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Microseconds by case and contestant (its `keep_warm_ms`), all in turns of one run."""
    inputs = as_inputs(one_row(model.folder, model.manifest))
    found: dict[str, dict[str, list[float]]] = {}
    order = random.Random(7)
    for turn in range(rounds):
        for warmed in order.sample((False, True), 2):
            name = "first call, after warm()" if warmed else "first call"
            found.setdefault(name, {}).setdefault(WITHOUT, []).append(first_call(url, model, inputs, warmed=warmed))
        for pause_ms in [0.0, *pauses]:
            # A long pause is met in few of the rounds, spread over the whole run.
            every = max(1, round(pause_ms / 1e3 / SPENT_S))
            if turn % every:
                continue
            case = f"after {pause_ms:g} ms" if pause_ms else "back to back"
            for name in order.sample(list(contestants), len(contestants)):
                times = after_pause(url, model, inputs, pause_ms, contestants[name])
                found.setdefault(case, {}).setdefault(name, []).extend(times)
    return found


def rows_of(
    transport: str, found: dict[str, dict[str, list[float]]], contestants: Iterable[str]
) -> list[dict[str, Any]]:
    """A row for each case and contestant."""
    return [
        {
            "transport": transport,
            "case": case,
            "keep_warm": name,
            "calls": len(by_name[name]),
            "p50_us": float(np.median(by_name[name])),
            "p90_us": float(np.percentile(by_name[name], 90)),
            "p50_ratio": float(np.median(by_name[name]) / np.median(by_name[WITHOUT])),
        }
        for case, by_name in sorted(found.items(), key=lambda each: _place(each[0]))
        for name in contestants
        if name in by_name
    ]


def _place(case: str) -> tuple[bool, float]:
    """First calls first, then by the pause."""
    if case.startswith("first"):
        return False, len(case)
    return True, float(case.split()[1]) if case.startswith("after") else 0


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as text."""
    print(f"{'':<7}{'case':<26}{'keep_warm_ms':<14}{'calls':>7}{'p50 us':>9}{'p90 us':>9}{'p50':>8}")
    for row in rows:
        print(
            f"{row['transport']:<7}{row['case']:<26}{row['keep_warm']:<14}{row['calls']:>7}{row['p50_us']:>9.0f}"
            f"{row['p90_us']:>9.0f}{row['p50_ratio']:>7.2f}x"
        )


def main(arguments: list[str]) -> int:
    parser = options(__doc__)
    parser.add_argument("--pauses", type=float, nargs="*", default=[10, 100, 500, 2_000], help="milliseconds")
    parser.add_argument("--keep-warm", type=float, nargs="*", default=[2, 5, 20], help="keep_warm_ms of contestants")
    parser.add_argument("--rounds", type=int, default=24)
    chosen = parser.parse_args(arguments)
    model = subject(chosen.repository, chosen.model)
    contestants: dict[str, float | None] = {WITHOUT: None, **{f"{every:g} ms": every for every in chosen.keep_warm}}
    rows: list[dict[str, Any]] = []
    with served(chosen.repository, [model.manifest.name]) as server:
        urls = {
            "http": server.http_url,
            "grpc": f"grpc://{server.grpc_url}",
            "local": f"local://{model.folder}",
        }
        for transport, url in urls.items():
            found = compare(url, model, chosen.pauses, contestants, chosen.rounds)
            rows += rows_of(transport, found, contestants)
    about = machine()
    if chosen.json:
        print(json.dumps({"machine": about, "model": model.manifest.name, "rows": rows}))
        return 0
    print(f"{about}\nmodel {model.manifest.name}, one row a call; ratios to the same pause without keep_warm_ms\n")
    show(rows)
    return 0


if __name__ == "__main__":
    as_command(main)

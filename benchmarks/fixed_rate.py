"""A pure-Python engine loop at a fixed rate: how old a decision is, from the moment it was meant to be asked for.

    python -m benchmarks.fixed_rate --repository model_repository --rate 500

The loop scores one real row every 1/rate seconds, one call at a time, whatever happened before. A call's time counts
from its intended start, so that a slow answer is charged to every call it holds up, and nothing is omitted.
"""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Subject, Times, as_command, machine, options, quantiles, served, subject, wait_until
from tickserve.client import Client
from tickserve.journal import Journal


def run(client: Client, model: Subject, rate: float, seconds: float) -> tuple[Times, float]:
    """Microseconds from each intended start to the checked answer, and the share of calls that began late."""
    period, count = int(1e9 / rate), int(rate * seconds)
    name, rows = model.manifest.name, model.rows
    for index in range(50):
        client.score(name, rows[index % len(rows)][np.newaxis])
    taken, late = np.empty(count), 0
    start = time.monotonic_ns() + 10_000_000
    for index in range(count):
        due = start + index * period
        late += time.monotonic_ns() > due
        wait_until(due)
        client.score(name, rows[index % len(rows)][np.newaxis])
        taken[index] = time.monotonic_ns() - due
    return taken / 1e3, late / count


def ways(stack: ExitStack, model: Subject) -> dict[str, Client]:
    """A client for each way to the model, with the journal on."""
    server = stack.enter_context(served(model.repository, [model.manifest.name]))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    found = {}
    for name, url in (
        ("HTTP", server.http_url),
        ("gRPC", f"grpc://{server.grpc_url}"),
        ("in process", f"local://{model.repository}"),
    ):
        journal = Journal(folder / name)
        stack.callback(journal.close)
        client = Client(url, manifest=model.manifest, deadline_ms=1_000, observer=journal)
        found[name] = stack.enter_context(client)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as text."""
    print(f"{'way':<14}{'calls':>8}{'p50 us':>10}{'p90 us':>10}{'p99 us':>10}{'p99.9 us':>10}{'begun late':>12}")
    for row in rows:
        times = "".join(f"{row[f'{name}_us']:>10.0f}" for name in ("p50", "p90", "p99", "p99.9"))
        print(f"{row['way']:<14}{row['calls']:>8}{times}{row['late_share']:>11.2%}")


def main(arguments: list[str]) -> int:
    parser = options(__doc__)
    parser.add_argument("--rate", type=float, default=500, help="calls a second")
    parser.add_argument("--seconds", type=float, default=10, help="for each way")
    chosen = parser.parse_args(arguments)
    model = subject(chosen.repository, chosen.model)
    rows = []
    with ExitStack() as stack:
        for name, client in ways(stack, model).items():
            times, late = run(client, model, chosen.rate, chosen.seconds)
            rows.append({"way": name, "calls": len(times), **quantiles(times), "late_share": late})
    if chosen.json:
        print(json.dumps({"machine": machine(), "model": model.manifest.name, "rate": chosen.rate, "rows": rows}))
        return 0
    print(f"{machine()}\nmodel {model.manifest.name}, {chosen.rate:g} calls/s, journal on, from the intended start\n")
    show(rows)
    return 0


if __name__ == "__main__":
    as_command(main)

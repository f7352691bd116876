"""What the journal costs a call: the same client with and without it, in turns, on one server.

    python -m benchmarks.journal --repository model_repository

What is timed is the whole call as an engine sees it, in turns that pay for what the journal puts off; and `decided`
alone, the hand-over. The same in this process (local://), where calls come fastest; what it takes to encode one of
those decisions, the usual way and field by field; and a process that calls so without a rest is killed (SIGKILL): how
far behind its last call the journal ends, and how many of its records are lost.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import (
    PUBLISH_FIRST,
    Call,
    Times,
    as_command,
    hand_overs,
    joined,
    machine,
    measure,
    options,
    quantiles,
    served,
    subject,
    sustained,
)
from tickserve.client import Client, Decision
from tickserve.journal import DecisionRecord, Journal, read_journal
from tickserve.journal._schema import encode_any, encode_decision
from tickserve.manifest import Manifest

PLAIN, JOURNALED = "no journal", "journal"
# Calls without a rest; every hundredth says how many were answered.
FLAT_OUT = """
import sys
from pathlib import Path
from benchmarks.harness import subject
from tickserve.client import Client
from tickserve.journal import Journal

chosen = subject(Path(sys.argv[1]), sys.argv[2])
row, count = chosen.rows[:1], 0
with Journal(sys.argv[3]) as journal, Client(f"local://{sys.argv[1]}", observer=journal, deadline_ms=5_000) as client:
    while True:
        for _ in range(100):
            client.score(chosen.manifest.name, row)
        count += 100
        print(count, flush=True)
"""


def contestants(
    stack: ExitStack, url: str, manifest: Manifest, row: npt.NDArray[np.float32], journal: Journal
) -> dict[str, Call]:
    clients = {
        PLAIN: Client(url, manifest=manifest, deadline_ms=5_000),
        JOURNALED: Client(url, manifest=manifest, deadline_ms=5_000, observer=journal),
    }

    def call_of(client: Client) -> Call:
        stack.enter_context(client)
        return lambda: client.score(manifest.name, row).score

    return {name: call_of(client) for name, client in clients.items()}


def encoding(decision: Decision) -> dict[str, Times]:
    """Microseconds that it takes to encode `decision`, which has nothing to remark on; both ways in turns."""
    ways: dict[str, Call] = {
        "encode, usual": lambda: encode_decision(decision),
        "encode, any": lambda: encode_any(decision),
    }
    return measure(ways, rounds=40, block=200)


def killed(repository: Path, model: str, folder: Path, seconds: float) -> dict[str, Any]:
    """What is left of the journal of a process killed while it called without a rest."""
    command = [sys.executable, "-c", FLAT_OUT, str(repository), model, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        answered = int(process.stdout.readline())
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            answered = int(process.stdout.readline())
        process.kill()
        killed_ns = time.monotonic_ns()
        answered = int((process.stdout.read().splitlines() or [str(answered)])[-1])
    records = [each for each in read_journal(folder, tolerant=True) if isinstance(each, DecisionRecord)]
    lag_ms = (killed_ns - max(record.monotonic_ns for record in records)) / 1e6
    return {
        "calls_a_second": answered / seconds,
        "answered": answered,
        "journaled": len(records),
        "lost": max(0, answered - len(records)),
        "lag_ms": lag_ms,
    }


def summary(name: str, taken: Times) -> dict[str, Any]:
    return {"what": name, "calls": len(taken)} | quantiles(taken)


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    chosen_model = subject(chosen.repository, chosen.model)
    manifest, row = chosen_model.manifest, chosen_model.rows[:1]
    with ExitStack() as stack:
        server = stack.enter_context(served(chosen.repository, [manifest.name]))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        journal = stack.enter_context(Journal(folder))
        turns = sustained(contestants(stack, server.http_url, manifest, row, journal), chosen.rounds, chosen.turn)
        rows = [summary(name, taken) for name, taken in joined(turns).items()]
        alone, decision = hand_overs(server.http_url, manifest, row, journal)
        rows.append(summary("decided() alone", alone))
        rows += [summary(name, taken) for name, taken in encoding(decision).items()]
        local = contestants(stack, f"local://{chosen.repository}", manifest, row, journal)
        turns = sustained(local, chosen.rounds, chosen.turn)
        rows += [summary(f"local, {name}", taken) for name, taken in joined(turns).items()]
        journal.flush()
        stats = journal.stats
        kill = killed(
            chosen.repository, manifest.name, Path(stack.enter_context(tempfile.TemporaryDirectory())), chosen.seconds
        )
    told = {"records": stats.written, "lost": stats.lost, "bytes_per_record": stats.bytes / max(1, stats.written)}
    return {
        "machine": machine(),
        "model": manifest.name,
        "shape": list(row.shape),
        "rows": rows,
        "journal": told,
        "kill": kill,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}\nmodel {result['model']}, input {result['shape']}, concurrency 1, http\n")
    print(f"{'':<20}{'calls':>8}{'p50 us':>10}{'p99 us':>10}{'p99.9 us':>10}")
    for row in result["rows"]:
        print(f"{row['what']:<20}{row['calls']:>8}{row['p50_us']:>10.1f}{row['p99_us']:>10.1f}{row['p99.9_us']:>10.1f}")
    plain, journaled = (next(row for row in result["rows"] if row["what"] == name) for name in (PLAIN, JOURNALED))
    ratios = ", ".join(f"{key[:-3]} {journaled[key] / plain[key]:.3f}x" for key in ("p50_us", "p99_us", "p99.9_us"))
    told = result["journal"]
    print(f"\nwith the journal: {ratios}, {journaled['calls'] / plain['calls']:.3f}x the calls in the same time")
    print(f"{told['records']:,} records, {told['lost']} lost, {told['bytes_per_record']:.0f} bytes a record on disk")
    kill = result["kill"]
    print(
        f"SIGKILL at {kill['calls_a_second']:,.0f} calls/s without a rest: {kill['answered']:,} answered, "
        f"{kill['journaled']:,} journaled, {kill['lost']:,} lost, the journal {kill['lag_ms']:.0f} ms behind"
    )


def main(arguments: list[str]) -> int:
    parser = options(__doc__, rounds=10, turn_s=0.5)
    parser.add_argument("--seconds", type=float, default=4.0, help="calls without a rest before the kill")
    chosen = parser.parse_args(arguments)
    result = run(chosen)
    if chosen.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    as_command(main, PUBLISH_FIRST)

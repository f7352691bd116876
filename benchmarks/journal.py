"""What the journal costs a call: the same client with and without it, in turns, on one server.

    python -m benchmarks.journal --repository model_repository

What is timed is the whole call as an engine sees it, and `decided` alone, which is all of the journal that runs on the
caller's thread. The journal's own thread works meanwhile, as it would beside an engine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Call, Times, machine, measure, quantiles, served, subject
from tickserve.client import Client, Decision
from tickserve.errors import TickserveError
from tickserve.journal import Journal
from tickserve.manifest import Manifest

PLAIN, JOURNALED = "no journal", "journal"


class Clocked:
    """An observer that hands on to the journal and keeps how long that took."""

    def __init__(self, journal: Journal) -> None:
        self._decided, self.taken = journal.decided, list[int]()

    def decided(self, decision: Decision) -> None:
        """Time the hand-over."""
        start = time.perf_counter_ns()
        self._decided(decision)
        self.taken.append(time.perf_counter_ns() - start)


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


def decided_alone(url: str, manifest: Manifest, row: npt.NDArray[np.float32], journal: Journal, calls: int) -> Times:
    """Microseconds of each hand-over, over `calls` calls."""
    clocked = Clocked(journal)
    with Client(url, manifest=manifest, deadline_ms=5_000, observer=clocked) as client:
        for _ in range(calls):
            client.score(manifest.name, row)
    return np.array(clocked.taken) / 1e3


def summary(name: str, taken: Times) -> dict[str, Any]:
    return {"what": name, "calls": len(taken)} | quantiles(taken)


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="published models")
    parser.add_argument("--model", help="default: the first model of the repository")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--block", type=int, default=200, help="calls a turn")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    chosen_model = subject(chosen.repository, chosen.model)
    manifest, row = chosen_model.manifest, chosen_model.rows[:1]
    with ExitStack() as stack:
        server = stack.enter_context(served(chosen.repository, [manifest.name]))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        journal = stack.enter_context(Journal(folder))
        times = measure(contestants(stack, server.http_url, manifest, row, journal), chosen.rounds, chosen.block)
        rows = [summary(name, taken) for name, taken in times.items()]
        alone = decided_alone(server.http_url, manifest, row, journal, chosen.rounds * chosen.block)
        rows.append(summary("decided() alone", alone))
        journal.flush()
        stats = journal.stats
    told = {"records": stats.written, "lost": stats.lost, "bytes_per_record": stats.bytes / max(1, stats.written)}
    return {"machine": machine(), "model": manifest.name, "shape": list(row.shape), "rows": rows, "journal": told}


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}\nmodel {result['model']}, input {result['shape']}, concurrency 1, http\n")
    print(f"{'':<20}{'calls':>8}{'p50 us':>10}{'p99 us':>10}{'p99.9 us':>10}")
    for row in result["rows"]:
        print(f"{row['what']:<20}{row['calls']:>8}{row['p50_us']:>10.1f}{row['p99_us']:>10.1f}{row['p99.9_us']:>10.1f}")
    plain, journaled = (next(row for row in result["rows"] if row["what"] == name) for name in (PLAIN, JOURNALED))
    ratios = ", ".join(f"{key[:-3]} {journaled[key] / plain[key]:.3f}x" for key in ("p50_us", "p99_us", "p99.9_us"))
    told = result["journal"]
    print(f"\nwith the journal: {ratios}")
    print(f"{told['records']:,} records, {told['lost']} lost, {told['bytes_per_record']:.0f} bytes a record on disk")


def main(arguments: list[str]) -> int:
    chosen = options(arguments)
    result = run(chosen)
    if chosen.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TickserveError as error:
        sys.exit(f"error: {error} (publish a model first: make demo)")

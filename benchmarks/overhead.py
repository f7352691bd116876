"""What the way to a model costs: {in process, shared memory, gRPC, HTTP} x {1, 16 at once} x {4 B, 1 MB}.

    python -m benchmarks.overhead [--calls 400]

The model does next to nothing (benchmarks/nil_model.py), so a call's time is the client's checks and the way there and
back. 16 at once are 16 threads on one client. The transports take turns, so that a slow spell meets all of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import Times, as_command, machine, quantiles, served
from benchmarks.nil_model import example, name_of, publish
from tickserve.client import Client

SIZES = ("4 B", "1 MB")
TURNS = 4
LARGE_SHARE = 4  # a call of 1 MB is made so many times less often
DEADLINE_MS = 60_000


class Cell(NamedTuple):
    """One combination's calls, in microseconds, and the seconds they took together."""

    times: Times
    seconds: float


def clients(stack: ExitStack, repository: Path) -> dict[str, Client]:
    """One client for each way to the models of `repository`."""
    server = stack.enter_context(served(repository))
    ways: dict[str, dict[str, Any]] = {
        "in process": {"url": f"local://{repository}"},
        "shared memory": {"url": server.http_url, "transport": "shm", "credential": server.credential},
        "gRPC": {"url": f"grpc://{server.grpc_url}"},
        "HTTP": {"url": server.http_url},
    }
    return {
        name: stack.enter_context(Client(manifest=repository, deadline_ms=DEADLINE_MS, **options))
        for name, options in ways.items()
    }


def together(client: Client, size: str, threads: int, calls: int) -> Cell:
    """`calls` calls from each of `threads` threads."""
    model, row = name_of(size), example(size)

    def work(_: int) -> list[int]:
        taken = []
        client.score(model, row)
        for _ in range(calls):
            start = time.perf_counter_ns()
            client.score(model, row)
            taken.append(time.perf_counter_ns() - start)
        return taken

    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        found = [taken for each in pool.map(work, range(threads)) for taken in each]
        return Cell(np.array(found) / 1e3, time.perf_counter() - start)


def matrix(ways: dict[str, Client], calls: int) -> list[dict[str, Any]]:
    """A row for each combination."""
    rows = []
    for size in SIZES:
        for threads in (1, 16):
            each = max(5, calls // TURNS // (LARGE_SHARE if size == "1 MB" else 1) // (4 if threads > 1 else 1))
            cells: dict[str, list[Cell]] = {name: [] for name in ways}
            for turn in range(TURNS):
                names = list(ways)[turn:] + list(ways)[:turn]
                for name in names:
                    cells[name].append(together(ways[name], size, threads, each))
            for name, found in cells.items():
                times = np.concatenate([cell.times for cell in found])
                rate = len(times) / sum(cell.seconds for cell in found)
                rows.append({"size": size, "at_once": threads, "way": name, "per_s": rate, **quantiles(times)})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as text."""
    print(f"{'size':<6}{'at once':>8}  {'way':<14}{'p50 us':>10}{'p90 us':>10}{'p99 us':>10}{'calls/s':>10}")
    for row in rows:
        print(
            f"{row['size']:<6}{row['at_once']:>8}  {row['way']:<14}"
            f"{row['p50_us']:>10.0f}{row['p90_us']:>10.0f}{row['p99_us']:>10.0f}{row['per_s']:>10.0f}"
        )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=400, help="a combination; fewer at 1 MB and from 16 threads each")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    with ExitStack() as stack:
        repository = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "models"
        for size in SIZES:
            publish(repository, size)
        rows = matrix(clients(stack, repository), chosen.calls)
    about = machine("onnxruntime")
    if chosen.json:
        print(json.dumps({"machine": about, "rows": rows}))
        return 0
    print(f"{about}\na model that does next to nothing, one row a call, the client with every check\n")
    show(rows)
    return 0


if __name__ == "__main__":
    as_command(main)

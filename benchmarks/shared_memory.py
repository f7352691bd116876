"""Shared memory beside the wire, one lone call at a time, at 4 B, at 64 KB and at 1 MB.

    python -m benchmarks.shared_memory

The model does next to nothing (benchmarks/nil_model.py). Its answer is 24 bytes: what grows is what is sent. The
contestants take turns in short blocks on one server.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import Call, as_command, machine, measure, quantiles
from benchmarks.nil_model import SHAPES, example, name_of, publish
from benchmarks.overhead import clients
from tickserve.client import Client

BASE = "HTTP"


def call(client: Client, size: str) -> Call:
    model, row = name_of(size), example(size)
    return lambda: client.score(model, row)


def compare(ways: dict[str, Client], size: str, rounds: int, block: int) -> list[dict[str, Any]]:
    """A row for each way, with its p50 as a ratio of HTTP's."""
    found = measure({name: call(client, size) for name, client in ways.items()}, rounds, block)
    base = quantiles(found[BASE])["p50_us"]
    rows = []
    for name, taken in found.items():
        measured = quantiles(taken)
        rows.append({"size": size, "way": name, **measured, "p50_ratio": measured["p50_us"] / base})
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--block", type=int, default=50, help="calls a turn; a fifth of it at 1 MB")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    with ExitStack() as stack:
        repository = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "models"
        for size in SHAPES:
            publish(repository, size)
        ways = {name: client for name, client in clients(stack, repository).items() if name != "in process"}
        rows = []
        for size in SHAPES:
            rows += compare(ways, size, chosen.rounds, chosen.block // (5 if size == "1 MB" else 1))
    if chosen.json:
        print(json.dumps({"machine": machine(), "rows": rows}))
        return 0
    print(f"{machine()}\none lone call at a time, one row; ratios to {BASE}\n")
    print(f"{'size':<6}{'way':<16}{'p50 us':>10}{'p90 us':>10}{'p99 us':>10}{'p50':>8}")
    for row in rows:
        times = "".join(f"{row[f'{name}_us']:>10.0f}" for name in ("p50", "p90", "p99"))
        print(f"{row['size']:<6}{row['way']:<16}{times}{row['p50_ratio']:>7.2f}x")
    return 0


if __name__ == "__main__":
    as_command(main)

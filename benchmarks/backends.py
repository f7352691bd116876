"""One lone call to a server that scores in its own process, beside one whose models run in a Python process each.

    python -m benchmarks.backends --repository model_repository

Two embedded servers over the same model, one for each `serve.backend`, asked in turn in short blocks within one run: by
our client over HTTP and gRPC with its checks, and by tritonclient.grpc used as documented. Then what each server holds.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.client import BASE, documented_grpc, ours
from benchmarks.harness import Call, as_command, machine, measure, options, quantiles, served, subject
from serving import stubs
from tickserve.config import BackendKind

BACKENDS: tuple[BackendKind, ...] = ("native", "python")


def contestants(stack: ExitStack, server: Any, manifest: Any, row: Any) -> dict[str, Call]:
    return {
        "tickserve http": ours(stack, server.http_url, manifest, row, None),
        "tickserve grpc": ours(stack, f"grpc://{server.grpc_url}", manifest, row, None),
        BASE: documented_grpc(stack, server.grpc_url, manifest, row),
    }


def run(repository: Path, model: str | None, rounds: int, block: int) -> dict[str, Any]:
    chosen = subject(repository, model)
    manifest, row = chosen.manifest, chosen.rows[:1]
    with ExitStack() as stack:
        servers = {kind: stack.enter_context(served(repository, [manifest.name], backend=kind)) for kind in BACKENDS}
        calls = {
            f"{kind}: {name}": call
            for kind, server in servers.items()
            for name, call in contestants(stack, server, manifest, row).items()
        }
        rows = [{"call": name, **quantiles(taken)} for name, taken in measure(calls, rounds, block).items()]
        resident = {
            kind: stubs.resident_bytes([server.pid, *stubs.stubs_of(server.pid)]) / 2**20
            for kind, server in servers.items()
        }
    return {"model": manifest.name, "rows": rows, "resident_mb": resident}


def show(found: dict[str, Any]) -> None:
    times = {row["call"]: row for row in found["rows"]}
    print(f"{'call':<28}{'p50 us':>10}{'p99 us':>10}{'p50 of python':>16}")
    for name, row in times.items():
        other = times[f"python: {name.partition(': ')[2]}"]
        ratio = row["p50_us"] / other["p50_us"]
        print(f"{name:<28}{row['p50_us']:>10.1f}{row['p99_us']:>10.1f}{ratio:>15.2f}x")
    for kind, size in found["resident_mb"].items():
        print(f"{kind}: {size:.0f} MB resident, the server and its processes")


def main(arguments: list[str]) -> int:
    chosen = options(__doc__, rounds=20).parse_args(arguments)
    found = run(chosen.repository, chosen.model, chosen.rounds, chosen.block)
    about = machine("tritonclient", "grpcio", "onnxruntime")
    if chosen.json:
        print(json.dumps({"machine": about, **found}))
        return 0
    print(f"{about}\nmodel {found['model']}, one row, concurrency 1\n")
    show(found)
    return 0


if __name__ == "__main__":
    as_command(main)

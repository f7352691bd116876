"""Throughput over asyncio: tickserve's AsyncClient beside tritonclient.grpc.aio used as documented, on one server.

    python -m benchmarks.asyncio_clients --repository model_repository

As many coroutines as stated call in a loop, one real row a call; the contestants take turns. Ours have every check and
the journal on, and pay in their turns for what it puts off.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.harness import SETTLE_S, Subject, as_command, machine, options, served, subject
from tickserve.client import AsyncClient
from tickserve.journal import Journal

AsyncCall = Callable[[], Awaitable[object]]
BASE = "tritonclient.grpc.aio"
TURNS = 3


def ours(client: AsyncClient, model: Subject) -> AsyncCall:
    name, row = model.manifest.name, model.rows[:1]
    return lambda: client.score(name, row)


def documented(client: Any, model: Subject) -> AsyncCall:
    import tritonclient.grpc.aio as triton

    manifest, row = model.manifest, model.rows[:1]
    spec = manifest.inputs[0]

    async def call() -> object:
        tensor = triton.InferInput(spec.name, list(row.shape), spec.dtype)
        tensor.set_data_from_numpy(row)
        outputs = [triton.InferRequestedOutput(output.name) for output in manifest.outputs]
        answer = await client.infer(manifest.name, [tensor], outputs=outputs)
        return [answer.as_numpy(output.name) for output in manifest.outputs]

    return call


async def rate(call: AsyncCall, at_once: int, seconds: float) -> tuple[int, float]:
    """Calls that ended within about `seconds`, and how many seconds that was."""
    count = 0
    stop = time.perf_counter() + seconds

    async def work() -> None:
        nonlocal count
        while time.perf_counter() < stop:
            await call()
            count += 1

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(at_once)))
    return count, time.perf_counter() - start


async def compare(server: Any, model: Subject, at_once: int, seconds: float) -> list[dict[str, Any]]:
    """Calls per second of each contestant."""
    import tritonclient.grpc.aio as triton

    base = triton.InferenceServerClient(server.grpc_url)
    pinned: dict[str, Any] = {"manifest": model.manifest, "deadline_ms": 10_000}
    with tempfile.TemporaryDirectory() as folder, Journal(f"{folder}/http") as one, Journal(f"{folder}/grpc") as other:
        async with (
            AsyncClient(server.http_url, observer=one, **pinned) as http,
            AsyncClient(f"grpc://{server.grpc_url}", observer=other, **pinned) as grpc,
        ):
            calls = {
                "tickserve http": ours(http, model),
                "tickserve grpc": ours(grpc, model),
                BASE: documented(base, model),
            }
            rates = await rates_of(calls, at_once, seconds)
    await base.close()
    return [
        {"client": name, "at_once": at_once, "per_s": value, "ratio": value / rates[BASE]}
        for name, value in rates.items()
    ]


async def rates_of(calls: dict[str, AsyncCall], at_once: int, seconds: float) -> dict[str, float]:
    """Calls per second of each, over turns of `seconds` together."""
    found = dict.fromkeys(calls, (0, 0.0))
    for turn in range(TURNS):
        for name in list(calls)[turn:] + list(calls)[:turn]:
            await rate(calls[name], at_once, SETTLE_S)
            count, taken = await rate(calls[name], at_once, seconds / TURNS)
            found[name] = (found[name][0] + count, found[name][1] + taken)
            await asyncio.sleep(SETTLE_S)
    return {name: count / taken for name, (count, taken) in found.items()}


def main(arguments: list[str]) -> int:
    parser = options(__doc__)
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=3, help="for each contestant and number")
    chosen = parser.parse_args(arguments)
    model = subject(chosen.repository, chosen.model)
    rows = []
    with served(chosen.repository, [model.manifest.name]) as server:
        for at_once in chosen.at_once:
            rows += asyncio.run(compare(server, model, at_once, chosen.seconds))
    about = machine("tritonclient", "grpcio")
    if chosen.json:
        print(json.dumps({"machine": about, "model": model.manifest.name, "rows": rows}))
        return 0
    print(f"{about}\nmodel {model.manifest.name}, one row a call; ratios to {BASE}\n")
    print(f"{'at once':>8}  {'client':<24}{'calls/s':>10}{'ratio':>8}")
    for row in rows:
        print(f"{row['at_once']:>8}  {row['client']:<24}{row['per_s']:>10.0f}{row['ratio']:>7.2f}x")
    return 0


if __name__ == "__main__":
    as_command(main)

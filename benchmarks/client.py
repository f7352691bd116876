"""One lone call at a time: tickserve's client (HTTP, gRPC) beside tritonclient.grpc used as documented, on one server.

    python -m benchmarks.client --repository model_repository

The contestants take turns in short blocks within one run, so that a slow spell of the machine meets all of them. What
is timed is the whole call as an engine sees it, from the array to checked numbers. "bare socket" sends the same bytes
and parses nothing: the floor that any client over HTTP stands on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tickserve.client import Client, InferRequest, Tensor, newest_versions
from tickserve.client._http import encode
from tickserve.config import ServeSettings
from tickserve.errors import TickserveError
from tickserve.manifest import GOLDEN_NAME, Manifest, load_manifest

Call = Callable[[], object]
BASE = "tritonclient.grpc"
BARS = {"tickserve http": 0.40, "tickserve grpc": 0.85}  # the design's bars, as ratios of the p50 of BASE


def example_row(folder: Path, manifest: Manifest) -> npt.NDArray[np.float32]:
    """The first golden input of a version, or zeros where it has none: float32 [1, ...]."""
    spec = manifest.inputs[0]
    golden = folder / GOLDEN_NAME
    if not golden.is_file():
        return np.zeros((1, *spec.shape), np.float32)
    with np.load(golden, allow_pickle=False) as arrays:
        return np.ascontiguousarray(arrays[spec.name][:1], np.float32)


def ours(stack: ExitStack, url: str, manifest: Manifest, row: npt.NDArray[np.float32]) -> Call:
    client = stack.enter_context(Client(url, manifest=manifest, deadline_ms=5_000))
    return lambda: client.score(manifest.name, row).score


def documented_grpc(stack: ExitStack, url: str, manifest: Manifest, row: npt.NDArray[np.float32]) -> Call:
    import tritonclient.grpc as triton

    client = triton.InferenceServerClient(url)
    stack.callback(client.close)
    spec = manifest.inputs[0]

    def call() -> object:
        tensor = triton.InferInput(spec.name, list(row.shape), spec.dtype)
        tensor.set_data_from_numpy(row)
        outputs = [triton.InferRequestedOutput(output.name) for output in manifest.outputs]
        answer = client.infer(manifest.name, [tensor], outputs=outputs)
        return [answer.as_numpy(output.name) for output in manifest.outputs]

    return call


def bare_socket(stack: ExitStack, url: str, manifest: Manifest, row: npt.NDArray[np.float32]) -> Call:
    host, _, port = url.rpartition(":")
    tensor = Tensor(manifest.inputs[0].name, "FP32", row.shape, row.tobytes())
    request = b"".join(encode(InferRequest(manifest.name, None, "0" * 16, 5_000_000, (tensor,)), url))
    sock = stack.enter_context(socket.create_connection((host, int(port))))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call() -> object:
        sock.sendall(request)
        return sock.recv(65_536)

    return call


def measure(calls: dict[str, Call], rounds: int, block: int) -> dict[str, npt.NDArray[np.float64]]:
    """Microseconds of every call, by contestant; blocks are interleaved and their order rotates."""
    names = list(calls)
    times: dict[str, list[int]] = {name: [] for name in names}
    for name in names:
        for _ in range(50):
            calls[name]()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            call, taken = calls[name], times[name]
            call()  # the first of a block finds cold caches
            for _ in range(block):
                start = time.perf_counter_ns()
                call()
                taken.append(time.perf_counter_ns() - start)
    return {name: np.array(taken) / 1e3 for name, taken in times.items()}


def machine() -> str:
    """The machine and the versions behind the numbers."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("tickserve", "tritonclient", "grpcio", "numpy"))
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}"


def table(times: dict[str, npt.NDArray[np.float64]]) -> list[dict[str, Any]]:
    base = float(np.percentile(times[BASE], 50))
    rows = []
    for name, taken in times.items():
        p50, p99 = (float(np.percentile(taken, q)) for q in (50, 99))
        rows.append({"client": name, "calls": len(taken), "p50_us": p50, "p99_us": p99, "p50_ratio": p50 / base})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'client':<22}{'calls':>8}{'p50 us':>10}{'p99 us':>10}{'p50 ratio':>11}   bar")
    for row in rows:
        bar = BARS.get(row["client"])
        print(
            f"{row['client']:<22}{row['calls']:>8}{row['p50_us']:>10.1f}{row['p99_us']:>10.1f}{row['p50_ratio']:>10.2f}x"
            + (f"   <= {bar:.2f}x" if bar else "")
        )


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="published models")
    parser.add_argument("--model", help="default: the first model of the repository")
    parser.add_argument("--http-url", help="a server that runs already, host:port (with --grpc-url)")
    parser.add_argument("--grpc-url")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--block", type=int, default=100, help="calls a turn")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    chosen = options(arguments)
    folders = newest_versions(chosen.repository)
    model = chosen.model or next(iter(folders))
    manifest = load_manifest(folders[model])
    row = example_row(folders[model], manifest)
    with ExitStack() as stack:
        http_url, grpc_url = chosen.http_url, chosen.grpc_url
        if http_url is None or grpc_url is None:
            from serving.embedded import EmbeddedTriton

            ports = ServeSettings(http_port=0, grpc_port=0, metrics_port=0)
            server = stack.enter_context(EmbeddedTriton(chosen.repository, ports, models=[model]))
            http_url, grpc_url = server.http_url, server.grpc_url
        calls = {
            "bare socket": bare_socket(stack, http_url, manifest, row),
            "tickserve http": ours(stack, http_url, manifest, row),
            "tickserve grpc": ours(stack, f"grpc://{grpc_url}", manifest, row),
            BASE: documented_grpc(stack, grpc_url, manifest, row),
        }
        rows = table(measure(calls, chosen.rounds, chosen.block))
    if chosen.json:
        print(json.dumps({"machine": machine(), "model": model, "shape": list(row.shape), "rows": rows}))
        return 0
    print(f"{machine()}\nmodel {model}, input {list(row.shape)}, concurrency 1\n")
    show(rows)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TickserveError as error:
        sys.exit(f"error: {error} (publish a model first: make demo)")

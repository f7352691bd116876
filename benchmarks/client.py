"""One lone call at a time: tickserve's client (HTTP, gRPC) beside tritonclient.grpc used as documented, on one server.

    python -m benchmarks.client --repository model_repository

The contestants take turns within one run, over sockets to one server in another process; a turn is long enough to pay
for what the journal puts off. What is timed is the whole call as an engine sees it, from the array to checked
numbers, with every check and the journal on. "bare socket" sends the same bytes, sleeps until something comes, and
parses nothing.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    Call,
    Feed,
    Times,
    as_command,
    as_inputs,
    joined,
    machine,
    one_row,
    options,
    quantiles,
    served,
    subject,
    sustained,
)
from tickserve.client import Client, InferRequest, Tensor
from tickserve.client._http import encode
from tickserve.journal import Journal
from tickserve.manifest import Manifest

BASE = "tritonclient.grpc"
BARS = {"tickserve http": 0.40, "tickserve grpc": 0.85}  # the design's bars, as ratios of the p50 of BASE


def ours(stack: ExitStack, url: str, manifest: Manifest, feed: Feed, journal: Path | None) -> Call:
    observer = None if journal is None else Journal(journal)
    if observer is not None:
        stack.callback(observer.close)
    client = stack.enter_context(Client(url, manifest=manifest, deadline_ms=5_000, observer=observer))
    inputs = as_inputs(feed)
    return lambda: client.score(manifest.name, inputs).score


def documented_grpc(stack: ExitStack, url: str, manifest: Manifest, feed: Feed) -> Call:
    import tritonclient.grpc as triton

    client = triton.InferenceServerClient(url)
    stack.callback(client.close)

    def call() -> object:
        tensors = []
        for spec in manifest.inputs:
            array = feed[spec.name]
            tensor = triton.InferInput(spec.name, list(array.shape), spec.dtype)
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        outputs = [triton.InferRequestedOutput(output.name) for output in manifest.outputs]
        answer = client.infer(manifest.name, tensors, outputs=outputs)
        return [answer.as_numpy(output.name) for output in manifest.outputs]

    return call


def bare_socket(stack: ExitStack, url: str, manifest: Manifest, feed: Feed) -> Call:
    host, _, port = url.rpartition(":")
    tensors = tuple(Tensor(name, "FP32", array.shape, array.tobytes()) for name, array in feed.items())
    request = b"".join(encode(InferRequest(manifest.name, None, "0" * 16, 5_000_000, tensors), url))
    sock = stack.enter_context(socket.create_connection((host, int(port))))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call() -> object:
        sock.sendall(request)
        return sock.recv(65_536)

    return call


def table(times: dict[str, Times]) -> list[dict[str, Any]]:
    """A row for each contestant: its quantiles, and its p50 and p99 as ratios of the base's."""
    base = quantiles(times[BASE])
    rows = []
    for name, taken in times.items():
        found = quantiles(taken)
        ratios = {f"{key}_ratio": found[f"{key}_us"] / base[f"{key}_us"] for key in ("p50", "p99")}
        rows.append({"client": name, "calls": len(taken), **found, **ratios})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as text, with the bars."""
    columns = "".join(f"{name:>10}" for name in ("p50 us", "p90 us", "p99 us", "p99.9 us"))
    print(f"{'client':<24}{'calls':>8}{columns}{'p50':>8}{'p99':>8}   bar")
    for row in rows:
        bar = BARS.get(row["client"])
        times = "".join(f"{row[f'{name}_us']:>10.1f}" for name in ("p50", "p90", "p99", "p99.9"))
        print(
            f"{row['client']:<24}{row['calls']:>8}{times}{row['p50_ratio']:>7.2f}x{row['p99_ratio']:>7.2f}x"
            + (f"   p50 <= {bar:.2f}x, p99 <= 1x" if bar else "")
        )


def contestants(stack: ExitStack, urls: tuple[str, str], manifest: Manifest, feed: Feed) -> dict[str, Call]:
    http, grpc = urls
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return {
        "bare socket": bare_socket(stack, http, manifest, feed),
        "tickserve http": ours(stack, http, manifest, feed, folder / "http"),
        "tickserve grpc": ours(stack, f"grpc://{grpc}", manifest, feed, folder / "grpc"),
        "http, no journal": ours(stack, http, manifest, feed, None),
        BASE: documented_grpc(stack, grpc, manifest, feed),
    }


def chosen_options(arguments: list[str]) -> argparse.Namespace:
    parser = options(__doc__, rounds=10, turn_s=0.5)
    parser.add_argument("--http-url", help="a server that runs already, host:port (with --grpc-url)")
    parser.add_argument("--grpc-url")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    chosen = chosen_options(arguments)
    chosen_model = subject(chosen.repository, chosen.model)
    manifest = chosen_model.manifest
    feed = one_row(chosen_model.folder, manifest)
    shapes = {name: list(array.shape) for name, array in feed.items()}
    with ExitStack() as stack:
        urls = chosen.http_url, chosen.grpc_url
        if None in urls:
            server = stack.enter_context(served(chosen.repository, [manifest.name]))
            urls = server.http_url, server.grpc_url
        rows = table(joined(sustained(contestants(stack, urls, manifest, feed), chosen.rounds, chosen.turn)))
    about = machine("tritonclient", "grpcio")
    if chosen.json:
        print(json.dumps({"machine": about, "model": manifest.name, "shapes": shapes, "rows": rows}))
        return 0
    print(f"{about}\nmodel {manifest.name}, input {shapes}, concurrency 1; ratios to {BASE}\n")
    show(rows)
    return 0


if __name__ == "__main__":
    as_command(main)

"""Swaps of one model between two versions under a paced load: what the callers saw at rest and during the swaps.

    python -m benchmarks.swap --repository model_repository --swaps 200 --rate 500

Two processes send on a schedule fixed beforehand, one over HTTP and one over gRPC; a call's time counts from when it
was due, so a stall is not hidden by the caller waiting for it. Their clients follow `current.json`. The swaps are made
from this process by the very function behind `tickserve models swap`, with its defaults. Every answer has to carry the
id of the bundle behind the version that was asked for. Exit code 1 when one call failed, one answer was another
version's, or memory, descriptors or processes did not come back.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from benchmarks.harness import machine, served, subject
from export.onnx_graph import DIGEST_KEY
from export.publish import Release, Terms, publish
from serving import stubs
from serving.swap import swap
from tickserve.client import Client
from tickserve.config import ExportSettings, SwapSettings
from tickserve.errors import TickserveError
from tickserve.manifest import GOLDEN_NAME, load_manifest
from tickserve.model_config import MODEL_FILE
from tickserve.store import sha256_bytes

THREADS = 4
DEADLINE_MS = 5_000
GROWTH = 1.15  # resident size after all swaps over that before; an allocator keeps a little
DESCRIPTORS = 16
SLACK_S = 0.05


@dataclass(frozen=True)
class Drive:
    """What one process sends: `rate` single rows a second until it is told to stop."""

    url: str
    repository: str
    model: str
    ids: dict[int, int]
    rate: float


def two_versions(source: Path, target: Path) -> dict[int, int]:
    """Publish the version in `source`, and one that differs in its id alone, into `target`; the ids by version."""
    manifest = load_manifest(source)
    settings = ExportSettings(max_batch=manifest.export.max_batch if manifest.export else 1, preferred_batch_rows=(1,))
    ids = {}
    for seed in (1, 2):
        bundle = manifest.model_copy(
            update={"export": None, "provenance": manifest.provenance.model_copy(update={"seed": seed})}
        )
        graph = relabelled(source / MODEL_FILE, bundle.bundle_id(), bundle.digest())
        golden = (source / GOLDEN_NAME).read_bytes()
        assert manifest.export is not None
        record = manifest.export.model_copy(
            update={
                "bundle_digest": bundle.digest(),
                "bundle_id": bundle.bundle_id(),
                "onnx_sha256": sha256_bytes(graph),
                "golden_sha256": sha256_bytes(golden),
            }
        )
        release = Release(bundle.model_copy(update={"export": record}), graph, golden)
        version, _ = publish(release, target, settings, Terms(activate=seed == 1))
        ids[version] = bundle.bundle_id()
    return ids


def relabelled(path: Path, bundle_id: int, digest: str) -> bytes:
    """The served graph with another bundle's id."""
    model = onnx.load_model_from_string(path.read_bytes())
    for tensor in model.graph.initializer:
        if tensor.name == "tickserve.bundle_id":
            tensor.CopyFrom(numpy_helper.from_array(np.array([[bundle_id]], np.int64), tensor.name))
    for note in model.metadata_props:
        if note.key == DIGEST_KEY:
            note.value = digest
    return bytes(model.SerializeToString())


def drive(plan: Drive, rows: npt.NDArray[np.float32], stop: Any, results: Any) -> None:
    """Send until `stop`; put (due ns, taken ms, failed, wrong) for every call, as arrays."""
    calls: list[tuple[int, float, bool, bool]] = []
    client = Client(plan.url, manifest=plan.repository, follow_ms=50, deadline_ms=DEADLINE_MS)
    began = time.monotonic_ns() + 100_000_000
    step = int(1e9 / plan.rate)

    def work(number: int) -> None:
        turn = number
        while not stop.is_set():
            due = began + turn * step
            time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
            failed = wrong = False
            try:
                signal = client.score(plan.model, rows[turn % len(rows)][None])
                wrong = plan.ids[signal.version or 0] != signal.bundle_id
            except TickserveError as error:
                failed = True
                print(f"failed: {error!r}", file=sys.stderr)
            calls.append((due, (time.monotonic_ns() - due) / 1e6, failed, wrong))
            turn += THREADS

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()
    results.put(np.array(calls, np.float64))


def within(due: npt.NDArray[np.float64], spans: list[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """Which of the calls were due while a swap was under way."""
    inside = np.zeros(len(due), bool)
    for begin, end in spans:
        inside |= (due >= begin) & (due < end)
    return inside


def by_step(
    due: npt.NDArray[np.float64], spans: list[tuple[int, int]], steps: list[dict[str, float]]
) -> dict[str, Any]:
    """The calls that were due in each step of the swaps, in the steps' order."""
    ends: dict[str, list[tuple[int, int]]] = {step: [] for step in steps[0]}
    for (begin, _), taken in zip(spans, steps, strict=True):
        for step, spent in taken.items():
            ends[step].append((begin, begin := begin + int(spent * 1e6)))
    return {step: within(due, windows) for step, windows in ends.items()}


def quantiles(taken: npt.NDArray[np.float64]) -> dict[str, float]:
    named = {f"p{q:g}_ms": float(np.percentile(taken, q)) for q in (50, 99, 99.9)} if len(taken) else {}
    return {"calls": len(taken)} | {name: round(value, 3) for name, value in named.items()}


def resources(pid: int) -> dict[str, float]:
    children = list(stubs.stubs_of(pid))
    return {
        "resident_mb": round(stubs.resident_bytes([pid, *children]) / 2**20, 1),
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "processes": len(children),
    }


def run(repository: Path, model: str | None, swaps: int, rate: float, rest_s: float) -> dict[str, Any]:
    chosen = subject(repository, model)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "models"
        ids = two_versions(chosen.folder, target)
        name = chosen.manifest.name
        with served(target) as server:
            stop, results = context.Event(), context.Queue()
            swap(server.target, name, 1, settings=SwapSettings())
            drivers = [
                context.Process(
                    target=drive, args=(Drive(url, str(target), name, ids, rate / 2), chosen.rows, stop, results)
                )
                for url in (server.http_url, f"grpc://{server.grpc_url}")
            ]
            for driver in drivers:
                driver.start()
            time.sleep(3)  # their imports
            since = time.monotonic_ns()
            time.sleep(rest_s)
            before, half_way, spans, steps, undrained = resources(server.pid), {}, [], [], 0
            for number in range(swaps):
                began = time.monotonic_ns()
                done = swap(server.target, name, 2 - number % 2, settings=SwapSettings())
                spans.append((began, time.monotonic_ns()))
                steps.append(done.steps_ms)
                undrained += not done.drained
                time.sleep(SLACK_S)
                if 2 * number < swaps <= 2 * (number + 1):
                    half_way = resources(server.pid)
            time.sleep(1)
            after, until = resources(server.pid), time.monotonic_ns()
            time.sleep(rest_s)
            stop.set()
            calls = {kind: results.get(timeout=60) for kind in ("a", "b")}
            for driver in drivers:
                driver.join()
    every = np.concatenate(list(calls.values()))
    every = every[every[:, 0] >= since]
    inside = within(every[:, 0], spans)
    rest = (every[:, 0] < spans[0][0]) | (every[:, 0] >= until)
    return {
        "model": name,
        "swaps": swaps,
        "undrained": undrained,
        "rate_hz": rate,
        "failed": int(every[:, 2].sum()),
        "wrong_version": int(every[:, 3].sum()),
        "at_rest": quantiles(every[rest, 1]),
        "during_swaps": quantiles(every[inside, 1]),
        "p99_ms_by_step": {
            step: quantiles(every[chosen, 1]).get("p99_ms")
            for step, chosen in by_step(every[:, 0], spans, steps).items()
        },
        "before": before,
        "half_way": half_way,
        "after": after,
        "step_ms": {step: round(float(np.median([taken[step] for taken in steps])), 1) for step in steps[0]},
        "machine": machine("onnxruntime"),
    }


def ok(result: dict[str, Any]) -> bool:
    before, after = result["before"], result["after"]
    back = after["resident_mb"] <= GROWTH * before["resident_mb"] and after["processes"] == before["processes"]
    return (
        back
        and after["descriptors"] <= before["descriptors"] + DESCRIPTORS
        and not result["failed"] + result["wrong_version"] + result["undrained"]
    )


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['swaps']} swaps of {result['model']} under {result['rate_hz']:g} requests/s, half of them over gRPC"
    )
    print(f"  failed {result['failed']}, of another version than asked {result['wrong_version']}")
    for name in ("at_rest", "during_swaps"):
        row = "  ".join(f"{key} {value:g}" for key, value in result[name].items())
        print(f"  {name.replace('_', ' '):14s} {row}")
    for name in ("before", "half_way", "after"):
        print(f"  {name.replace('_', ' '):14s} " + "  ".join(f"{key} {value:g}" for key, value in result[name].items()))
    print("  p99 by step    " + "  ".join(f"{key} {value} ms" for key, value in result["p99_ms_by_step"].items()))
    print("  median step    " + "  ".join(f"{key} {value:g} ms" for key, value in result["step_ms"].items()))
    print(f"  {result['machine']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--model")
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--rest-s", type=float, default=10.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = run(options.repository, options.model, options.swaps, options.rate, options.rest_s)
    print(json.dumps(result, indent=2)) if options.json else show(result)
    return 0 if ok(result) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Whether the simulation of `tickserve batching derive` orders settings as the server does.

    python -m benchmarks.batching_ranking

The model is a slow one, made for this (`benchmarks/nil_model.py` with matrix products). Poisson arrivals take
`--utilisation` of one instance, a load at which settings differ. Each setting is predicted from one measurement of the
model, then served and driven open-loop with the same arrivals. Kendall's tau compares the two orders of the settings: 1
is the same order, 0 none, -1 the reverse. Delays are in multiples of a lone execution.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import told_apart
from benchmarks.nil_model import publish
from export.batching import Arrivals, ServiceTimes, Setting, apply_to_config
from export.batching.arrivals import of_times
from export.batching.simulate import simulate
from loadtest.open_loop import Feed, OpenLoop, drive
from loadtest.service_times import Inputs, measure_service
from serving.embedded import EmbeddedTriton
from tickserve.client import Client
from tickserve.config import ServeSettings
from tickserve.manifest import Manifest, load_manifest
from tickserve.model_config import CONFIG_NAME
from tickserve.pipeline import golden_inputs

FREE = ServeSettings(http_port=0, grpc_port=0, metrics_port=0)
DEADLINE_MS = 5_000.0
SIZE = "4 B"
QUEUE = 64
# Instances, delay in lone executions, preferred rows, whether the queue is bounded.
SETTINGS: tuple[tuple[int, float, tuple[int, ...], bool], ...] = (
    (1, 0, (), False),
    (1, 2, (2,), False),
    (1, 5, (4,), False),
    (1, 12, (8,), False),
    (1, 25, (8,), False),
    (2, 0, (), False),
    (2, 12, (8,), False),
    (3, 0, (), True),
)


def setting_of(row: tuple[int, float, tuple[int, ...], bool], lone_us: float, max_batch: int) -> Setting:
    """One of `SETTINGS` for a model whose lone execution takes `lone_us`."""
    instances, delay, preferred, bounded = row
    queue, timeout = (QUEUE, int(DEADLINE_MS * 1e3)) if bounded else (0, 0)
    return Setting(max_batch, int(delay * lone_us), preferred, instances, queue, timeout, lanes=False)


def tau(first: list[float], second: list[float]) -> float:
    """Kendall's tau of two lists; ties count for neither side."""
    signs = [
        np.sign(first[i] - first[j]) * np.sign(second[i] - second[j]) for i, j in combinations(range(len(first)), 2)
    ]
    return float(np.mean(signs))


def measured(repository: Path, manifest: Manifest, inputs: Inputs, setting: Setting, arrivals: Arrivals) -> OpenLoop:
    """What `arrivals` see of the model, served from a copy with `setting`."""
    name = manifest.name
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(repository / name, Path(folder) / "models" / name)
        apply_to_config(Path(folder) / "models" / name / CONFIG_NAME, setting)
        with EmbeddedTriton(Path(folder) / "models", FREE, models=[name]) as server:
            feed = Feed(server.http_url, name, inputs, DEADLINE_MS)
            drive(feed, of_times(np.arange(50) * 10_000_000))  # warm
            return drive(feed, arrivals)


def service_of(repository: Path, manifest: Manifest, inputs: Inputs, max_batch: int) -> ServiceTimes:
    """The model's service times, as `derive` measures them."""
    with (
        EmbeddedTriton(repository, FREE, models=[manifest.name]) as server,
        Client(server.http_url, manifest=manifest) as client,
    ):
        return measure_service(server.http_url, client, manifest.name, inputs, max_batch, 150)


def main() -> None:
    """Print predicted and measured by setting, and tau for p50 and p99."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=200, help="matrix products of the model")
    parser.add_argument("--utilisation", type=float, default=0.7)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with told_apart(options.json), tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), publish(Path(folder), SIZE, options.layers), options)
    if options.json:
        print(json.dumps(found))


def compare(repository: Path, version: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Predict, serve and print every setting; what was printed, as JSON values."""
    manifest = load_manifest(version)
    inputs = golden_inputs(version, manifest)[0]
    max_batch = manifest.export.max_batch if manifest.export else 1
    service = service_of(repository, manifest, inputs, max_batch)
    lone_us = service.mean_us(1)
    count = int(options.seconds * options.utilisation * 1e6 / lone_us)
    gaps_us = np.random.default_rng(7).exponential(lone_us / options.utilisation, count)
    arrivals = of_times((np.cumsum(gaps_us) * 1e3).astype(np.int64))
    cores = len(os.sched_getaffinity(0))
    print(f"lone execution {lone_us:.0f} us, path {service.overhead_us:.0f} us; {arrivals.per_second:.0f} requests/s")
    print("instances  delay_us  preferred  bounded   predicted p50   p99    measured p50   p99   driver late p99  (us)")
    table: list[list[float]] = []
    for row in SETTINGS:
        setting = setting_of(row, lone_us, max_batch)
        guess = simulate(arrivals, service, setting, cores=cores)
        seen = measured(repository, manifest, inputs, setting, arrivals).to_json()
        single = {quantile: seen["single"][quantile] or float("inf") for quantile in ("p50_us", "p99_us")}
        table.append([guess.quantile_us(0.5), guess.quantile_us(0.99), *single.values()])
        p50, p99, seen_p50, seen_p99 = table[-1]
        preferred = ",".join(map(str, setting.preferred)) or "none"
        print(
            f"{setting.instances:>9} {setting.delay_us:>9} {preferred:>10} {row[3]!s:>8} {p50:>15.0f} {p99:>6.0f}"
            f" {seen_p50:>14.0f} {seen_p99:>6.0f} {seen['driver_late_p99_us']:>16.0f}",
            flush=True,
        )
    columns = [list(column) for column in zip(*table, strict=True)]
    found = {"p50": tau(columns[0], columns[2]), "p99": tau(columns[1], columns[3])}
    print(f"Kendall's tau: p50 {found['p50']:.2f}, p99 {found['p99']:.2f}")
    names = ("predicted_p50_us", "predicted_p99_us", "p50_us", "p99_us")
    rows = [
        {"setting": str(setting), **dict(zip(names, map(float, row), strict=True))}
        for setting, row in zip(SETTINGS, table, strict=True)
    ]
    return {"lone_us": float(lone_us), "tau": found, "rows": rows}


if __name__ == "__main__":
    main()

"""What a bundle would cost to serve, before anything is published: the bytes of its graph, the time of a lone row.

Tuning and compression choose by these numbers, so they come from the graph that would be served, in the runtime that
would serve it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export import job, publish, runtime
from export.packed import feed
from export.research import load_research
from export.runtimes.survey import options_of
from tickserve.config import ExportSettings
from tickserve.manifest import GOLDEN_NAME, load_bundle


@dataclass(frozen=True)
class Cost:
    """Bytes of the served graph, and one call of one row in microseconds (`calls` timed)."""

    size_bytes: int
    p50_us: float
    p99_us: float
    calls: int


def measure_bundle(bundle: Path, settings: ExportSettings, calls: int = 1_000) -> Cost:
    """Convert `bundle` and time a lone recorded row in ONNX Runtime, set up as its config would ask for it.

    Raises ArtifactError and below for what is in the bundle; nothing is published.
    """
    manifest = load_bundle(bundle)
    graph = job.to_onnx(manifest, load_research(bundle, manifest)).SerializeToString(deterministic=True)
    row = publish.read_pairs(bundle / GOLDEN_NAME, manifest).rows[:1]
    chosen = options_of(None, settings)
    (taken,) = runtime.measure_latency(
        graph, feed(row, manifest), calls=calls, threads=chosen.threads, graph_level=chosen.graph_level
    )
    return Cost(len(graph), taken.p50_us, taken.p99_us, taken.calls)

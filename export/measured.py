"""What a bundle would cost to serve, before anything is published: the bytes of its graph, the time of a lone row.

Tuning and compression choose by these numbers, so they come from the graph that would be served, in the runtime that
would serve it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from export import job, publish, runtime
from export.packed import feed
from export.research import load_research
from export.runtimes.measure import Effort, interleaved, timing
from export.runtimes.survey import options_of
from tickserve.config import ExportSettings
from tickserve.manifest import GOLDEN_NAME, load_bundle

# Calls of a round when bundles are compared. Other programs only ever make a round slower, so the quietest one says
# most about the model; it has to be short, or on a busy machine there is none.
ROUND_CALLS = 200


@dataclass(frozen=True)
class Cost:
    """Bytes of the served graph, and one call of one row in microseconds (`calls` timed)."""

    size_bytes: int
    p50_us: float
    p99_us: float
    calls: int

    def quieter(self, other: Cost) -> Cost:
        """Of two measurements of the same bundle the lower times."""
        p50, p99 = min(self.p50_us, other.p50_us), min(self.p99_us, other.p99_us)
        return Cost(self.size_bytes, p50, p99, self.calls + other.calls)


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


def compare_bundles(bundles: Sequence[Path], settings: ExportSettings, calls: int = 4_000) -> list[Cost]:
    """As `measure_bundle` of each, timed in turns: a slow spell of the machine meets them all.

    About `calls` of each are timed, in rounds of ROUND_CALLS; p50 and p99 are each those of the round where it was
    lowest. Raises as `measure_bundle`.
    """
    opened = {str(place): _lone_row(bundle, settings) for place, bundle in enumerate(bundles)}
    asks = {name: ask for name, (ask, _) in opened.items()}
    each = min(calls, ROUND_CALLS)
    rounds = [interleaved(asks, Effort(0.0, each, each)) for _ in range(max(1, calls // each))]
    costs = []
    for name, (_, size) in opened.items():
        taken = [timing(1, times[name]) for times in rounds]
        p50, p99 = min(one.p50_us for one in taken), min(one.p99_us for one in taken)
        costs.append(Cost(size, p50, p99, sum(one.calls for one in taken)))
    return costs


def _lone_row(bundle: Path, settings: ExportSettings) -> tuple[Any, int]:
    """A call that scores one recorded row of a bundle, and the bytes of the served graph."""
    manifest = load_bundle(bundle)
    graph = _graph(bundle, manifest.digest())
    inputs = feed(publish.read_pairs(bundle / GOLDEN_NAME, manifest).rows[:1], manifest)
    chosen = options_of(None, settings)
    session = runtime.open_session(graph, threads=chosen.threads, graph_level=chosen.graph_level)
    return (lambda: session.run(None, inputs)), len(graph)


@lru_cache(maxsize=8)
def _graph(bundle: Path, digest: str) -> bytes:
    """The served graph of a verified bundle; a chain asks for those of teacher and parent again and again."""
    manifest = load_bundle(bundle)
    graph: bytes = job.to_onnx(manifest, load_research(bundle, manifest)).SerializeToString(deterministic=True)
    return graph

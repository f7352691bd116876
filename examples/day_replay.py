"""A day of ticks through stream, server, journal and replay: every number twice, and the same bits.

    python -m examples.day_replay --data 20131009_quote.zip 20131009_trade.zip

Trains a small model on the recording, publishes it, serves it, and then plays the same recording event by event as an
engine would: each answer goes into the journal, `tickserve replay` asks the server and the models in process for all of
them again. Ends with exit code 1 where a feature is not the training matrix's, a score not research's, or a replayed
answer not the recorded one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.research import load_research
from market.feature_store import FeatureTable
from serving.embedded import EmbeddedTriton
from tickserve import Client, pipeline
from tickserve.config import ServeSettings
from tickserve.errors import TickserveError
from tickserve.journal import Journal
from tickserve.manifest import load_bundle
from tickserve.settings import load_settings
from tickserve.stream import Stream

ANY_PORTS = ServeSettings(http_port=0, grpc_port=0, metrics_port=0)


@dataclass
class Online:
    """What the stream met and gave: times [N] and features [N, F] of the rows asked, probabilities [N, 3]."""

    events: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    ts_ns: list[int] = field(default_factory=list)
    features: list[npt.NDArray[np.float32]] = field(default_factory=list)
    said: list[npt.NDArray[np.float32]] = field(default_factory=list)


def play(source: Any, model: str, url: str, repository: Path, journal: Path) -> Online:
    """The recording, one event at a time, to the served model; every call in the journal."""
    online = Online()
    with Journal(journal, label="day_replay") as written, Client(url, manifest=repository, observer=written) as client:
        stream = Stream(client, model, deadline_ms=5_000)
        for chunk in source.chunks(65_536):
            for ts_ns, row in zip(chunk.ts_ns.tolist(), chunk.values, strict=True):
                online.events += 1
                step = stream.feed(ts_ns, row)
                if step.signal is not None and step.features is not None:
                    online.statuses[step.signal.status] += 1
                    online.ts_ns.append(ts_ns)
                    online.features.append(step.features)
                    online.said.append(np.full(3, np.nan) if not step.signal.ok else step.signal.probabilities[0])  # type: ignore[index]
        if not written.flush() or written.stats.lost:
            raise TickserveError(f"the journal lost {written.stats.lost} records")
    return online


def compare(online: Online, table: FeatureTable, bundle: Path) -> dict[str, Any]:
    """Online features against the training matrix, bit for bit; served numbers against research's."""
    manifest = load_bundle(bundle)
    matrix = np.where(np.isinf(table.features), np.float32(np.nan), table.features)
    expected = load_research(bundle, manifest).predict(matrix)
    said = np.array(online.said, np.float32)
    same_rows = online.ts_ns == table.ts_ns.tolist()
    within = same_rows and np.allclose(said, expected, rtol=manifest.tolerance.rtol, atol=manifest.tolerance.atol)
    return {
        "matrix_rows": len(table),
        "features_identical": same_rows and np.array(online.features).tobytes() == matrix.tobytes(),
        "scores_are_researchs": bool(within),
        "largest_score_difference": float(np.abs(said - expected).max()) if same_rows else None,
    }


def replayed(journal: Path, *where: str) -> dict[str, Any]:
    """`tickserve replay`, as anyone would run it."""
    command = [sys.executable, "-m", "tickserve.cli", "replay", str(journal), *where, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise TickserveError(f"replay ended with {done.returncode}: {done.stderr[-500:]}")
    told: dict[str, Any] = json.loads(done.stdout)
    return {name: told[name] for name in ("replayed", "identical", "different", "skipped")}


def run(data: list[Path], rows: int, folder: Path, say: Any) -> dict[str, Any]:
    """All of it in `folder`; what came of it as plain values."""
    small = {
        "lstm.enabled": False,
        "gbdt.rounds": 20,
        "features.max_rows": rows,
        "features.store": str(folder / "features"),
    }
    config = load_settings(environ={}, overrides=small).config
    source = pipeline.open_source(data, config)
    built = pipeline.build_features(source, config)
    (bundle,) = pipeline.train(built, config, folder / "bundles")
    repository, journal = folder / "model_repository", folder / "journal"
    pipeline.export(bundle.path, repository, config)
    model = load_bundle(bundle.path).name
    say(f"trained and published {model}")
    with EmbeddedTriton(repository, ANY_PORTS) as server:
        started = time.perf_counter()
        online = play(source, model, server.http_url, repository, journal)
        say(f"played {online.events:,} events in {time.perf_counter() - started:.1f} s: {dict(online.statuses)}")
        by_server = replayed(journal, "--url", server.http_url)
    say("replayed against the server")
    hours = (source.quality.last_ts_ns - source.quality.first_ts_ns) / 3.6e12
    return {
        "model": model,
        "events": online.events,
        "hours": hours,
        "signals": dict(online.statuses),
        "stride": built.load().stride,
        **compare(online, built.load(), bundle.path),
        "replay_server": by_server,
        "replay_local": replayed(journal, "--url", f"local://{repository}"),
    }


def holds(result: dict[str, Any]) -> bool:
    """Whether everything was what it had to be."""
    count = result["matrix_rows"]
    replays = [result["replay_server"], result["replay_local"]]
    return (
        result["features_identical"]
        and result["scores_are_researchs"]
        and result["signals"] == {"OK": count}
        and all(each["identical"] == each["replayed"] == count and not each["skipped"] for each in replays)
    )


def main(arguments: Sequence[str]) -> int:
    """Read the options, run, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, nargs="+", help="the recording of one day")
    parser.add_argument("--rows", type=int, default=20_000, help="at most so many rows are trained on and asked for")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = run(chosen.data, chosen.rows, Path(folder), lambda text: print(text, file=sys.stderr))
    if chosen.json:
        print(json.dumps(result))
    else:
        told = result | {name: json.dumps(result[name]) for name in ("signals", "replay_server", "replay_local")}
        print("\n".join(f"{name}: {value}" for name, value in told.items()))
    return 0 if holds(result) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TickserveError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

"""Preparing ahead: the same symbols with the features of the next one prepared meanwhile, and one after another.

    python -m benchmarks.universe --data FOLDER [--passes 2] [--pooled]

Contestants take turns, each with a feature cache of its own that starts empty, and both train the same models with one
thread. What can be saved is at most the preparation itself: the table shows it beside what was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import told_apart
from tickserve.settings import load_settings
from training.universe import train_universe

AHEAD = {"one after another": 0, "prepared ahead": 1}


def measured(data: list[Path], ahead: int, pooled: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        changes: dict[str, Any] = {
            "gbdt.threads": 1,
            "lstm.enabled": False,
            "features.store": f"{scratch}/features",
            "universe.folder": f"{scratch}/runs",
            "universe.ahead": ahead,
            "universe.pooled": pooled,
        }
        config = load_settings(environ={}, overrides=changes).config
        result = train_universe(data, config, lambda _: None, run="benchmark", resume=False)
    trained = [record for record in result["symbols"] if record["status"] == "trained"]
    return {
        "symbols": len(trained),
        "seconds": result["symbols_seconds"],
        "features_s": round(sum(record["features"]["seconds"] for record in trained), 1),
        "training_s": round(sum(record["seconds"] for record in trained), 1),
        "peak_memory_mb": result["peak_memory_mb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--pooled", action="store_true", help="also the pooled model, for its memory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with told_apart(options.json):
        found = passes(options)
    if options.json:
        print(json.dumps({"passes": found}))


def passes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both contestants in every pass, in turn."""
    told: list[dict[str, Any]] = []
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; feature caches start empty")
    for number in range(1, options.passes + 1):
        order = list(AHEAD.items())[:: 1 if number % 2 else -1]
        found = {name: measured(options.data, ahead, options.pooled) for name, ahead in order}
        for name in AHEAD:
            print(f"pass {number}  {name:18} {json.dumps(found[name])}")
        alone, ahead = (found[name]["seconds"] for name in AHEAD)
        print(f"pass {number}  prepared ahead takes {ahead / alone:.2f} of the time", flush=True)
        told.append({name.replace(" ", "_"): each for name, each in found.items()})
    return told


if __name__ == "__main__":
    main()

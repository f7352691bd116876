"""How large a population stability index is when nothing is wrong: a market against itself, later and by lot.

    python -m benchmarks.psi --first DAY1_quote.zip DAY1_trade.zip --second DAY2_quote.zip DAY2_trade.zip [--json]

Features of each day are built as training builds them. The second half of the first day is held against its first
half, the second day against the first, and halves of the first day that are drawn by lot against each other: what is
left of the index when there is no drift at all.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import machine
from monitoring.drift.psi import psi
from tickserve import pipeline
from tickserve.reference import reference_of
from tickserve.settings import load_settings

Rows = npt.NDArray[np.float32]
MOST_ROWS = 8_000
SHOWN = 5


def day(paths: list[Path], store: Path) -> tuple[tuple[str, ...], Rows]:
    """Columns and rows [N, F] of a day, as training takes them."""
    overrides: dict[str, Any] = {"features.store": str(store), "features.max_rows": MOST_ROWS}
    config = load_settings(environ={}, overrides=overrides).config
    built = pipeline.build_features(pipeline.open_source(paths, config), config)
    rows = built.load().features
    return built.spec.columns, np.where(np.isinf(rows), np.float32(np.nan), rows).astype(np.float32)


def indices(columns: tuple[str, ...], training: Rows, served: Rows) -> dict[str, float]:
    """The index of each column, largest first."""
    reference = reference_of(training)
    found = {
        name: psi(column, column.counts_of(values), reference.rows)
        for name, column, values in zip(columns, reference.columns, served.T, strict=True)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def compared(first: list[Path], second: list[Path]) -> dict[str, dict[str, float]]:
    """Every comparison by its name."""
    with tempfile.TemporaryDirectory() as store:
        columns, one = day(first, Path(store))
        others, two = day(second, Path(store))
    if columns != others:
        raise SystemExit("the two days have other features: expected the same kind of data")
    half, drawn = len(one) // 2, np.random.default_rng(7).permutation(len(one))
    return {
        "its second half against its first": indices(columns, one[:half], one[half:]),
        "the second day against the first": indices(columns, one, two),
        "halves drawn by lot": indices(columns, one[drawn[:half]], one[drawn[half:]]),
    }


def show(name: str, found: dict[str, float]) -> None:
    """The largest of a comparison, and its median."""
    largest = ", ".join(f"{column} {value:.2f}" for column, value in list(found.items())[:SHOWN])
    print(f"{name}: median {np.median(list(found.values())):.3f}, of {len(found)} features; largest: {largest}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", nargs="+", type=Path, required=True)
    parser.add_argument("--second", nargs="+", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found = compared(asked.first, asked.second)
    if asked.json:
        print(json.dumps({"machine": machine(), "psi": found}, indent=2))
        return 0
    print(machine())
    for name, each in found.items():
        show(name, each)
    return 0


if __name__ == "__main__":
    sys.exit(main())

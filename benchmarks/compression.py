"""Compression: two teachers made small and fast by recipes, and recipes that have to be refused.

    python -m benchmarks.compression --data BTCUSD_1m.parquet [--teacher lstm] [--rows 60000]

Trains a teacher on a moderate budget, walk-forward in two folds, then runs every recipe below on it: an LSTM in the
production shape (window 50, hidden 104, 2 layers), and a wide net of dense layers (1,024, 3 layers), which is the
better forecaster. Each line of the table is a step, measured beside its parent in the same run; `-` under flips is the
teacher. Exits 1 when a recipe that has to be accepted was refused, or the other way round.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from tickserve.config import Config
from tickserve.settings import load_settings
from training.compress.chain import run_recipe, teacher_of
from training.compress.recipe import Recipe, find_recipe
from training.compress.teacher import Data
from training.examples import prepare
from training.train import meta_of, train_table

SETTINGS: dict[str, Any] = {"validation.folds": 2, "compress.fp16": False, "compress.int8": False}
TEACHERS: dict[str, dict[str, Any]] = {
    "mlp": {
        "mlp.hidden": 1_024,
        "mlp.layers": 3,
        "mlp.activation": "relu",
        "mlp.epochs": 3,
        "mlp.learning_rate": 0.001,
        "mlp.max_train_windows": 60_000,
    },
    "lstm": {
        "lstm.window": 50,
        "lstm.hidden": 104,
        "lstm.layers": 2,
        "lstm.epochs": 3,
        "lstm.max_train_windows": 10_000,
        "lstm.stepped": False,
    },
}
MAX_ROWS = 60_000


def dense(hidden: int, layers: int) -> dict[str, Any]:
    """A student of dense layers."""
    sizes = {"hidden": hidden, "layers": layers, "activation": "relu"}
    return {"kind": "distill", "family": "mlp", "settings": sizes, "epochs": 6, "teacher_weight": 0.5}


# By teacher and name: the steps (None: the shipped recipe), and whether the last one has to be accepted.
Lines = dict[str, tuple[list[dict[str, Any]] | None, bool]]
RECIPES: dict[str, Lines] = {
    "mlp": {"int8": (None, True)},
    "lstm": {
        "fast": (None, True),
        "torn": ([dense(64, 2), {"kind": "prune", "share": 0.95, "epochs": 0}], False),
        "tiny": ([dense(32, 2), {"kind": "quantize", "method": "static"}], False),
        "tiny-qat": ([dense(32, 2), {"kind": "quantize", "method": "qat"}], False),
    },
}


def prepared(path: Path, rows: int, folder: Path, teacher: str) -> tuple[Any, Data]:
    """The feature table of the first `rows` bars (0: all), and what it is made of."""
    import pyarrow.parquet as pq

    from market.build import build_features
    from market.readers import open_source
    from tickserve.features.spec import default_spec

    config: Config = load_settings(environ={}, overrides=SETTINGS | TEACHERS[teacher]).config
    if rows:
        cut = folder / path.name
        pq.write_table(pq.read_table(path).slice(0, rows), cut)
        path = cut
    source = open_source([path], levels=config.features.levels)
    settings = config.features.model_copy(update={"max_rows": 0, "store": str(folder / "store")})
    built = build_features(source, default_spec(source.kind, source.levels), settings)
    table, meta = built.load(), meta_of(built)
    return table, Data(prepare(table, meta, config), meta, config)


def wanted(name: str, steps: list[dict[str, Any]] | None) -> Recipe:
    """A recipe with these steps, or the shipped one."""
    if steps is None:
        return find_recipe(name).model_copy(update={"max_rows": MAX_ROWS})
    return Recipe.model_validate({"name": name, "max_rows": MAX_ROWS, "step": steps})


def show(report: dict[str, Any]) -> None:
    teacher, name = report["teacher"], report["recipe"]["name"]
    print(f"\nrecipe {name}: {'accepted' if report['accepted'] else 'refused'}")
    print(f"{'':10} {'bytes':>9} {'p50 us':>7} {'p99 us':>7} {'IC':>8} {'95 %':>18} {'share':>7} {'flips':>6}")
    print(line("teacher", teacher, teacher["ic_95"], 1.0, "-"))
    for row in report["steps"]:
        quality = row["quality"]
        flipped = f"{row['measured']['flips']:.1%}"
        print(line(row["step"], row["measured"], quality["ic_95"], quality["ic_share"], flipped))
        print(f"{'':10} {row['verdict']}")


def line(name: str, row: dict[str, Any], interval: list[float], share: float, flipped: str) -> str:
    span = f"{interval[0]:+.4f} to {interval[1]:+.4f}"
    numbers = f"{row['size_bytes']:>9,} {row['p50_us']:>7.1f} {row['p99_us']:>7.1f} {row['ic']:>+8.4f}"
    return f"{name:10} {numbers} {span:>18} {share:>7.1%} {flipped:>6}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=0, help="bars of the file, from its start; 0: all")
    parser.add_argument("--teacher", choices=sorted(TEACHERS), default=None, help="both by default")
    parser.add_argument("--out", type=Path, default=None, help="keeps bundles and reports")
    given = parser.parse_args()
    print(machine("onnxruntime", "torch"))
    with tempfile.TemporaryDirectory(prefix="tickserve-compression-") as scratch:
        out = given.out or Path(scratch) / "out"
        wrong: list[str] = []
        for family in [given.teacher] if given.teacher else sorted(TEACHERS, reverse=True):
            wrong += taught(family, given.data, given.rows, Path(scratch), out)
    if wrong:
        print(f"\nnot as expected: {', '.join(wrong)}")
    return 1 if wrong else 0


def taught(family: str, path: Path, rows: int, scratch: Path, out: Path) -> list[str]:
    """Train a teacher, run its recipes on it and print the table; the recipes that ended otherwise than expected."""
    table, data = prepared(path, rows, scratch, family)
    (bundle,) = train_table(table, data.meta, data.config, out, [family], progress=say)
    teacher, refits = teacher_of([bundle.path], data, say)
    wrong = []
    for name, (steps, expected) in RECIPES[family].items():
        outcome = run_recipe(teacher, refits, wanted(name, steps), data, out / name, say)
        show(outcome.report)
        wrong += [name] if outcome.accepted != expected else []
    return wrong


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())

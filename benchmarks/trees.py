"""Training trees: memory and time of XGBoost's matrices, sampling of rows, selection of columns, on real bars.

    python -m benchmarks.trees --data BTCUSD_1m.parquet [--wide] [--tables matrices ...] [--passes 2] [--rounds 50]

Every line is a process of its own that loads the same arrays from disk, trains the last walk-forward fold with the
project's job on one thread and judges it on the test rows. Memory is the peak of that process (VmHWM) until training
ends, less the peak of one that only loads the arrays and the libraries ("growth"), and less the peak of one that also
trains on a thousand rows, so that XGBoost's own code and buffers are in both ("data alone"). Each pass runs every line
once, in turn. `--wide` takes each window of the default columns at four lengths.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import machine
from tickserve.config import Config
from tickserve.features.spec import Feature, FeatureSpec, default_spec
from tickserve.settings import load_settings
from training.examples import Examples, LabelledFold
from training.job import Fit

ARRAYS = ("features", "session", "ret", "end")
LATENCY_CALLS = 5_000
Found = dict[str, list[dict[str, Any]]]
EVERY = "every row"
# Lines of the three tables: what each sets, beside the subject's own settings.
MATRICES: dict[str, dict[str, Any]] = {
    "DMatrix": {},
    "QuantileDMatrix": {},
    "external memory": {"external_memory": True},
}
SAMPLING: dict[str, dict[str, Any]] = {
    EVERY: {"subsample": 1.0},
    **{
        f"{method} {share}": {"subsample": share, "sampling_method": method}
        for share in (0.5, 0.2, 0.1)
        for method in ("uniform", "gradient_based")
    },
}
COLUMNS: dict[str, dict[str, Any]] = {"all columns": {}} | {f"top {n}": {"top_features": n} for n in (16, 8, 4)}
PLAIN, BASELINE, WARM = "DMatrix", "baseline", "warm"
WARM_ROWS = 1_000


TABLES = {"matrices": MATRICES, "sampling": SAMPLING, "columns": COLUMNS}


def wide(spec: FeatureSpec) -> FeatureSpec:
    """The default bars, and each window of them at two, four and eight times its length; warm-up fills the last."""
    features = dict.fromkeys(spec.features)
    for feature in spec.features:
        counts = dict(feature.params)
        if set(counts) == {"count"}:
            features |= dict.fromkeys(Feature.of(feature.kind, count=int(counts["count"] * by)) for by in (2, 4, 8))
    longest = max(int(value) for feature in features for name, value in feature.params if name == "count")
    return dataclasses.replace(spec, name="bars-wide", features=tuple(features), warmup_events=longest)


def prepared(data: Path, config: Config, folder: Path, *, widened: bool) -> dict[str, int]:
    """The arrays of the last fold, written for the workers; its sizes."""
    from market.build import build_features
    from market.readers import open_source
    from training.examples import prepare
    from training.train import meta_of

    source = open_source([data], levels=config.features.levels)
    settings = config.features.model_copy(update={"max_rows": 0, "store": str(folder / "store")})
    spec = default_spec(source.kind, source.levels)
    built = build_features(source, wide(spec) if widened else spec, settings)
    examples = prepare(built.load(), meta_of(built), config)
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", getattr(examples, name))
    fold = examples.published
    for side in ("train", "validation", "test"):
        np.save(folder / f"{side}.npy", getattr(fold.rows, side))
    (folder / "fold.json").write_text(json.dumps({"threshold": fold.threshold, "columns": examples.columns}))
    missing = int(np.isnan(examples.features[fold.rows.train]).sum())
    return {"train_rows": len(fold.rows.train), "columns": len(examples.columns), "missing_values": missing}


def loaded(folder: Path) -> tuple[Examples, LabelledFold]:
    """What `prepared` wrote, as the job takes it."""
    from market.walkforward import Fold

    arrays = {name: np.load(folder / f"{name}.npy") for name in ARRAYS}
    rows = Fold(*(np.load(folder / f"{side}.npy") for side in ("train", "validation", "test")))
    told = json.loads((folder / "fold.json").read_text())
    fold = LabelledFold(1, rows, told["threshold"])
    none = np.empty(0)
    examples = Examples(
        **arrays,
        mid=none,
        trailing=none,
        cost_bps=none,
        assumed_spreads=1.0,
        horizon_unit="rows",
        horizon_value=1,
        horizon_median_ms=0.0,
        stride=1,
        folds=(fold,),
        columns=tuple(told["columns"]),
    )
    return examples, fold


def peak_mib() -> float:
    """Peak resident memory of this process, in MiB (getrusage would count its parent's before exec)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def worker(folder: Path, line: str, changes: dict[str, Any], rounds: int, latency: bool) -> dict[str, Any]:
    """One line of a table, measured in this process."""
    import xgboost

    from training.gbdt import GbdtJob
    from training.gbdt import matrix as matrix_module
    from training.metrics import rank_correlation

    examples, fold = loaded(folder)
    if line == BASELINE:
        return {"peak_mib": peak_mib()}
    overrides = {"gbdt.rounds": rounds, "gbdt.threads": 1} | {f"gbdt.{key}": value for key, value in changes.items()}
    settings = load_settings(environ={}, overrides=overrides).config.gbdt
    if line == PLAIN:
        matrix_module._matrix = lambda source, reference, settings, prefix: xgboost.DMatrix(
            source.taken(0, len(source.rows)),
            **source.described(0, len(source.rows)),
            missing=np.nan,
            nthread=settings.threads,
        )
    job = GbdtJob(examples, settings, 7)
    if line == WARM:
        few = dataclasses.replace(
            fold.rows, train=fold.rows.train[:WARM_ROWS], validation=fold.rows.validation[:WARM_ROWS]
        )
        job.fit(dataclasses.replace(fold, rows=few))
        return {"peak_mib": peak_mib()}
    started = time.perf_counter()
    fit = job.fit(fold)
    result: dict[str, Any] = {"seconds": time.perf_counter() - started, "peak_mib": peak_mib(), "rounds": fit.best}
    said = job.predict(fit, fold.rows.test)
    result["ic"] = rank_correlation((said[:, 2] - said[:, 0]).astype(np.float64), examples.ret[fold.rows.test])
    if latency:
        result |= latency_of(fit, examples, fold)
    return result


def latency_of(fit: Fit, examples: Examples, fold: LabelledFold) -> dict[str, float]:
    """A lone real row in ONNX Runtime, one thread, on the graph that would be served."""
    from export import onnx_graph, runtime
    from training.gbdt.matrix import take

    graph = onnx_graph.serve_graph(onnx_graph.trees_to_onnx(fit.model.booster, fit.model.features), 1)
    row = take(examples.features, fold.rows.test[:1], fit.columns)
    (taken,) = runtime.measure_latency(graph.SerializeToString(), {"features": row}, calls=LATENCY_CALLS)
    return {"p50_us": taken.p50_us, "p99_us": taken.p99_us}


def run(folder: Path, line: str, changes: dict[str, Any], rounds: int, latency: bool = False) -> dict[str, Any]:
    """`worker` in a process of its own."""
    asked = json.dumps({"line": line, "changes": changes, "rounds": rounds, "latency": latency})
    command = [sys.executable, "-m", "benchmarks.trees", "--worker", asked, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def measured(folder: Path, tables: list[str], passes: int, rounds: int) -> Found:
    """Every line of every table, `passes` times; memory is the growth over that pass's baselines."""
    found: Found = {}
    for number in range(passes):
        base, warm = (run(folder, line, {}, rounds)["peak_mib"] for line in (BASELINE, WARM))
        for table in tables:
            for line, changes in TABLES[table].items():
                print(f"pass {number + 1}: {line}", file=sys.stderr)
                result = run(folder, line, changes, rounds, latency=table == "columns")
                peak = result.pop("peak_mib")
                result |= {"growth_mib": peak - base, "data_mib": peak - warm}
                found.setdefault(line, []).append(result)
    return found


def print_matrices(found: Found) -> None:
    print("\nmatrix            growth MiB     times less    data alone MiB  times less    seconds            IC")
    for line in MATRICES:
        shown = []
        for key in ("growth_mib", "data_mib"):
            less = [each[key] / mine[key] for each, mine in zip(found[PLAIN], found[line], strict=True)]
            shown.append(f"{_of(found, line, key, '.0f'):14} {_join(less, '.2f'):13}")
        print(f"{line:17} {'  '.join(shown)} {_tail(found, line)}")


def print_sampling(found: Found) -> None:
    print("\nrows per round      times faster  seconds            IC")
    for line in SAMPLING:
        pairs = zip(found[EVERY], found[line], strict=True)
        faster = _join([each["seconds"] / mine["seconds"] for each, mine in pairs], ".2f")
        print(f"{line:19} {faster:13} {_tail(found, line)}")


def print_columns(found: Found) -> None:
    print("\ncolumns           p50 us         p99 us          seconds            IC")
    for line in COLUMNS:
        latency = f"{_of(found, line, 'p50_us', '.1f'):14} {_of(found, line, 'p99_us', '.1f'):15}"
        print(f"{line:17} {latency} {_tail(found, line)}")


PRINTED = {"matrices": print_matrices, "sampling": print_sampling, "columns": print_columns}


def _tail(found: Found, line: str) -> str:
    return f"{_of(found, line, 'seconds', '.1f'):18} {_of(found, line, 'ic', '.4f')}"


def _of(found: Found, line: str, key: str, form: str) -> str:
    return _join([result[key] for result in found[line]], form)


def _join(values: list[float], form: str) -> str:
    return " / ".join(format(value, form) for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="bars, one file")
    parser.add_argument("--wide", action="store_true", help="about 90 columns instead of about 30")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        print(json.dumps(worker(asked.folder, **json.loads(asked.worker))))
        return
    if asked.data is None:
        parser.error("--data: expected a file of bars")
    with tempfile.TemporaryDirectory(prefix="tickserve-trees-") as folder:
        sizes = prepared(asked.data, load_settings(environ={}).config, Path(folder), widened=asked.wide)
        found = measured(Path(folder), asked.tables, asked.passes, asked.rounds)
    if asked.json:
        print(json.dumps({"machine": machine("xgboost"), **sizes, "lines": found}))
        return
    print(machine("xgboost", "onnxruntime"))
    print(", ".join(f"{name} {value:,}" for name, value in sizes.items()) + f", {asked.rounds} rounds at most")
    for table in asked.tables:
        PRINTED[table](found)


if __name__ == "__main__":
    main()

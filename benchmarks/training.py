"""What the trainer of nets costs and saves, on recorded one-minute bars.

Windows as views of the table and of a mapped file against windows copied once ("materialised"), each in a process of
its own: windows a second over all batches, and the memory it took. Then what must not change a result, measured as the
difference it makes; and what a checkpoint holds the training loop up, written by a thread or not.

    python -m benchmarks.training --data ../shared/data/bars_1m/bitfinex/BTCUSD_1m_201804_201812.parquet
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import machine
from market.build import FeatureSet, build_features, open_feature_set
from market.feature_matrix import mapped_table
from market.readers import open_source
from tickserve.config import FeatureSettings, LstmSettings, TrainerSettings
from tickserve.features.spec import default_spec
from tickserve.settings import load_settings
from training.examples import Examples, IntArray, Rows, prepare
from training.nets import NetJob
from training.nets.trainer import _Fit
from training.nets.windows import Loader, WindowSet
from training.train import meta_of

BATCH, WINDOW, PASSES = 512, 20, 2
LOADERS = ("materialised", "views", "mapped", "mapped, 2 workers")


def memory_mb() -> dict[str, float]:
    """Memory of this process that it does not share with a file, now and at its highest, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("RssAnon", "VmHWM"))}
    return {"anonymous": found["RssAnon"], "peak": found["VmHWM"]}


def batches(kind: str, features: Rows, rows: list[IntArray]) -> Iterator[torch.Tensor]:
    """One pass over the windows that end at `rows`."""
    if kind == "materialised":
        every = np.lib.stride_tricks.sliding_window_view(features, WINDOW, axis=0).swapaxes(1, 2)
        copied = np.ascontiguousarray(every)
        for _ in range(PASSES):
            yield from (torch.from_numpy(copied[chosen - WINDOW + 1]) for chosen in rows)
        return
    windows = WindowSet(features, np.zeros(len(features), np.int8), WINDOW, (WINDOW, features.shape[1]))
    with Loader(windows, TrainerSettings(loader_workers=2 if "workers" in kind else 0)) as loader:
        for _ in range(PASSES):
            yield from (batch.rows for batch in loader.batches(rows))


def load(kind: str, folder: Path, answer: Any) -> None:
    """A contestant's passes, in a process of its own."""
    torch.set_num_threads(1)
    opened = open_feature_set(folder)
    features = mapped_table(opened).features if "mapped" in kind else opened.load().features
    order = np.random.default_rng(7).permutation(np.arange(WINDOW - 1, len(features)))
    rows = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    before, started = memory_mb(), time.perf_counter()
    count = sum(len(batch) for batch in batches(kind, features, rows))
    seconds, after = time.perf_counter() - started, memory_mb()
    answer.send({"windows_per_s": count / seconds, "grown_mb": max(0.0, after["peak"] - before["peak"]), **after})


def loaders(folder: Path) -> dict[str, dict[str, float]]:
    """Every contestant in turn."""
    context, found = multiprocessing.get_context("spawn"), {}
    for kind in LOADERS:
        ours, theirs = context.Pipe()
        process = context.Process(target=load, args=(kind, folder, theirs))
        process.start()
        found[kind] = ours.recv()
        process.join()
    return found


def fitted(examples: Examples, batch_rows: int, settings: LstmSettings, **trainer: Any) -> tuple[Rows, float, float]:
    """Weights, last validation loss and seconds of a fit of the last fold."""
    job = NetJob(
        "lstm", examples, settings.model_copy(update={"batch_rows": batch_rows}), 7, TrainerSettings(**trainer)
    )
    losses: list[float] = []
    job.watch = lambda step, loss: losses.append(loss)
    started = time.perf_counter()
    state = job.fit(examples.published).model.state_dict()
    return np.concatenate([each.numpy().ravel() for each in state.values()]), losses[-1], time.perf_counter() - started


def same_results(examples: Examples, settings: LstmSettings) -> dict[str, dict[str, float]]:
    """What accumulation, bf16 and loader workers change against a plain fit."""
    plain, loss, seconds = fitted(examples, BATCH, settings)
    found = {"plain": {"max_weight_difference": 0.0, "loss": loss, "seconds": seconds}}
    variants: dict[str, tuple[int, dict[str, Any]]] = {
        "plain, again": (BATCH, {}),
        "4 accumulated batches": (BATCH // 4, {"accumulate": 4}),
        "bf16": (BATCH, {"precision": "bf16"}),
        "2 loader workers": (BATCH, {"loader_workers": 2}),
    }
    for name, (batch_rows, trainer) in variants.items():
        weights, loss, seconds = fitted(examples, batch_rows, settings, **trainer)
        difference = float(np.abs(weights - plain).max())
        found[name] = {"max_weight_difference": difference, "loss": loss, "seconds": seconds}
    return found


def stalls(examples: Examples, settings: LstmSettings) -> dict[str, dict[str, float]]:
    """Milliseconds that a checkpoint holds the loop up, every 5 steps of a larger net, and how many were written."""
    large = settings.model_copy(update={"hidden": 512, "epochs": 1, "max_train_windows": 4_000, "window": 5})
    found = {}
    for name, asynchronous in (("thread", True), ("no thread", False)):
        times: list[float] = []
        with tempfile.TemporaryDirectory() as folder, watching(times):
            trainer = {"checkpoint_steps": 5, "checkpoint_folder": folder, "checkpoint_async": asynchronous}
            _, _, seconds = fitted(examples, 100, large, **trainer)
        stalled = np.array(times[:-1]) * 1e3  # the last one ends the fit and waits in either case
        found[name] = {"median_ms": float(np.median(stalled)), "worst_ms": float(stalled.max()), "fit_seconds": seconds}
    return found


class watching:  # noqa: N801 - a context
    """Appends the seconds of every save to `times`."""

    def __init__(self, times: list[float]) -> None:
        self._times, self._save = times, _Fit._save

    def __enter__(self) -> None:
        times, save = self._times, self._save

        def timed(fit: _Fit, writer: Any) -> None:
            started = time.perf_counter()
            save(fit, writer)
            times.append(time.perf_counter() - started)

        _Fit._save = timed  # type: ignore[method-assign, assignment]

    def __exit__(self, *_: object) -> None:
        _Fit._save = self._save  # type: ignore[method-assign]


def feature_set(data: Path, store: str) -> FeatureSet:
    source = open_source([data], levels=5)
    spec = default_spec(source.kind, source.levels)
    return build_features(source, spec, FeatureSettings(store=store, max_rows=0))


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}")
    for name, values in rows.items():
        print(f"  {name:<24}" + "  ".join(f"{key} {value:,.6g}" for key, value in values.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--store", default=".tickserve/features")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    built = feature_set(chosen.data, chosen.store)
    config = load_settings(environ={}, overrides={"validation.folds": 1}).config
    examples = prepare(mapped_table(built), meta_of(built), config)
    settings = config.lstm.model_copy(update={"max_train_windows": 20_000, "epochs": 2})
    result = {
        "loading": loaders(built.folder),
        "results": same_results(examples, settings),
        "checkpoints": stalls(examples, settings),
    }
    if chosen.json:
        print(json.dumps(result, indent=2))
        return
    print(machine("torch", "accelerate"))
    rows, columns = examples.features.shape
    show(f"gathering batches of {BATCH} windows [{WINDOW}, {columns}] of {rows:,} rows", result["loading"])
    show("what changes no result (LSTM, 2 epochs)", result["results"])
    show("what a checkpoint holds the loop up (LSTM of 512 units)", result["checkpoints"])


if __name__ == "__main__":
    main()

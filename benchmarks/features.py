"""Features per event: the engine against pandas and polars on the same rows.

    python -m benchmarks.features [--data FILE ...] [--rows 1000000] [--threads 2] [--events 10000000]

Two tables. The common columns are those that all three express exactly (windows in rows); their values are checked
against each other before anything is timed. The default spec is compared with its columns as nearly as pandas and
polars express them (`feature_peers.py` says which are the same and which the nearest). The best of the passes counts,
and every contestant may use all cores. `--events` also streams that many events through the engine in chunks, the
recording played again and again, and prints by how much the process's memory grew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pandas as pd
import polars as pl
import psutil

from benchmarks import feature_peers as peers
from benchmarks.harness import told_apart
from market.readers import open_source
from market.readers.source import Source
from market.simulator import SimulatedSource
from tickserve.events import Events
from tickserve.features.engine import FeatureEngine
from tickserve.features.spec import Feature, FeatureSpec, default_book_spec

CHUNK = 131_072
LEVELS = 5
FLOWS = (10, 20, 50, 100, 200, 300, 400, 500)
RETURNS = (1, 5, 10, 20, 50, 100, 200, 500)
NEVER = 2**62
COMMON = "common"
Found = dict[str, Any]
Table = dict[str, npt.NDArray[np.float64]]


def common_spec() -> FeatureSpec:
    features = [Feature.of("relative_spread"), Feature.of("microprice_deviation")]
    features += [Feature.of("level_imbalance", level=level) for level in range(1, LEVELS + 1)]
    features += [Feature.of("depth_imbalance", levels=LEVELS), Feature.of("time_since_event")]
    features += [Feature.of("order_flow_imbalance_events", count=count) for count in FLOWS]
    features += [Feature.of("mid_return_events", count=count) for count in RETURNS]
    return FeatureSpec(COMMON, "book", LEVELS, tuple(features), NEVER, 0)


def with_pandas(frame: pd.DataFrame, spec: FeatureSpec) -> pd.DataFrame:
    bid, bid_size, ask, ask_size = (frame[name] for name in ("bid_price_1", "bid_size_1", "ask_price_1", "ask_size_1"))
    mid = (bid + ask) / 2
    log_mid, spread = np.log(mid), (ask - bid) / mid
    out = {"relative_spread": spread}
    out["microprice_deviation"] = spread / 2 * (bid_size - ask_size) / (bid_size + ask_size)
    for level in range(1, LEVELS + 1):
        bids, asks = frame[f"bid_size_{level}"], frame[f"ask_size_{level}"]
        out[f"level_imbalance_{level}"] = (bids - asks) / (bids + asks)
    bids = frame[[f"bid_size_{level}" for level in range(1, LEVELS + 1)]].sum(axis=1)
    asks = frame[[f"ask_size_{level}" for level in range(1, LEVELS + 1)]].sum(axis=1)
    out["depth_imbalance_5"] = (bids - asks) / (bids + asks)
    out["time_since_event"] = np.log(frame["ts_ns"].diff().fillna(0) / 1e9 + 1)
    flow = (bid >= bid.shift()) * bid_size - (bid <= bid.shift()) * bid_size.shift().fillna(0)
    flow += (ask >= ask.shift()) * ask_size.shift().fillna(0) - (ask <= ask.shift()) * ask_size
    depth = (bid_size + ask_size) / 2
    for _, count in peers.windows_of(spec, "order_flow_imbalance_events"):
        summed = flow.rolling(count, min_periods=1).sum()
        out[f"order_flow_imbalance_events_{count}"] = summed / depth.rolling(count, min_periods=1).mean()
    for _, count in peers.windows_of(spec, "mid_return_events"):
        out[f"mid_return_events_{count}"] = log_mid - log_mid.shift(count).fillna(log_mid.iloc[0])
    exact = pd.DataFrame(out).astype(np.float32)
    if spec.name == COMMON:
        return exact
    shared = pd.DataFrame({"mid": mid, "log_mid": log_mid, "flow": flow, "depth": depth, "spread": spread})
    return pd.concat([exact, peers.with_pandas(spec, frame, shared)], axis=1)


def with_polars(frame: pl.DataFrame, spec: FeatureSpec) -> pl.DataFrame:
    bid, bid_size, ask, ask_size = (pl.col(name) for name in ("bid_price_1", "bid_size_1", "ask_price_1", "ask_size_1"))
    flow = pl.when(bid >= bid.shift()).then(bid_size).otherwise(0.0)
    flow -= pl.when(bid <= bid.shift()).then(bid_size.shift()).otherwise(0.0)
    flow += pl.when(ask >= ask.shift()).then(ask_size.shift()).otherwise(0.0)
    flow -= pl.when(ask <= ask.shift()).then(ask_size).otherwise(0.0)
    mid = (bid + ask) / 2
    base = frame.lazy().with_columns(
        mid=mid, log_mid=mid.log(), spread=(ask - bid) / mid, flow=flow, depth=(bid_size + ask_size) / 2
    )
    spread, log_mid = pl.col("spread"), pl.col("log_mid")
    out = {"relative_spread": spread}
    out["microprice_deviation"] = spread / 2 * (bid_size - ask_size) / (bid_size + ask_size)
    for level in range(1, LEVELS + 1):
        bids, asks = pl.col(f"bid_size_{level}"), pl.col(f"ask_size_{level}")
        out[f"level_imbalance_{level}"] = (bids - asks) / (bids + asks)
    bids = pl.sum_horizontal([f"bid_size_{level}" for level in range(1, LEVELS + 1)])
    asks = pl.sum_horizontal([f"ask_size_{level}" for level in range(1, LEVELS + 1)])
    out["depth_imbalance_5"] = (bids - asks) / (bids + asks)
    out["time_since_event"] = (pl.col("ts_ns").diff().fill_null(0) / 1e9 + 1).log()
    for _, count in peers.windows_of(spec, "order_flow_imbalance_events"):
        summed = pl.col("flow").rolling_sum(count, min_samples=1)
        out[f"order_flow_imbalance_events_{count}"] = summed / pl.col("depth").rolling_mean(count, min_samples=1)
    for _, count in peers.windows_of(spec, "mid_return_events"):
        out[f"mid_return_events_{count}"] = log_mid - log_mid.shift(count).fill_null(log_mid.first())
    out |= {} if spec.name == COMMON else peers.with_polars(spec)
    return base.select(**{name: column.cast(pl.Float32) for name, column in out.items()}).collect()


def read(source: Source, count: int) -> Events:
    """`count` events; a shorter recording is played again and again, each time later."""
    chunks, total = [], 0
    for chunk in source.chunks(CHUNK):
        chunks.append(chunk)
        total += len(chunk)
        if total >= count:
            break
    ts_ns = np.concatenate([chunk.ts_ns for chunk in chunks])
    values = np.concatenate([chunk.values for chunk in chunks])
    times = -(-count // len(ts_ns))
    later = np.arange(times)[:, None] * (ts_ns[-1] - ts_ns[0] + 10**6)
    everything = (ts_ns[None] + later).ravel()[:count]
    return Events("book", source.levels, everything, np.ascontiguousarray(np.tile(values, (times, 1))[:count]))


def best(run: Callable[[], Any], passes: int = 5) -> float:
    """Seconds of the fastest pass."""
    taken = []
    for _ in range(passes):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def columnar(spec: FeatureSpec, events: Events, threads: int | None) -> Callable[[], None]:
    def run() -> None:
        engine = FeatureEngine(spec, threads=threads)
        for start in range(0, len(events), CHUNK):
            piece = slice(start, start + CHUNK)
            engine.batch(Events("book", events.levels, events.ts_ns[piece], events.values[piece]))

    return run


def table_of(events: Events) -> Table:
    columns = dict(zip(events.columns, np.ascontiguousarray(events.values.T), strict=True))
    return {"ts_ns": events.ts_ns, **columns}


def check_equal(events: Events) -> float:
    """The largest difference among the three, relative to each column's spread, on 20,000 events."""
    few = Events("book", events.levels, events.ts_ns[:20_000], events.values[:20_000])
    spec = common_spec()
    ours = FeatureEngine(spec).batch(few).astype(np.float64)
    worst = 0.0
    for other in (with_pandas(pd.DataFrame(table_of(few)), spec), with_polars(pl.DataFrame(table_of(few)), spec)):
        theirs = np.column_stack([other[name].to_numpy() for name in spec.columns]).astype(np.float64)
        worst = max(worst, float(np.nanmax(np.abs(ours - theirs) / (np.nanstd(ours, axis=0) + 1e-12))))
    return worst


def stepped(spec: FeatureSpec, events: Events, count: int) -> npt.NDArray[np.float64]:
    """Microseconds of each of `count` steps, the clock's own cost included."""
    engine, clock = FeatureEngine(spec), time.perf_counter_ns
    times, rows = events.ts_ns[:count].tolist(), list(events.values[:count])
    taken = np.empty(count)
    for i in range(count):
        start = clock()
        engine.step(times[i], rows[i])
        taken[i] = clock() - start
    return taken[count // 10 :] / 1e3


def recomputed(events: Events, count: int) -> npt.NDArray[np.float64]:
    """Microseconds of computing the newest row of the common columns from a window of 501 rows with polars."""
    frame, window = pl.DataFrame(table_of(events)), max(FLOWS) + 1
    taken, spec = np.empty(count), common_spec()
    for i in range(count):
        rows = frame.slice(i, window)
        start = time.perf_counter_ns()
        with_polars(rows, spec)
        taken[i] = time.perf_counter_ns() - start
    return taken[count // 10 :] / 1e3


def report_columnar(spec: FeatureSpec, events: Events, threads: int | None) -> Found:
    table = table_of(events)
    frames = pd.DataFrame(table), pl.DataFrame(table)
    missing = set(spec.columns) ^ set(with_polars(frames[1].head(600), spec).columns)
    missing |= set(spec.columns) ^ set(with_pandas(frames[0].head(600), spec).columns)
    if missing:
        raise AssertionError(f"columns not compared: {sorted(missing)}")
    columnar(spec, events, threads)()
    ours = best(columnar(spec, events, threads))
    rows: list[tuple[str, float]] = [
        (f"engine, {threads or 'all'} threads", ours),
        ("engine, 1 thread", best(columnar(spec, events, 1))),
        (f"polars {pl.__version__}", best(lambda: with_polars(frames[1], spec))),
        (f"pandas {pd.__version__}", best(lambda: with_pandas(frames[0], spec))),
    ]
    for name, seconds in rows:
        print(f"  {name:24s} {seconds / len(events) * 1e9:9.1f} ns/event {seconds / ours:8.1f}x")
    return {name: {"ns": seconds / len(events) * 1e9} for name, seconds in rows}


def report_stream(events: Events, count: int, threads: int | None) -> Found:
    """Stream `count` events chunk by chunk: the recording again and again, each time later."""
    engine, done, took = FeatureEngine(default_book_spec(events.levels), threads=threads), 0, 0.0
    process = psutil.Process()
    before = peak = process.memory_info().rss
    span = int(events.ts_ns[-1] - events.ts_ns[0]) + 10**6
    while done < count:
        at = done % len(events)
        piece = slice(at, min(at + CHUNK, len(events), at + count - done))
        ts_ns = events.ts_ns[piece] + done // len(events) * span
        start = time.perf_counter()
        held = engine.batch(Events("book", events.levels, ts_ns, events.values[piece]))
        took += time.perf_counter() - start
        done += len(held)
        peak = max(peak, process.memory_info().rss)
    print(f"\n{count:,} events streamed in chunks of {CHUNK:,}: {took / count * 1e9:.1f} ns/event, ", end="")
    print(f"memory grew by {(peak - before) / 2**20:.0f} MiB at most")
    return {"ns": took / count * 1e9, "grew_mib": (peak - before) / 2**20}


def report_stepped(events: Events) -> Found:
    print("\none event at a time")
    lines = [
        ("engine, common columns", stepped(common_spec(), events, 100_000)),
        ("engine, default spec", stepped(default_book_spec(events.levels), events, 100_000)),
        ("polars, common columns", recomputed(events, 500)),
    ]
    for name, taken in lines:
        p50, p99, p999 = np.percentile(taken, [50, 99, 99.9])
        print(f"  {name:24s} p50 {p50:9.2f} us   p99 {p99:9.2f} us   p99.9 {p999:9.2f} us")
    print(f"  recomputing takes {np.median(lines[2][1]) / np.median(lines[0][1]):.0f}x as long")
    return {
        name: {f"p{each:g}_us": float(np.percentile(taken, each)) for each in (50, 99, 99.9)} for name, taken in lines
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", help="order-book recordings with 5 levels (default: simulated)")
    parser.add_argument("--rows", type=int, default=1_000_000, help="events that every contestant computes")
    parser.add_argument("--events", type=int, default=0, help="also stream this many, and print the memory it took")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    source = (
        open_source(options.data, levels=LEVELS)
        if options.data
        else SimulatedSource(seed=7, events=options.rows, levels=LEVELS)
    )
    if (source.kind, source.levels) != ("book", LEVELS):
        parser.error(f"--data: expected an order book with {LEVELS} levels, was {source.kind} with {source.levels}")
    events = read(source, options.rows)
    with told_apart(options.json):
        found = report(source, events, options)
    if options.json:
        print(json.dumps(found))
    return 0


def report(source: Source, events: Events, options: argparse.Namespace) -> Found:
    """Print every table; what was printed, as JSON values."""
    found: Found = {}
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, ", end="")
    print(f"Python {platform.python_version()}, numpy {np.__version__}, numba {numba.__version__}")
    print(f"{len(events):,} events of {source.symbol} ({source.venue}), {LEVELS} levels")
    if options.events:  # first: what comes later takes more memory
        found["streamed"] = report_stream(events, options.events, options.threads)
    for spec, kind in (
        (common_spec(), f"columns that all three express (largest difference {check_equal(events):.1e} sd)"),
        (default_book_spec(LEVELS), "columns of the default spec, as nearly as the others express them"),
    ):
        print(f"\n{len(spec.columns)} {kind}")
        found[spec.name] = report_columnar(spec, events, options.threads)
    return found | {"one_at_a_time": report_stepped(events)}


if __name__ == "__main__":
    raise SystemExit(main())

"""Features per event: the engine against pandas and polars on the same formulas and the same rows.

    python -m benchmarks.features [--data FILE ...] [--events 1000000] [--threads 2]

The compared columns are those that pandas and polars can both express exactly (windows in rows); the values are
checked against each other before anything is timed. Columns that decay in elapsed time are in the engine's default
spec, which is timed on its own line. The best of the passes counts, and every contestant may use all cores.
"""

from __future__ import annotations

import argparse
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
Table = dict[str, npt.NDArray[np.float64]]


def common_spec() -> FeatureSpec:
    features = [Feature.of("relative_spread"), Feature.of("microprice_deviation")]
    features += [Feature.of("level_imbalance", level=level) for level in range(1, LEVELS + 1)]
    features += [Feature.of("depth_imbalance", levels=LEVELS), Feature.of("time_since_event")]
    features += [Feature.of("order_flow_imbalance_events", count=count) for count in FLOWS]
    features += [Feature.of("mid_return_events", count=count) for count in RETURNS]
    return FeatureSpec("common", "book", LEVELS, tuple(features), NEVER, 0)


def with_pandas(frame: pd.DataFrame) -> pd.DataFrame:
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
    for count in FLOWS:
        summed = flow.rolling(count, min_periods=1).sum()
        out[f"order_flow_imbalance_events_{count}"] = summed / depth.rolling(count, min_periods=1).mean()
    for count in RETURNS:
        out[f"mid_return_events_{count}"] = log_mid - log_mid.shift(count).fillna(log_mid.iloc[0])
    return pd.DataFrame(out).astype(np.float32)


def with_polars(frame: pl.DataFrame) -> pl.DataFrame:
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
    for count in FLOWS:
        summed = pl.col("flow").rolling_sum(count, min_samples=1)
        out[f"order_flow_imbalance_events_{count}"] = summed / pl.col("depth").rolling_mean(count, min_samples=1)
    for count in RETURNS:
        out[f"mid_return_events_{count}"] = log_mid - log_mid.shift(count).fill_null(log_mid.first())
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


def best(run: Callable[[], Any], passes: int = 3) -> float:
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
    for other in (with_pandas(pd.DataFrame(table_of(few))), with_polars(pl.DataFrame(table_of(few)))):
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
    taken = np.empty(count)
    for i in range(count):
        rows = frame.slice(i, window)
        start = time.perf_counter_ns()
        with_polars(rows)
        taken[i] = time.perf_counter_ns() - start
    return taken[count // 10 :] / 1e3


def report_columnar(events: Events, threads: int | None) -> None:
    spec, table = common_spec(), table_of(events)
    frames = pd.DataFrame(table), pl.DataFrame(table)
    print(f"\n{len(spec.columns)} columns that all three express (largest difference {check_equal(events):.1e} sd)")
    columnar(spec, events, threads)()
    ours = best(columnar(spec, events, threads))
    rows: list[tuple[str, float]] = [
        (f"engine, {threads or 'all'} threads", ours),
        ("engine, 1 thread", best(columnar(spec, events, 1))),
        (f"polars {pl.__version__}", best(lambda: with_polars(frames[1]))),
        (f"pandas {pd.__version__}", best(lambda: with_pandas(frames[0]))),
    ]
    for name, seconds in rows:
        print(f"  {name:24s} {seconds / len(events) * 1e9:9.1f} ns/event {seconds / ours:8.1f}x")
    full = default_book_spec(events.levels)
    for count in (threads, 1):
        seconds = best(columnar(full, events, count)) / len(events) * 1e9
        print(f"  default spec, {len(full.columns)} columns, {count or 'all'} threads: {seconds:.1f} ns/event")


def report_stepped(events: Events) -> None:
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", help="order-book recordings with 5 levels (default: simulated)")
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args(arguments)
    source = (
        open_source(options.data, levels=LEVELS)
        if options.data
        else SimulatedSource(seed=7, events=options.events, levels=LEVELS)
    )
    if (source.kind, source.levels) != ("book", LEVELS):
        parser.error(f"--data: expected an order book with {LEVELS} levels, was {source.kind} with {source.levels}")
    events = read(source, options.events)
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, ", end="")
    print(f"Python {platform.python_version()}, numpy {np.__version__}, numba {numba.__version__}")
    print(f"{len(events):,} events of {source.symbol} ({source.venue}), {LEVELS} levels")
    report_columnar(events, options.threads)
    report_stepped(events)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

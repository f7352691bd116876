"""The default book spec's columns, as nearly as pandas and polars express them, for `benchmarks.features`.

The same: columns of the newest row, windows in events, deviations from moving averages (polars), time since, time of
day. Nearest: a sum that decays in elapsed time is a decaying mean there, which has as much to do; a horizon looks up
the newest event as old as it, where the engine is exact to a sixty-fourth. In pandas, whose `ewm(times=)` knows no
recursive mean, deviations are from the mean of all weights.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import polars as pl

from tickserve.features.spec import FeatureSpec

SECOND_NS = 10**9


def names_of(spec: FeatureSpec, kind: str) -> list[tuple[str, float]]:
    """(column, first parameter) of the spec's features of a kind."""
    pairs = zip(spec.columns, spec.features, strict=True)
    return [(name, item.params[0][1] if item.params else 0.0) for name, item in pairs if item.kind == kind]


def windows_of(spec: FeatureSpec, kind: str) -> list[tuple[str, int]]:
    """(column, events) of the spec's features of a kind."""
    return [(name, int(count)) for name, count in names_of(spec, kind)]


def with_pandas(spec: FeatureSpec, frame: pd.DataFrame, common: pd.DataFrame) -> pd.DataFrame:
    """The default columns; `common` has mid, log mid, flow, depth and spread of the frame."""
    ts, times = frame["ts_ns"].to_numpy(), pd.to_datetime(frame["ts_ns"])
    log_mid, depth = common["log_mid"], common["depth"]
    out: dict[str, Any] = {}

    def mean(what: pd.Series, tau: float) -> pd.Series:
        half: Any = pd.Timedelta(int(tau * math.log(2) * SECOND_NS), "ns")
        return what.ewm(halflife=half, times=times).mean()

    is_trade = frame["event"] == 1
    signed = (frame["trade_size"] * frame["trade_sign"]).where(is_trade, 0.0)
    squares = log_mid.diff().fillna(0.0) ** 2
    per_depth = (("order_flow_imbalance", common["flow"]), ("signed_trade_flow", signed))
    for kind, what in per_depth:
        out |= {name: mean(what, tau) / mean(depth, tau) for name, tau in names_of(spec, kind)}
    out |= {name: np.sqrt(mean(squares, tau)) for name, tau in names_of(spec, "realised_volatility")}
    gaps = frame["ts_ns"].diff().fillna(0) / SECOND_NS
    out |= {name: np.sqrt(1 / mean(gaps, tau)) for name, tau in names_of(spec, "event_rate")}
    out |= {name: np.sqrt(mean(is_trade * 1.0, tau)) for name, tau in names_of(spec, "trade_rate")}
    for name, horizon in names_of(spec, "mid_return"):
        before = np.searchsorted(ts, ts - int(horizon * SECOND_NS), side="right") - 1
        out[name] = log_mid - log_mid.to_numpy()[np.maximum(before, 0)]
    averaged = (("spread", common["spread"]), ("depth", np.log(depth)), ("mid", log_mid))
    for kind, what in averaged:
        out |= {name: what - mean(what, tau) for name, tau in names_of(spec, f"{kind}_deviation")}
    out["trade_deviation"] = (np.log(frame["trade_price"].where(is_trade).ffill()) - log_mid).fillna(0.0)
    since = frame["ts_ns"] - frame["ts_ns"].where(is_trade).ffill().fillna(ts[0])
    out["time_since_trade"] = np.log1p(since / SECOND_NS)
    angle = frame["ts_ns"] // SECOND_NS % 86_400 * (2 * np.pi / 86_400)
    out |= {"time_of_day_sin": np.sin(angle), "time_of_day_cos": np.cos(angle)}
    sizes = [(f"{side}_price_{k}", f"{side}_size_{k}") for k in range(1, spec.levels + 1) for side in ("bid", "ask")]
    money = sum((frame[price] - common["mid"]) * frame[size] for price, size in sizes)
    out[f"depth_weighted_deviation_{spec.levels}"] = money / sum(frame[size] for _, size in sizes) / common["mid"]
    return pd.DataFrame(out).astype(np.float32)


def with_polars(spec: FeatureSpec) -> dict[str, Any]:
    """Expressions of the default columns on a frame that has mid, log_mid, flow, depth and spread."""
    col, ts = pl.col, pl.col("ts_ns")
    log_mid, depth = col("log_mid"), col("depth")
    out: dict[str, Any] = {}

    def mean(what: pl.Expr, tau: float) -> pl.Expr:
        return what.ewm_mean_by("ts_ns", half_life=f"{int(tau * math.log(2) * SECOND_NS)}i")

    is_trade = col("event") == 1
    signed = pl.when(is_trade).then(col("trade_size") * col("trade_sign")).otherwise(0.0)
    squares = log_mid.diff().fill_null(0.0) ** 2
    for kind, what in (("order_flow_imbalance", col("flow")), ("signed_trade_flow", signed)):
        out |= {name: mean(what, tau) / mean(depth, tau) for name, tau in names_of(spec, kind)}
    out |= {name: mean(squares, tau).sqrt() for name, tau in names_of(spec, "realised_volatility")}
    gaps = ts.diff().fill_null(0) / SECOND_NS
    out |= {name: (1 / mean(gaps, tau)).sqrt() for name, tau in names_of(spec, "event_rate")}
    out |= {name: mean(is_trade.cast(pl.Float64), tau).sqrt() for name, tau in names_of(spec, "trade_rate")}
    for name, horizon in names_of(spec, "mid_return"):
        before = ts.search_sorted(ts - int(horizon * SECOND_NS), side="right").cast(pl.Int64) - 1
        out[name] = log_mid - log_mid.gather(pl.max_horizontal(before, pl.lit(0)))
    for kind, what in (("spread", col("spread")), ("depth", depth.log()), ("mid", log_mid)):
        out |= {name: what - mean(what, tau) for name, tau in names_of(spec, f"{kind}_deviation")}
    last = pl.when(is_trade).then(col("trade_price")).forward_fill()
    out["trade_deviation"] = (last.log() - log_mid).fill_null(0.0)
    out["time_since_trade"] = ((ts - pl.when(is_trade).then(ts).forward_fill().fill_null(ts.first())) / 1e9).log1p()
    angle = ts // SECOND_NS % 86_400 * (2 * np.pi / 86_400)
    out |= {"time_of_day_sin": angle.sin(), "time_of_day_cos": angle.cos()}
    sides = [(f"{side}_price_{k}", f"{side}_size_{k}") for k in range(1, spec.levels + 1) for side in ("bid", "ask")]
    money = pl.sum_horizontal([(col(price) - col("mid")) * col(size) for price, size in sides])
    weights = pl.sum_horizontal([size for _, size in sides])
    out[f"depth_weighted_deviation_{spec.levels}"] = money / weights / col("mid")
    return out

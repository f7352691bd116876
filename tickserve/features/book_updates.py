"""Order book features: one pass per kind over a tile of n events, which may be one event.

A pass reads the shared columns of `book_stage.py`, its parameters `p` and its state `s`, and writes
its feature into `y`, float32 [n]. Features of the mid are NaN without a valid two-sided quote.
"""

# numpy types an element of a float64 array as Any; these functions return floats.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from typing import Final

from tickserve.features.book_stage import (
    DEPTH_SUM,
    DT,
    EVENTS_SUM,
    FLOW_SUM,
    LOG_DEPTH,
    LOG_MID,
    LOG_TRADE,
    MICRO,
    MID,
    NOW,
    PAST_DEPTH,
    PAST_FLOW,
    PAST_LOG,
    SIGNED_SUM,
    SPREAD,
    SQUARES_SUM,
    TRADE_TIME,
    TRADES_SUM,
    is_price,
)  # fmt: skip
from tickserve.features.catalog import HORIZON_CAPACITY, HORIZON_HEADER
from tickserve.features.elementary import log_positive
from tickserve.features.jit import inlined
from tickserve.features.windows import Longs, Singles, Words

DAY_S: Final = 86_400
SECOND_NS: Final = 1_000_000_000
LARGEST: Final = 3.4028234e38
# Smaller than any number a float32 holds at full precision.
TINY: Final = 1.2e-38
# A decayed sum of depths below this holds no depth at all.
NO_DEPTH: Final = 1e-150


@inlined
def single(value: float) -> float:
    """A feature as it is written: what float32 cannot hold is NaN, what is too small for it 0."""
    value = value if abs(value) >= TINY else value * 0.0
    return value if abs(value) <= LARGEST else math.nan


@inlined
def shared_column(column: Words, y: Singles) -> None:
    """A column that the stage has computed already.

    `relative_spread`: (ask - bid) / mid; negative where the venue's quotes cross. `microprice_deviation`:
    (microprice - mid) / mid with the size-weighted mid, the first approximation in Stoikov (2018), "The micro-price: a
    high-frequency estimator of future prices", Quantitative Finance 18(12).
    """
    for i in range(len(y)):
        y[i] = single(column[i])


@inlined
def level_imbalance(book: Words, p: Words, y: Singles) -> None:
    """(bid size - ask size) / (bid size + ask size) at one level, 0 where neither side has a size.

    Cartea, Donnelly, Jaimungal (2018), "Enhancing trading strategies with order book signals".
    """
    column = 4 * (int(p[0]) - 1)
    bids, asks = book[column + 1], book[column + 3]
    for i in range(len(y)):
        bid, ask = bids[i], asks[i]
        ratio = (bid - ask) / (bid + ask)
        y[i] = single(ratio if bid + ask > 0.0 else 0.0)


@inlined
def depth_imbalance(book: Words, scratch: Words, p: Words, y: Singles) -> None:
    """As `level_imbalance`, over the sizes of the best levels added up."""
    bids, asks = scratch[0], scratch[1]
    for i in range(len(y)):
        bids[i] = asks[i] = 0.0
    for level in range(int(p[0])):
        more_bids, more_asks = book[4 * level + 1], book[4 * level + 3]
        for i in range(len(y)):
            bids[i] += more_bids[i]
            asks[i] += more_asks[i]
    for i in range(len(y)):
        ratio = (bids[i] - asks[i]) / (bids[i] + asks[i])
        y[i] = single(ratio if bids[i] + asks[i] > 0.0 else 0.0)


@inlined
def depth_weighted_deviation(x: Words, book: Words, scratch: Words, p: Words, y: Singles) -> None:
    """The size-weighted price of both sides' best levels against the mid, relative; 0 without sizes.

    Cao, Hansch, Wang (2009), "The information content of an open limit-order book", J. Futures Markets 29(1).
    """
    values, weights, mids = scratch[0], scratch[1], x[MID]
    for i in range(len(y)):
        values[i] = weights[i] = 0.0
    for side in range(2 * int(p[0])):
        prices, sizes = book[2 * side], book[2 * side + 1]
        for i in range(len(y)):
            there = is_price(prices[i])
            values[i] += sizes[i] * (prices[i] - mids[i]) if there else 0.0
            weights[i] += sizes[i] if there else 0.0
    for i in range(len(y)):
        ratio = values[i] / (weights[i] * mids[i])
        y[i] = single(ratio if weights[i] > 0.0 else 0.0 * mids[i])


@inlined
def per_depth(what: int, sums: Words, p: Words, y: Singles) -> None:
    """A decayed sum in units of the decayed mean depth at the touch.

    `order_flow_imbalance`: of e_n (Cont, Kukanov, Stoikov 2014). `signed_trade_flow`: of signed trade sizes, as in
    Chordia, Roll, Subrahmanyam (2002), "Order imbalance, liquidity, and market returns".
    """
    s = sums[int(p[0])]
    for i in range(len(y)):
        depth = s[i + 1, DEPTH_SUM]
        ratio = s[i + 1, what] * s[i + 1, EVENTS_SUM] / depth
        y[i] = single(ratio if depth > NO_DEPTH else 0.0)


@inlined
def order_flow_imbalance_events(pos: int, seen: int, past: Words, p: Words, s: Words, y: Singles) -> None:
    """Sum of e_n over the last n events in units of their mean depth (Cont, Kukanov, Stoikov 2014).

    s = [sum of flows, of depths, events since both were summed afresh, which is done every n so that rounding never
    builds up]. `seen` counts the session's events before the tile.
    """
    n, done = int(p[0]), 0
    flows, depths = past[PAST_FLOW], past[PAST_DEPTH]
    new_flow, new_depth = flows[pos : pos + len(y)], depths[pos : pos + len(y)]
    old_flow, old_depth = flows[pos - n : pos - n + len(y)], depths[pos - n : pos - n + len(y)]
    flow, depth, since = s[0], s[1], int(s[2])
    while done < len(y):
        stop = min(len(y), done + n - since)
        for i in range(done, stop):
            flow += new_flow[i] - old_flow[i]
            depth += new_depth[i] - old_depth[i]
            ratio = flow * min(seen + i + 1, n) / depth
            y[i] = single(ratio if depth > 0.0 else 0.0)
        since += stop - done
        done = stop
        if since == n:
            since, flow, depth = 0, 0.0, 0.0
            for j in range(pos + done - n, pos + done):
                flow += flows[j]
                depth += depths[j]
    s[0], s[1], s[2] = flow, depth, since


@inlined
def realised_volatility(sums: Words, p: Words, y: Singles) -> None:
    """Square root of the decayed sum of squared log returns of the mid.

    Andersen, Bollerslev (1998), "Answering the Skeptics"; decays as RiskMetrics, in elapsed time.
    """
    s = sums[int(p[0])]
    for i in range(len(y)):
        y[i] = single(math.sqrt(s[i + 1, SQUARES_SUM]))


@inlined
def mid_return(x: Words, p: Words, s: Words, y: Singles) -> None:
    """Log return of the mid over a horizon in seconds, from the session's first mid until then.

    Samples are kept at least horizon / 64 seconds apart, so the memory is bounded at any event rate. The start is the
    newest sample as old as the horizon: the newest such event, or one at most horizon / 64 before that event. By
    that spacing the ring cannot overflow; were it to, the oldest sample would go.
    p = [horizon, horizon / 64]; s = [slot of the oldest, samples, time of the newest, -, times, values].
    """
    logs, now, horizon, spacing = x[LOG_MID], x[NOW], p[0], p[1]
    times = s[HORIZON_HEADER : HORIZON_HEADER + HORIZON_CAPACITY]
    values = s[HORIZON_HEADER + HORIZON_CAPACITY : HORIZON_HEADER + 2 * HORIZON_CAPACITY]
    oldest, samples, last = int(s[0]), int(s[1]), s[2]
    start, following = values[oldest], times[(oldest + 1) & (HORIZON_CAPACITY - 1)]
    for i in range(len(y)):
        value, time = logs[i], now[i]
        if value != value:
            y[i] = math.nan
            continue
        if samples == 0 or time - last >= spacing:
            slot = (oldest + samples) & (HORIZON_CAPACITY - 1)
            times[slot], values[slot], last = time, value, time
            samples += 1
            if samples == HORIZON_CAPACITY:
                oldest = (oldest + 1) & (HORIZON_CAPACITY - 1)
                samples -= 1
            start, following = values[oldest], times[(oldest + 1) & (HORIZON_CAPACITY - 1)]
        limit = time - horizon
        while samples > 1 and following <= limit:
            oldest = (oldest + 1) & (HORIZON_CAPACITY - 1)
            samples -= 1
            start, following = values[oldest], times[(oldest + 1) & (HORIZON_CAPACITY - 1)]
        y[i] = single(value - start)
    s[0], s[1], s[2] = oldest, samples, last


@inlined
def mid_return_events(pos: int, x: Words, past: Words, p: Words, y: Singles) -> None:
    """Log return of the mid over the last n events, from the session's first mid until then.

    For an earlier event without a mid the last one before it stands in.
    """
    lag, logs = int(p[0]), x[LOG_MID]
    before = past[PAST_LOG][pos - lag : pos - lag + len(y)]
    for i in range(len(y)):
        y[i] = single(logs[i] - before[i])


@inlined
def arrival_rate(what: int, sums: Words, p: Words, y: Singles) -> None:
    """Square root of the decayed arrivals per second; p = [tau's number, 1 / tau].

    An exponential-kernel intensity as in Bacry, Mastromatteo, Muzy (2015), "Hawkes processes in finance", under the
    root that steadies the variance of counts (Anscombe 1948).
    """
    s, rate = sums[int(p[0])], p[1]
    for i in range(len(y)):
        y[i] = single(math.sqrt(s[i + 1, what] * rate))


@inlined
def time_since_trade(x: Words, y: Singles) -> None:
    """log(1 + seconds since the last trade), or since the session began where there was none."""
    now, trade = x[NOW], x[TRADE_TIME]
    for i in range(len(y)):
        y[i] = single(log_positive(1.0 + (now[i] - trade[i])))


@inlined
def time_since_event(x: Words, y: Singles) -> None:
    """log(1 + seconds since the previous event); 0 at the first of a session."""
    dt = x[DT]
    for i in range(len(y)):
        y[i] = single(log_positive(1.0 + dt[i]))


@inlined
def time_of_day(second: float, cosine: bool, s: Words) -> float:
    """Sine or cosine of the UTC time of day as an angle, by the whole second. s = [value, second + 1 it is for]."""
    if s[1] != second + 1.0:
        angle = second * (2.0 * math.pi / DAY_S)
        s[0] = math.cos(angle) if cosine else math.sin(angle)
        s[1] = second + 1.0
    return s[0]


@inlined
def times_of_day(ts_ns: Longs, cosine: bool, s: Words, y: Singles) -> None:
    """`time_of_day` of every event."""
    begin, value = 0, 0.0
    for i in range(len(y)):
        if i == 0 or ts_ns[i] < begin or ts_ns[i] >= begin + SECOND_NS:
            begin = ts_ns[i] // SECOND_NS * SECOND_NS
            value = single(time_of_day(begin // SECOND_NS % DAY_S, cosine, s))
        y[i] = value


@inlined
def average_deviation(what: int, column: Words, moves: Words, p: Words, y: Singles) -> None:
    """A value less its exponential moving average in elapsed time (Eckner 2014), NaN where there is none.

    Of the relative spread, of the log depth at the touch, and of the log mid.
    """
    s = moves[int(p[0])]
    for i in range(len(y)):
        y[i] = single(s[i + 1, what] if column[i] == column[i] else math.nan)


@inlined
def trade_deviation(x: Words, y: Singles) -> None:
    """Log of the last trade's price less the log mid; 0 before the first trade of a session."""
    logs, trades = x[LOG_MID], x[LOG_TRADE]
    for i in range(len(y)):
        y[i] = single(trades[i] - logs[i] if trades[i] == trades[i] else 0.0)


@inlined
def update_book(  # noqa: C901 - a dispatch table
    kind: int, ts_ns: Longs, pos: int, seen: int, x: Words, book: Words, scratch: Words, past: Words, sums: Words,
    moves: Words, p: Words, s: Words, y: Singles,
) -> None:  # fmt: skip
    """The feature of `kind` (ids as in `catalog.BOOK_KINDS`) after each event of the tile."""
    if kind == 0:
        shared_column(x[MICRO], y)
    elif kind == 1:
        shared_column(x[SPREAD], y)
    elif kind == 2:
        level_imbalance(book, p, y)
    elif kind == 3:
        depth_imbalance(book, scratch, p, y)
    elif kind == 4:
        depth_weighted_deviation(x, book, scratch, p, y)
    elif kind == 5:
        per_depth(FLOW_SUM, sums, p, y)
    elif kind == 6:
        order_flow_imbalance_events(pos, seen, past, p, s, y)
    elif kind == 7:
        per_depth(SIGNED_SUM, sums, p, y)
    elif kind == 8:
        realised_volatility(sums, p, y)
    elif kind == 9:
        mid_return(x, p, s, y)
    elif kind == 10:
        mid_return_events(pos, x, past, p, y)
    elif kind == 11:
        arrival_rate(EVENTS_SUM, sums, p, y)
    elif kind == 12:
        arrival_rate(TRADES_SUM, sums, p, y)
    elif kind == 13:
        time_since_trade(x, y)
    elif kind == 14:
        time_since_event(x, y)
    elif kind == 15:
        times_of_day(ts_ns, False, s, y)
    elif kind == 16:
        times_of_day(ts_ns, True, s, y)
    elif kind == 17:
        average_deviation(1, x[SPREAD], moves, p, y)
    elif kind == 18:
        average_deviation(2, x[LOG_DEPTH], moves, p, y)
    elif kind == 19:
        average_deviation(0, x[LOG_MID], moves, p, y)
    elif kind == 20:
        trade_deviation(x, y)

"""What several book features share, computed once per event: prices, order flow, decays and decayed sums, as columns.

The features of a tile of events, which may be one event, are computed by passes over these columns. Letters:
n events of a tile, T distinct time constants.

x float64 [X_COLUMNS + max(T, 1), ROW]: the tile's columns, named below; then, per time constant, what an event's time
step leaves of the past, exp(-dt / tau). The columns of the quote start with the event before the tile.
book float64 [4 L, ROW]: the tile's levels, as in a row from column LEVEL_0 on, sizes cleaned.
past float64 [3, H + SPAN]: log mid, order flow and depth, of the tile and of at least H events before it.
sums float64 [T, TILE + 1, 8]: six decayed sums after each event, row 0 from before the tile.
moves float64 [T, TILE + 1, 4]: log mid, spread, log depth, each less its moving average; row 0 likewise.

Without a valid two-sided quote (a price absent, below 1e-300 or not finite) the mid is NaN; a quote without sizes
counts as one unit on each side, so that FX quotes give order flow in units of quotes, and imbalances of zero.
"""

# numpy types an element of a float64 array as Any; these functions return floats.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from typing import Final

from tickserve.events import EVENT, TRADE, TRADE_PRICE, TRADE_SIGN, TRADE_SIZE
from tickserve.features.elementary import SMALLEST, exp_minus, log_positive
from tickserve.features.jit import inlined
from tickserve.features.windows import Longs, Words

TILE: Final = 256
# Length of a tile's column; a power of two would put all columns in one set of the first-level cache.
ROW: Final = TILE + 24
# Events that `past` takes before its last H are moved to the front.
SPAN: Final = 4_096
NOW, DT, MID, SPREAD, MICRO, IS_TRADE, SIGNED, LOG_TRADE, TRADE_TIME, LOG_MID, LOG_DEPTH = range(11)
MID_MOVE, SPREAD_MOVE, DEPTH_MOVE, Q_BID, Q_BID_SIZE, Q_ASK, Q_ASK_SIZE, X_COLUMNS = range(11, 19)
PAST_LOG, PAST_FLOW, PAST_DEPTH, PAST_COLUMNS = range(4)
# Decayed sums of these; then what the moving averages are of.
FLOW_SUM, DEPTH_SUM, EVENTS_SUM, SIGNED_SUM, SQUARES_SUM, TRADES_SUM, SUMS = 0, 1, 2, 3, 4, 5, 8
MOVES: Final = 4
# Carried from event to event.
LAST_LOG, LAST_SPREAD, LAST_DEPTH, LAST_LOG_TRADE, LAST_TRADE, HAS_MID = range(6)
LEVEL_0: Final = 4
LARGEST_SIZE: Final = 1.7976931348623157e308
# Added at every event, so that a decayed sum of zeros stays clear of slow subnormal numbers; no float32 shows it.
FLOOR: Final = 1e-200


@inlined
def size_of(value: float) -> float:
    """A size as it counts: not finite or negative is none."""
    return value if (value > 0.0) & (value <= LARGEST_SIZE) else 0.0


@inlined
def is_price(value: float) -> bool:
    """Whether a price is there: positive and finite."""
    return (value >= SMALLEST) & (value <= LARGEST_SIZE)


@inlined
def open_session(carry: Words, x: Words, past: Words, sums: Words, moves: Words) -> None:
    """Forget all events before: nothing has happened, no quote and no trade is known."""
    carry[:] = 0.0
    for word in (LAST_LOG, LAST_SPREAD, LAST_DEPTH, LAST_LOG_TRADE):
        carry[word] = math.nan
    x[Q_BID, 0] = math.nan
    x[Q_ASK, 0] = math.nan
    past[:] = 0.0
    sums[:, 0] = 0.0
    moves[:, 0] = 0.0


@inlined
def _levels(values: Words, book: Words) -> None:
    """Rows to columns."""
    for i in range(len(values)):
        for level in range(len(book) // 4):
            column = 4 * level
            book[column, i] = values[i, LEVEL_0 + column]
            book[column + 1, i] = size_of(values[i, LEVEL_0 + column + 1])
            book[column + 2, i] = values[i, LEVEL_0 + column + 2]
            book[column + 3, i] = size_of(values[i, LEVEL_0 + column + 3])


@inlined
def _quotes(n: int, book: Words, x: Words, depth: Words) -> None:
    """The quote as it counts, and its mid, spread, microprice and depth."""
    bids, bid_sizes, asks, ask_sizes = x[Q_BID][1:], x[Q_BID_SIZE][1:], x[Q_ASK][1:], x[Q_ASK_SIZE][1:]
    mids, spreads, micros = x[MID], x[SPREAD], x[MICRO]
    raw_bids, raw_bid_sizes, raw_asks, raw_ask_sizes = book[0], book[1], book[2], book[3]
    for i in range(n):
        bid = raw_bids[i] if is_price(raw_bids[i]) else math.nan
        ask = raw_asks[i] if is_price(raw_asks[i]) else math.nan
        sizeless = raw_bid_sizes[i] + raw_ask_sizes[i] == 0.0
        bid_size = (1.0 if bid == bid else 0.0) if sizeless else raw_bid_sizes[i]
        ask_size = (1.0 if ask == ask else 0.0) if sizeless else raw_ask_sizes[i]
        bids[i], bid_sizes[i], asks[i], ask_sizes[i] = bid, bid_size, ask, ask_size
        mid = 0.5 * (bid + ask)
        mid = mid if mid <= LARGEST_SIZE else math.nan
        spread = (ask - bid) / mid
        mids[i] = mid
        spreads[i] = spread
        micros[i] = 0.5 * spread * ((bid_size - ask_size) / (bid_size + ask_size))
        depth[i] = 0.5 * (bid_size + ask_size)


@inlined
def _flows(n: int, x: Words, flow: Words) -> None:
    """e_n of Cont, Kukanov, Stoikov (2014), "The Price Impact of Order Book Events", J. Financial Econometrics 12(1).

    A side that is absent now or was absent before adds nothing. Leaves the last quote before the next tile's.
    """
    bids, bid_sizes, asks, ask_sizes = x[Q_BID], x[Q_BID_SIZE], x[Q_ASK], x[Q_ASK_SIZE]
    for i in range(n):
        more = (bid_sizes[i + 1] if bids[i + 1] >= bids[i] else 0.0) + (ask_sizes[i] if asks[i + 1] >= asks[i] else 0.0)
        less = (bid_sizes[i] if bids[i + 1] <= bids[i] else 0.0) + (ask_sizes[i + 1] if asks[i + 1] <= asks[i] else 0.0)
        flow[i] = more - less
    bids[0], bid_sizes[0], asks[0], ask_sizes[0] = bids[n], bid_sizes[n], asks[n], ask_sizes[n]


@inlined
def _trades(values: Words, carry: Words, x: Words) -> None:
    """The last trade's log price and time. One without a side is signed by the quote rule of Lee and Ready (1991)."""
    last_log, last_time = carry[LAST_LOG_TRADE], carry[LAST_TRADE]
    for i in range(len(values)):
        is_trade, signed = 0.0, 0.0
        if values[i, EVENT] == TRADE:
            is_trade, last_time = 1.0, x[NOW, i]
            price, sign, mid = values[i, TRADE_PRICE], values[i, TRADE_SIGN], x[MID, i]
            if is_price(price):
                last_log = log_positive(price)
                if sign == 0.0:
                    sign = 1.0 if price > mid else (-1.0 if price < mid else 0.0)
                signed = sign * size_of(values[i, TRADE_SIZE]) if math.isfinite(sign) else 0.0
        x[IS_TRADE, i] = is_trade
        x[SIGNED, i] = signed
        x[LOG_TRADE, i] = last_log
        x[TRADE_TIME, i] = last_time
    carry[LAST_LOG_TRADE], carry[LAST_TRADE] = last_log, last_time


@inlined
def _changes(column: Words, last: float, change: Words, held: Words) -> float:
    """Changes of a column between its valid values, 0 where there is none; `held` takes the last valid one."""
    for i in range(len(column)):
        value = column[i]
        step = value - last
        change[i] = step if step == step else 0.0
        last = value if value == value else last
        held[i] = last
    return last


@inlined
def _log_mids(n: int, pos: int, carry: Words, x: Words, past: Words) -> None:
    """Log mid and its changes. The past takes the last valid one; before a session's first, that first."""
    logs, held = x[LOG_MID][:n], past[PAST_LOG][pos : pos + n]
    for i in range(n):
        logs[i] = log_positive(x[MID, i])
    carry[LAST_LOG] = _changes(logs, carry[LAST_LOG], x[MID_MOVE], held)
    if carry[HAS_MID] == 0.0:
        first = 0
        while first < n and logs[first] != logs[first]:
            first += 1
        if first < n:
            past[PAST_LOG][: pos + first] = logs[first]
            carry[HAS_MID] = 1.0


@inlined
def _decayed_sums(kept: Words, x: Words, flow: Words, depth: Words, s: Words) -> None:
    """Decayed sums [n + 1, 8] in elapsed time after Eckner (2014), "Algorithms for Unevenly Spaced Time Series"."""
    signed, move, trade = x[SIGNED], x[MID_MOVE], x[IS_TRADE]
    a, b, c, d, e, f = s[0, 0], s[0, 1], s[0, 2], s[0, 3], s[0, 4], s[0, 5]
    for i in range(len(kept)):
        k = kept[i]
        a = a * k + (flow[i] + FLOOR)
        b = b * k + (depth[i] + FLOOR)
        c = c * k + 1.0
        d = d * k + (signed[i] + FLOOR)
        e = e * k + (move[i] * move[i] + FLOOR)
        f = f * k + (trade[i] + FLOOR)
        s[i + 1, 0] = a
        s[i + 1, 1] = b
        s[i + 1, 2] = c
        s[i + 1, 3] = d
        s[i + 1, 4] = e
        s[i + 1, 5] = f


@inlined
def _decayed_moves(kept: Words, x: Words, s: Words) -> None:
    """Values less their exponential moving averages in elapsed time, [n + 1, 4]: changes, faded by what time leaves.

    While a value is absent its last one stands in for it.
    """
    mid, spread, depth = x[MID_MOVE], x[SPREAD_MOVE], x[DEPTH_MOVE]
    a, b, c = s[0, 0], s[0, 1], s[0, 2]
    for i in range(len(kept)):
        k = kept[i]
        a = (a + (mid[i] + FLOOR)) * k
        b = (b + (spread[i] + FLOOR)) * k
        c = (c + (depth[i] + FLOOR)) * k
        s[i + 1, 0] = a
        s[i + 1, 1] = b
        s[i + 1, 2] = c


@inlined
def stage_book(
    n: int, values: Words, pos: int, uses: Longs, rates: Words, carry: Words, x: Words, book: Words, past: Words,
    sums: Words, moves: Words,
) -> None:  # fmt: skip
    """Fill everything shared for the n events of a tile; their clock (NOW, DT) is in `x` already.

    `uses` [T] says for each rate, 1 / tau, whether its decayed sums (1), its moving averages (2) or both are needed.
    """
    flow, depth = past[PAST_FLOW][pos : pos + n], past[PAST_DEPTH][pos : pos + n]
    _levels(values, book)
    _quotes(n, book, x, depth)
    _flows(n, x, flow)
    _trades(values, carry, x)
    _log_mids(n, pos, carry, x, past)
    log_depth, spread = x[LOG_DEPTH][:n], x[SPREAD][:n]
    for i in range(n):
        log_depth[i] = log_positive(depth[i])
    scratch = x[X_COLUMNS]
    carry[LAST_SPREAD] = _changes(spread, carry[LAST_SPREAD], x[SPREAD_MOVE], scratch)
    carry[LAST_DEPTH] = _changes(log_depth, carry[LAST_DEPTH], x[DEPTH_MOVE], scratch)
    dt = x[DT][:n]
    for t in range(len(rates)):
        rate, kept = rates[t], x[X_COLUMNS + t][:n]
        for i in range(n):
            kept[i] = exp_minus(dt[i] * rate)
        if uses[t] & 1:
            _decayed_sums(kept, x, flow, depth, sums[t])
        if uses[t] & 2:
            _decayed_moves(kept, x, moves[t])

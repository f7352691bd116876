"""What several book features share, computed once per event: prices, order flow, decays and decayed sums, as columns.

The features of a tile of events, which may be one event, are computed by passes over these columns. Letters:
n events of a tile, T distinct time constants.

x float64 [X_COLUMNS + T, TILE]: the tile's columns, named below; then, per time constant, what an event's time step
leaves of the past, exp(-dt / tau).
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

TILE: Final = 512
# Events that `past` takes before its last H are moved to the front.
SPAN: Final = 4_096
NOW, DT, MID, SPREAD, MICRO, IS_TRADE, SIGNED, LOG_TRADE, TRADE_TIME, LOG_MID, LOG_DEPTH = range(11)
MID_MOVE, SPREAD_MOVE, DEPTH_MOVE, X_COLUMNS = range(11, 15)
PAST_LOG, PAST_FLOW, PAST_DEPTH, PAST_COLUMNS = range(4)
# Decayed sums of these; then what the moving averages are of.
FLOW_SUM, DEPTH_SUM, EVENTS_SUM, SIGNED_SUM, SQUARES_SUM, TRADES_SUM, SUMS = 0, 1, 2, 3, 4, 5, 8
MOVES: Final = 4
# Carried from event to event.
BID, BID_SIZE, ASK, ASK_SIZE, LAST_LOG, LAST_SPREAD, LAST_DEPTH, LAST_LOG_TRADE, LAST_TRADE, HAS_MID = range(10)
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
def open_session(carry: Words, past: Words, sums: Words, moves: Words) -> None:
    """Forget all events before: nothing has happened, no quote and no trade is known."""
    carry[:] = 0.0
    for word in (BID, ASK, LAST_LOG, LAST_SPREAD, LAST_DEPTH, LAST_LOG_TRADE):
        carry[word] = math.nan
    past[:] = 0.0
    sums[:, 0] = 0.0
    moves[:, 0] = 0.0


@inlined
def _quotes(values: Words, carry: Words, x: Words, flow: Words, depth: Words) -> None:
    """Mid, spread, microprice, depth; and e_n of Cont, Kukanov, Stoikov (2014), "The Price Impact of Order Book Events".

    J. Financial Econometrics 12(1). A side that is absent now or was absent before adds nothing to the flow.
    """
    last_bid, last_bid_size, last_ask, last_ask_size = carry[BID], carry[BID_SIZE], carry[ASK], carry[ASK_SIZE]
    mids, spreads, micros = x[MID], x[SPREAD], x[MICRO]
    for i in range(len(values)):
        bid, ask = values[i, LEVEL_0], values[i, LEVEL_0 + 2]
        bid_size, ask_size = size_of(values[i, LEVEL_0 + 1]), size_of(values[i, LEVEL_0 + 3])
        bid = bid if is_price(bid) else math.nan
        ask = ask if is_price(ask) else math.nan
        sizeless = bid_size + ask_size == 0.0
        bid_size = (1.0 if bid == bid else 0.0) if sizeless else bid_size
        ask_size = (1.0 if ask == ask else 0.0) if sizeless else ask_size
        mid = 0.5 * (bid + ask)
        mid = mid if mid <= LARGEST_SIZE else math.nan
        mids[i] = mid
        spreads[i] = (ask - bid) / mid
        micros[i] = 0.5 * spreads[i] * ((bid_size - ask_size) / (bid_size + ask_size))
        depth[i] = 0.5 * (bid_size + ask_size)
        more = (bid_size if bid >= last_bid else 0.0) + (last_ask_size if ask >= last_ask else 0.0)
        less = (last_bid_size if bid <= last_bid else 0.0) + (ask_size if ask <= last_ask else 0.0)
        flow[i] = more - less
        last_bid, last_bid_size, last_ask, last_ask_size = bid, bid_size, ask, ask_size
    carry[BID], carry[BID_SIZE], carry[ASK], carry[ASK_SIZE] = last_bid, last_bid_size, last_ask, last_ask_size


@inlined
def _trades(values: Words, carry: Words, x: Words) -> None:
    """The last trade's log price and time. Without a side from the venue the quote rule of Lee, Ready (1991) signs it."""
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
    n: int, values: Words, pos: int, uses: Longs, rates: Words, carry: Words, x: Words, past: Words, sums: Words,
    moves: Words,
) -> None:  # fmt: skip
    """Fill everything shared for the n events of a tile; their clock (NOW, DT) is in `x` already.

    `uses` [T] says for each rate, 1 / tau, whether its decayed sums (1), its moving averages (2) or both are needed.
    """
    flow, depth = past[PAST_FLOW][pos : pos + n], past[PAST_DEPTH][pos : pos + n]
    _quotes(values, carry, x, flow, depth)
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

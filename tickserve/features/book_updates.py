"""Order book features: what every event yields (`derive_book`), and one update function per kind.

An update function reads the derived values `x`, the event's `row`, its parameters `p` and its state `s`, and returns
the feature after this event. Without a valid two-sided quote (a price absent, zero, negative or not finite) features
of the mid are NaN and their state waits; a quote without sizes counts as one unit on each side, so that FX quotes give
order flow in units of quotes, and imbalances of zero.

L: levels; level k (from 0) of a row starts at column 4 + 4k with bid price, bid size, ask price, ask size.
"""

# numpy types an element of a float64 array as Any; these functions return floats.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from typing import Final

from tickserve.events import EVENT, TRADE, TRADE_PRICE, TRADE_SIGN, TRADE_SIZE
from tickserve.features.jit import inlined
from tickserve.features.windows import Words, decay, deviation, faded, horizon_start, lagged, rolled, turn

NOW, DT, LOG_MID, MID, RETURN, SPREAD, MICRO, FLOW, DEPTH, IS_TRADE, SIGNED, LOG_TRADE, SECOND = range(13)
# What is carried from event to event, after the derived values: the last valid mid and its log, the previous quote.
LAST_MID, LAST_LOG, BID, BID_SIZE, ASK, ASK_SIZE = range(6)
LEVEL_0: Final = 4
DAY_S: Final = 86_400
SECOND_NS: Final = 1_000_000_000


@inlined
def _size(value: float) -> float:
    """A size as it counts: not finite or negative is none."""
    return value if math.isfinite(value) and value > 0.0 else 0.0


@inlined
def _is_price(value: float) -> bool:
    return math.isfinite(value) and value > 0.0


@inlined
def _quote_flow(bid: float, bid_size: float, ask: float, ask_size: float, carry: Words) -> float:
    """e_n of Cont, Kukanov, Stoikov (2014), "The Price Impact of Order Book Events", J. Financial Econometrics 12(1).

    A side that is absent now or was absent before adds nothing.
    """
    flow = 0.0
    if bid >= carry[BID]:
        flow += bid_size
    if bid <= carry[BID]:
        flow -= carry[BID_SIZE]
    if ask <= carry[ASK]:
        flow -= ask_size
    if ask >= carry[ASK]:
        flow += carry[ASK_SIZE]
    return flow


@inlined
def _trade(row: Words, mid: float, valid: bool, x: Words) -> None:
    """The trade's part of `x`. Without a side from the venue the quote rule of Lee and Ready (1991) signs it."""
    x[IS_TRADE] = 0.0
    x[SIGNED] = 0.0
    x[LOG_TRADE] = math.nan
    if row[EVENT] != TRADE:
        return
    x[IS_TRADE] = 1.0
    price = row[TRADE_PRICE]
    sign = row[TRADE_SIGN]
    if not _is_price(price):
        return
    x[LOG_TRADE] = math.log(price)
    if sign == 0.0 and valid:
        sign = 1.0 if price > mid else (-1.0 if price < mid else 0.0)
    if math.isfinite(sign):
        x[SIGNED] = sign * _size(row[TRADE_SIZE])


@inlined
def derive_book(ts_ns: int, now: float, dt: float, first: bool, row: Words, carry: Words, x: Words) -> None:
    """Fill `x` from the event and what `carry` holds of the ones before; `now`, `dt` in seconds of this session.

    RETURN is the log change of the mid since the last valid one; MICRO the deviation of the size-weighted mid.
    """
    if first:
        carry[LAST_MID] = 0.0
        carry[BID] = math.nan
        carry[ASK] = math.nan
    bid, bid_size, ask, ask_size = row[LEVEL_0], _size(row[LEVEL_0 + 1]), row[LEVEL_0 + 2], _size(row[LEVEL_0 + 3])
    has_bid, has_ask = _is_price(bid), _is_price(ask)
    if bid_size == 0.0 and ask_size == 0.0:
        bid_size = 1.0 if has_bid else 0.0
        ask_size = 1.0 if has_ask else 0.0
    bid = bid if has_bid else math.nan
    ask = ask if has_ask else math.nan
    mid = 0.5 * (bid + ask)
    valid = has_bid and has_ask and math.isfinite(mid)
    x[NOW] = now
    x[DT] = dt
    x[RETURN] = 0.0
    if valid:
        if mid != carry[LAST_MID]:
            log_mid = math.log(mid)
            if carry[LAST_MID] > 0.0:
                x[RETURN] = log_mid - carry[LAST_LOG]
            carry[LAST_MID] = mid
            carry[LAST_LOG] = log_mid
        x[MID] = mid
        x[LOG_MID] = carry[LAST_LOG]
        x[SPREAD] = (ask - bid) / mid
        x[MICRO] = 0.5 * x[SPREAD] * (bid_size - ask_size) / (bid_size + ask_size)
    else:
        x[MID] = math.nan
        x[LOG_MID] = math.nan
        x[SPREAD] = math.nan
        x[MICRO] = math.nan
    x[FLOW] = _quote_flow(bid, bid_size, ask, ask_size, carry)
    x[DEPTH] = 0.5 * (bid_size + ask_size)
    carry[BID] = bid
    carry[BID_SIZE] = bid_size
    carry[ASK] = ask
    carry[ASK_SIZE] = ask_size
    _trade(row, mid, valid, x)
    x[SECOND] = (ts_ns // SECOND_NS) % DAY_S


@inlined
def microprice_deviation(x: Words) -> float:
    """(microprice - mid) / mid, with the size-weighted mid.

    The first approximation in Stoikov (2018), "The micro-price: a high-frequency estimator of future prices",
    Quantitative Finance 18(12).
    """
    return x[MICRO]


@inlined
def relative_spread(x: Words) -> float:
    """(ask - bid) / mid; negative where the venue's quotes cross."""
    return x[SPREAD]


@inlined
def level_imbalance(row: Words, p: Words) -> float:
    """(bid size - ask size) / (bid size + ask size) at one level, 0 where neither side has a size.

    Cartea, Donnelly, Jaimungal (2018), "Enhancing trading strategies with order book signals".
    """
    column = LEVEL_0 + 4 * (int(p[0]) - 1)
    bid, ask = _size(row[column + 1]), _size(row[column + 3])
    return (bid - ask) / (bid + ask) if bid + ask > 0.0 else 0.0


@inlined
def depth_imbalance(row: Words, p: Words) -> float:
    """As `level_imbalance`, over the sizes of the best levels added up."""
    bids, asks = 0.0, 0.0
    for level in range(int(p[0])):
        bids += _size(row[LEVEL_0 + 4 * level + 1])
        asks += _size(row[LEVEL_0 + 4 * level + 3])
    return (bids - asks) / (bids + asks) if bids + asks > 0.0 else 0.0


@inlined
def depth_weighted_deviation(x: Words, row: Words, p: Words) -> float:
    """The size-weighted price of both sides' best levels against the mid, relative; 0 without sizes.

    Cao, Hansch, Wang (2009), "The information content of an open limit-order book", J. Futures Markets 29(1).
    """
    value, size = 0.0, 0.0
    for level in range(int(p[0])):
        column = LEVEL_0 + 4 * level
        for side in (column, column + 2):
            if _is_price(row[side]):
                weight = _size(row[side + 1])
                value += weight * (row[side] - x[MID])
                size += weight
    if size > 0.0:
        return value / size / x[MID]
    return 0.0 * x[MID]


@inlined
def order_flow_imbalance(x: Words, p: Words, s: Words) -> float:
    """Decayed sum of e_n in units of the decayed mean depth at the touch (Cont, Kukanov, Stoikov 2014)."""
    kept = decay(x[DT], p[0])
    s[0] = faded(s[0], kept) + x[FLOW]
    s[1] = faded(s[1], kept) + x[DEPTH]
    s[2] = faded(s[2], kept) + 1.0
    return s[0] * s[2] / s[1] if s[1] > 0.0 else 0.0


@inlined
def order_flow_imbalance_events(x: Words, p: Words, s: Words) -> float:
    """Sum of e_n over the last n events in units of their mean depth (Cont, Kukanov, Stoikov 2014)."""
    n = int(p[0])
    slot = turn(s, n)
    flow = rolled(x[FLOW], s, n, slot, 2, 4)
    depth = rolled(x[DEPTH], s, n, slot, 3, 4 + n)
    return flow * s[1] / depth if depth > 0.0 else 0.0


@inlined
def signed_trade_flow(x: Words, p: Words, s: Words) -> float:
    """Decayed sum of signed trade sizes in units of the decayed mean depth at the touch.

    Trade imbalance as in Chordia, Roll, Subrahmanyam (2002), "Order imbalance, liquidity, and market returns".
    """
    kept = decay(x[DT], p[0])
    s[0] = faded(s[0], kept) + x[SIGNED]
    s[1] = faded(s[1], kept) + x[DEPTH]
    s[2] = faded(s[2], kept) + 1.0
    return s[0] * s[2] / s[1] if s[1] > 0.0 else 0.0


@inlined
def realised_volatility(x: Words, p: Words, s: Words) -> float:
    """Square root of the decayed sum of squared log returns of the mid.

    Andersen, Bollerslev (1998), "Answering the Skeptics"; decays as RiskMetrics, in elapsed time.
    """
    s[0] = faded(s[0], decay(x[DT], p[0])) + x[RETURN] * x[RETURN]
    return math.sqrt(s[0])


@inlined
def mid_return(x: Words, p: Words, s: Words) -> float:
    """Log return of the mid over a horizon in seconds, exact to a sixty-fourth of it (`horizon_start`)."""
    if not math.isfinite(x[LOG_MID]):
        return math.nan
    return x[LOG_MID] - horizon_start(x[LOG_MID], x[NOW], p[0], s)


@inlined
def mid_return_events(x: Words, p: Words, s: Words) -> float:
    """Log return of the mid over the last n events that had one; fewer at the start of a session."""
    if not math.isfinite(x[LOG_MID]):
        return math.nan
    return x[LOG_MID] - lagged(x[LOG_MID], s, int(p[0]))


@inlined
def arrival_rate(weight: float, x: Words, p: Words, s: Words) -> float:
    """Square root of the decayed arrivals per second.

    An exponential-kernel intensity as in Bacry, Mastromatteo, Muzy (2015), "Hawkes processes in finance", under the
    root that steadies the variance of counts (Anscombe 1948).
    """
    s[0] = faded(s[0], decay(x[DT], p[0])) + weight
    return math.sqrt(s[0] * p[0])


@inlined
def time_since_trade(x: Words, s: Words) -> float:
    """log(1 + seconds since the last trade), or since the session began where there was none."""
    if x[IS_TRADE] != 0.0:
        s[0] = x[NOW]
    return math.log(1.0 + (x[NOW] - s[0]))


@inlined
def time_since_event(x: Words) -> float:
    """log(1 + seconds since the previous event); 0 at the first of a session."""
    return math.log(1.0 + x[DT])


@inlined
def time_of_day(second: float, cosine: bool, s: Words) -> float:
    """Sine or cosine of the UTC time of day as an angle, by the whole second. s = [value, second + 1 it is for]."""
    if s[1] != second + 1.0:
        angle = second * (2.0 * math.pi / DAY_S)
        s[0] = math.cos(angle) if cosine else math.sin(angle)
        s[1] = second + 1.0
    return s[0]


@inlined
def spread_deviation(x: Words, p: Words, s: Words) -> float:
    """Relative spread less its moving average in elapsed time (Eckner 2014)."""
    return deviation(x[SPREAD], x[NOW], p[0], s)


@inlined
def depth_deviation(x: Words, p: Words, s: Words) -> float:
    """Log depth at the touch less its moving average in elapsed time (Eckner 2014)."""
    return deviation(math.log(x[DEPTH]) if x[DEPTH] > 0.0 else math.nan, x[NOW], p[0], s)


@inlined
def mid_deviation(x: Words, p: Words, s: Words) -> float:
    """Log mid less its moving average in elapsed time (Eckner 2014)."""
    return deviation(x[LOG_MID], x[NOW], p[0], s)


@inlined
def trade_deviation(x: Words, s: Words) -> float:
    """Log of the last trade's price less the log mid; 0 before the first trade of a session."""
    if math.isfinite(x[LOG_TRADE]):
        s[0] = x[LOG_TRADE]
        s[1] = 1.0
    return s[0] - x[LOG_MID] if s[1] != 0.0 else 0.0


@inlined
def update_book(kind: int, x: Words, row: Words, p: Words, s: Words) -> float:  # noqa: C901 - a dispatch table
    """The feature of `kind` (ids as in `catalog.BOOK_KINDS`) after this event."""
    if kind == 0:
        return microprice_deviation(x)
    if kind == 1:
        return relative_spread(x)
    if kind == 2:
        return level_imbalance(row, p)
    if kind == 3:
        return depth_imbalance(row, p)
    if kind == 4:
        return depth_weighted_deviation(x, row, p)
    if kind == 5:
        return order_flow_imbalance(x, p, s)
    if kind == 6:
        return order_flow_imbalance_events(x, p, s)
    if kind == 7:
        return signed_trade_flow(x, p, s)
    if kind == 8:
        return realised_volatility(x, p, s)
    if kind == 9:
        return mid_return(x, p, s)
    if kind == 10:
        return mid_return_events(x, p, s)
    if kind == 11:
        return arrival_rate(1.0, x, p, s)
    if kind == 12:
        return arrival_rate(x[IS_TRADE], x, p, s)
    if kind == 13:
        return time_since_trade(x, s)
    if kind == 14:
        return time_since_event(x)
    if kind == 15:
        return time_of_day(x[SECOND], False, s)
    if kind == 16:
        return time_of_day(x[SECOND], True, s)
    if kind == 17:
        return spread_deviation(x, p, s)
    if kind == 18:
        return depth_deviation(x, p, s)
    if kind == 19:
        return mid_deviation(x, p, s)
    if kind == 20:
        return trade_deviation(x, s)
    return math.nan

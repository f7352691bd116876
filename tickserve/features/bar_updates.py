"""Bar features: what every bar yields (`derive_bar`), and one update function per kind, each with its source.

Same shape as `book_updates.py`. Windows count bars, and until a window is full they are as long as the session so far.
A bar with a price that is absent or not positive gives NaN and leaves all state as it was. Features of volume are 0
where a venue reports none.
"""

# numpy types an element of a float64 array as Any; these functions return floats.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math

from tickserve.events import CLOSE, HIGH, LOW, OPEN, VOLUME
from tickserve.features.book_updates import DAY_S, SECOND_NS, time_of_day
from tickserve.features.jit import inlined
from tickserve.features.windows import Words, lagged, rolled, turn

NOW, DT, PX_OPEN, PX_HIGH, PX_LOW, PX_CLOSE, TRADED, LOG_CLOSE, RETURN, GAP, TRUE_RANGE, SECOND, VALID = range(13)
LAST_CLOSE, LAST_LOG = range(2)
LN_2_X_4 = 4.0 * math.log(2.0)


@inlined
def derive_bar(ts_ns: int, now: float, dt: float, first: bool, row: Words, carry: Words, x: Words) -> None:
    """Fill `x` from the bar and the last valid close in `carry`.

    RETURN and GAP are log changes from that close to this close and open; TRUE_RANGE is Wilder's (1978), in price.
    """
    if first:
        carry[LAST_CLOSE] = 0.0
    o, h, low, c, v = row[OPEN], row[HIGH], row[LOW], row[CLOSE], row[VOLUME]
    valid = math.isfinite(o + h + low + c) and o > 0.0 and h > 0.0 and low > 0.0 and c > 0.0
    x[NOW] = now
    x[DT] = dt
    x[SECOND] = (ts_ns // SECOND_NS) % DAY_S
    x[VALID] = 1.0 if valid else 0.0
    if not valid:
        return
    x[PX_OPEN] = o
    x[PX_HIGH] = h
    x[PX_LOW] = low
    x[PX_CLOSE] = c
    x[TRADED] = v if math.isfinite(v) and v > 0.0 else 0.0
    x[LOG_CLOSE] = math.log(c)
    last = carry[LAST_CLOSE]
    x[RETURN] = x[LOG_CLOSE] - carry[LAST_LOG] if last > 0.0 else 0.0
    x[GAP] = math.log(o) - carry[LAST_LOG] if last > 0.0 else 0.0
    x[TRUE_RANGE] = max(h, last) - min(low, last) if last > 0.0 else h - low
    carry[LAST_CLOSE] = c
    carry[LAST_LOG] = x[LOG_CLOSE]


@inlined
def bar_return(x: Words, p: Words, s: Words) -> float:
    """Log return over n bars; momentum, Jegadeesh and Titman (1993)."""
    return x[LOG_CLOSE] - lagged(x[LOG_CLOSE], s, int(p[0]))


@inlined
def _mean_square_root(value: float, p: Words, s: Words) -> float:
    """Square root of the mean of the last n values, 0 where their mean is not above 0."""
    n = int(p[0])
    mean = rolled(value, s, n, turn(s, n), 2, 4) / s[1]
    return math.sqrt(mean) if mean > 0.0 else 0.0


@inlined
def bar_volatility(x: Words, p: Words, s: Words) -> float:
    """Root mean square log return: Andersen, Bollerslev (1998), "Answering the Skeptics"."""
    return _mean_square_root(x[RETURN] * x[RETURN], p, s)


@inlined
def average_true_range(x: Words, p: Words, s: Words) -> float:
    """Wilder (1978), "New Concepts in Technical Trading Systems": smoothed true range, over the close."""
    s[1] += 1.0 if s[1] < p[0] else 0.0
    s[0] += (x[TRUE_RANGE] - s[0]) / s[1]
    return s[0] / x[PX_CLOSE]


@inlined
def relative_strength_index(x: Words, p: Words, s: Words) -> float:
    """Wilder (1978): smoothed gains / (gains + losses), here in [-1, 1]; 0 without a move."""
    s[2] += 1.0 if s[2] < p[0] else 0.0
    s[0] += (max(x[RETURN], 0.0) - s[0]) / s[2]
    s[1] += (max(-x[RETURN], 0.0) - s[1]) / s[2]
    return (s[0] - s[1]) / (s[0] + s[1]) if s[0] + s[1] > 0.0 else 0.0


@inlined
def macd(x: Words, p: Words, s: Words) -> float:
    """Appel (1979): fast less slow exponential moving average of the close, over the close."""
    if s[3] == 0.0:
        s[0] = x[PX_CLOSE]
        s[1] = x[PX_CLOSE]
        s[3] = 1.0
    s[0] += 2.0 / (p[0] + 1.0) * (x[PX_CLOSE] - s[0])
    s[1] += 2.0 / (p[1] + 1.0) * (x[PX_CLOSE] - s[1])
    return (s[0] - s[1]) / x[PX_CLOSE]


@inlined
def macd_histogram(x: Words, p: Words, s: Words) -> float:
    """Appel (1986): the MACD less its own exponential moving average (the signal line)."""
    line = macd(x, p, s)
    s[2] += 2.0 / (p[2] + 1.0) * (line - s[2])
    return line - s[2]


@inlined
def _mean(s: Words) -> float:
    """Mean of a ring at s[4:], of which s[1] values are filled."""
    total = 0.0
    for j in range(int(s[1])):
        total += s[4 + j]
    return total / s[1]


@inlined
def _moment(s: Words, mean: float, power: int) -> float:
    """Mean of (value - mean)^power over that ring; power 2 or 3."""
    total = 0.0
    for j in range(int(s[1])):
        away = s[4 + j] - mean
        total += away * away * (away if power == 3 else 1.0)
    return total / s[1]


@inlined
def _standard_score(value: float, p: Words, s: Words) -> float:
    """(value - mean) / standard deviation over the last n values, this one included; 0 where they are all equal."""
    slot = turn(s, int(p[0]))
    s[4 + slot] = value
    mean = _mean(s)
    spread = math.sqrt(_moment(s, mean, 2))
    return (value - mean) / spread if spread > 1e-12 * abs(mean) else 0.0


@inlined
def bollinger_position(x: Words, p: Words, s: Words) -> float:
    """Bollinger (2001), "Bollinger on Bollinger Bands": place in the band of two standard deviations, -1 to 1."""
    return 0.5 * _standard_score(x[PX_CLOSE], p, s)


@inlined
def volume_zscore(x: Words, p: Words, s: Words) -> float:
    """Standard score of the volume; abnormal volume as in Gervais, Kaniel, Mingelgrin (2001)."""
    return _standard_score(x[TRADED], p, s)


@inlined
def stochastic_k(x: Words, p: Words, s: Words) -> float:
    """Lane (1984), "Lane's Stochastics": the close's place in the range of n bars, -1 to 1."""
    n = int(p[0])
    slot = turn(s, n)
    s[4 + slot] = x[PX_HIGH]
    s[4 + n + slot] = x[PX_LOW]
    high, low = x[PX_HIGH], x[PX_LOW]
    for j in range(int(s[1])):
        high = max(high, s[4 + j])
        low = min(low, s[4 + n + j])
    return 2.0 * (x[PX_CLOSE] - low) / (high - low) - 1.0 if high > low else 0.0


@inlined
def vwap_deviation(x: Words, p: Words, s: Words) -> float:
    """Log of the close over the volume-weighted typical price of n bars: Berkowitz, Logue, Noser (1988)."""
    n = int(p[0])
    slot = turn(s, n)
    money = rolled((x[PX_HIGH] + x[PX_LOW] + x[PX_CLOSE]) / 3.0 * x[TRADED], s, n, slot, 2, 4)
    volume = rolled(x[TRADED], s, n, slot, 3, 4 + n)
    return x[LOG_CLOSE] - math.log(money / volume) if volume > 0.0 and money > 0.0 else 0.0


@inlined
def obv_slope(x: Words, p: Words, s: Words) -> float:
    """Granville (1963): change of the on-balance volume over n bars, as a share of their volume."""
    n = int(p[0])
    slot = turn(s, n)
    sign = 1.0 if x[RETURN] > 0.0 else (-1.0 if x[RETURN] < 0.0 else 0.0)
    signed = rolled(sign * x[TRADED], s, n, slot, 2, 4)
    volume = rolled(x[TRADED], s, n, slot, 3, 4 + n)
    return signed / volume if volume > 0.0 else 0.0


@inlined
def parkinson_volatility(x: Words, p: Words, s: Words) -> float:
    """Parkinson (1980), "The extreme value method for estimating the variance of the rate of return"."""
    span = math.log(x[PX_HIGH] / x[PX_LOW])
    return _mean_square_root(span * span / LN_2_X_4, p, s)


@inlined
def garman_klass_volatility(x: Words, p: Words, s: Words) -> float:
    """Garman, Klass (1980), "On the estimation of security price volatilities from historical data"."""
    span = math.log(x[PX_HIGH] / x[PX_LOW])
    body = math.log(x[PX_CLOSE] / x[PX_OPEN])
    return _mean_square_root(0.5 * span * span - (2.0 * math.log(2.0) - 1.0) * body * body, p, s)


@inlined
def rogers_satchell_volatility(x: Words, p: Words, s: Words) -> float:
    """Rogers, Satchell (1991), "Estimating variance from high, low and closing prices"."""
    upper = math.log(x[PX_HIGH] / x[PX_CLOSE]) * math.log(x[PX_HIGH] / x[PX_OPEN])
    lower = math.log(x[PX_LOW] / x[PX_CLOSE]) * math.log(x[PX_LOW] / x[PX_OPEN])
    return _mean_square_root(upper + lower, p, s)


@inlined
def close_location(x: Words) -> float:
    """Close location value, Chaikin (1978), as in Achelis (2000): -1 at the low, 1 at the high, 0 for a flat bar."""
    return (
        ((x[PX_CLOSE] - x[PX_LOW]) - (x[PX_HIGH] - x[PX_CLOSE])) / (x[PX_HIGH] - x[PX_LOW])
        if x[PX_HIGH] > x[PX_LOW]
        else 0.0
    )


@inlined
def bar_range(x: Words) -> float:
    """log(high / low): Alizadeh, Brandt, Diebold (2002), "Range-based estimation of stochastic volatility models"."""
    return math.log(x[PX_HIGH] / x[PX_LOW])


@inlined
def opening_gap(x: Words) -> float:
    """Log change from the previous close to this open: the overnight return of Cliff, Cooper, Gulen (2008)."""
    return x[GAP]


@inlined
def candle_body(x: Words) -> float:
    """(close - open) / (high - low), the body of Nison (1991), "Japanese Candlestick Charting Techniques"."""
    return (x[PX_CLOSE] - x[PX_OPEN]) / (x[PX_HIGH] - x[PX_LOW]) if x[PX_HIGH] > x[PX_LOW] else 0.0


@inlined
def return_autocorrelation(x: Words, p: Words, s: Words) -> float:
    """First-order autocorrelation of returns about zero over n bars: Lo, MacKinlay (1988).

    s[2] is the return of the bar before; the rings hold r(t) r(t-1) and r(t)^2.
    """
    n = int(p[0])
    slot = turn(s, n)
    s[4 + slot] = x[RETURN] * s[2]
    s[4 + n + slot] = x[RETURN] * x[RETURN]
    s[2] = x[RETURN]
    products, squares = 0.0, 0.0
    for j in range(int(s[1])):
        products += s[4 + j]
        squares += s[4 + n + j]
    return products / squares if squares > 0.0 else 0.0


@inlined
def return_skewness(x: Words, p: Words, s: Words) -> float:
    """Skewness of returns over n bars: Amaya et al. (2015), "Does realized skewness predict..."; 0 if all equal."""
    slot = turn(s, int(p[0]))
    s[4 + slot] = x[RETURN]
    mean = _mean(s)
    variance = _moment(s, mean, 2)
    return _moment(s, mean, 3) / (variance * math.sqrt(variance)) if variance > 1e-24 else 0.0


@inlined
def drawdown(x: Words, p: Words, s: Words) -> float:
    """Log of the close over the highest close of n bars: Magdon-Ismail, Atiya (2004), "Maximum drawdown"."""
    slot = turn(s, int(p[0]))
    s[4 + slot] = x[LOG_CLOSE]
    top = x[LOG_CLOSE]
    for j in range(int(s[1])):
        top = max(top, s[4 + j])
    return x[LOG_CLOSE] - top


@inlined
def streak(x: Words, s: Words) -> float:
    """Signed count of bars in a row that closed up or down; an unchanged close ends a run.

    The runs of Fama (1965), "The behavior of stock-market prices".
    """
    if x[RETURN] > 0.0:
        s[0] = max(s[0], 0.0) + 1.0
    elif x[RETURN] < 0.0:
        s[0] = min(s[0], 0.0) - 1.0
    else:
        s[0] = 0.0
    return s[0]


@inlined
def amihud_illiquidity(x: Words, p: Words, s: Words) -> float:
    """Amihud (2002), "Illiquidity and stock returns": log of the mean |return| per unit of money traded.

    Bars without volume count as 0; the mean is floored at 1e-15, whose log a bar without any move gives.
    """
    n = int(p[0])
    money = x[PX_CLOSE] * x[TRADED]
    mean = rolled(abs(x[RETURN]) / money if money > 0.0 else 0.0, s, n, turn(s, n), 2, 4) / s[1]
    return math.log(max(mean, 0.0) + 1e-15)


@inlined
def efficiency_ratio(x: Words, p: Words, s: Words) -> float:
    """Kaufman (1995), "Smarter Trading": net move over the sum of absolute moves, signed, -1 to 1."""
    n = int(p[0])
    slot = turn(s, n)
    net = rolled(x[RETURN], s, n, slot, 2, 4)
    path = rolled(abs(x[RETURN]), s, n, slot, 3, 4 + n)
    return net / path if path > 0.0 else 0.0


@inlined
def volatility_ratio(x: Words, p: Words, s: Words) -> float:
    """Log of short over long root mean square return: a volatility regime in the manner of Corsi (2009), HAR-RV."""
    short, n = int(p[0]), int(p[1])
    slot = turn(s, n)
    s[4 + slot] = x[RETURN] * x[RETURN]
    filled = int(s[1])
    recent, total = 0.0, 0.0
    for j in range(filled):
        back = slot - j if slot >= j else slot - j + n
        total += s[4 + back]
        if j < short:
            recent += s[4 + back]
    if recent <= 0.0 or total <= 0.0:
        return 0.0
    return 0.5 * math.log((recent / min(short, filled)) / (total / filled))


@inlined
def time_since_bar(x: Words) -> float:
    """log(1 + seconds since the previous bar): longer after minutes without a trade. 0 at the first of a session."""
    return math.log(1.0 + x[DT])


@inlined
def update_bars(kind: int, x: Words, p: Words, s: Words) -> float:  # noqa: C901 - a dispatch table
    """The feature of `kind` (ids as in `catalog.BAR_KINDS`) after this bar."""
    if x[VALID] == 0.0:
        return math.nan
    if kind == 100:
        return bar_return(x, p, s)
    if kind == 101:
        return bar_volatility(x, p, s)
    if kind == 102:
        return average_true_range(x, p, s)
    if kind == 103:
        return relative_strength_index(x, p, s)
    if kind == 104:
        return macd(x, p, s)
    if kind == 105:
        return macd_histogram(x, p, s)
    if kind == 106:
        return bollinger_position(x, p, s)
    if kind == 107:
        return stochastic_k(x, p, s)
    if kind == 108:
        return volume_zscore(x, p, s)
    if kind == 109:
        return vwap_deviation(x, p, s)
    if kind == 110:
        return obv_slope(x, p, s)
    if kind == 111:
        return parkinson_volatility(x, p, s)
    if kind == 112:
        return garman_klass_volatility(x, p, s)
    if kind == 113:
        return rogers_satchell_volatility(x, p, s)
    if kind == 114:
        return close_location(x)
    if kind == 115:
        return bar_range(x)
    if kind == 116:
        return opening_gap(x)
    if kind == 117:
        return candle_body(x)
    if kind == 118:
        return return_autocorrelation(x, p, s)
    if kind == 119:
        return return_skewness(x, p, s)
    if kind == 120:
        return drawdown(x, p, s)
    if kind == 121:
        return streak(x, s)
    if kind == 122:
        return amihud_illiquidity(x, p, s)
    if kind == 123:
        return efficiency_ratio(x, p, s)
    if kind == 124:
        return volatility_ratio(x, p, s)
    if kind == 125:
        return time_of_day(x[SECOND], False, s)
    if kind == 126:
        return time_of_day(x[SECOND], True, s)
    if kind == 127:
        return time_since_bar(x)
    return math.nan

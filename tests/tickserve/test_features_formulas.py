"""Every kind against its definition, written out plainly over the whole past of a session."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from market.simulator import SimulatedSource
from tickserve.events import TRADE, Events
from tickserve.features.catalog import BAR_KINDS, BOOK_KINDS
from tickserve.features.engine import FeatureEngine
from tickserve.features.spec import Feature, FeatureSpec, default_bars_spec, default_book_spec

Column = npt.NDArray[np.float64]
N = 700


def book_events() -> Events:
    return next(SimulatedSource(seed=21, events=N, levels=3).chunks(N))


def bar_events() -> Events:
    random = np.random.default_rng(21)
    close = 100 * np.exp(np.cumsum(random.choice([0.0, 1.0, -1.0], N) * random.gamma(1, 0.004, N)))
    opens = np.concatenate([[100.0], close[:-1]]) * np.exp(random.normal(0, 0.001, N))
    high = np.maximum(opens, close) * np.exp(random.gamma(1, 0.001, N))
    low = np.minimum(opens, close) * np.exp(-random.gamma(1, 0.001, N))
    ts_ns = 1_500_000_000 * 10**9 + np.cumsum(random.integers(1, 5, N)) * 60 * 10**9
    return Events("bars", 0, ts_ns, np.column_stack([opens, high, low, close, random.integers(0, 50, N) * 1.0]))


class Book:
    """A book's columns by name, and sums over its past."""

    def __init__(self, events: Events) -> None:
        self.events = events
        self.t = (events.ts_ns - events.ts_ns[0]) / 1e9
        value = dict(zip(events.columns, events.values.T, strict=True))
        self.bid, self.bid_size = value["bid_price_1"], value["bid_size_1"]
        self.ask, self.ask_size = value["ask_price_1"], value["ask_size_1"]
        self.value = value
        self.mid = (self.bid + self.ask) / 2
        self.trade = value["event"] == TRADE
        self.signed = value["trade_size"] * value["trade_sign"] * self.trade
        self.depth = (self.bid_size + self.ask_size) / 2
        self.returns = np.diff(np.log(self.mid), prepend=np.log(self.mid[0]))

    def decayed(self, what: Column, tau: float) -> Column:
        """Sum over the past of what(j) exp(-(t(i) - t(j)) / tau)."""
        weights = np.exp(-np.maximum(self.t[:, None] - self.t[None, :], 0) / tau)
        return np.array((np.tril(weights) * what[None, :]).sum(axis=1))

    def flow(self) -> Column:
        flow = np.zeros(N)
        for i in range(1, N):
            up, down = float(self.bid[i] >= self.bid[i - 1]), float(self.bid[i] <= self.bid[i - 1])
            flow[i] += up * self.bid_size[i] - down * self.bid_size[i - 1]
            down, up = float(self.ask[i] <= self.ask[i - 1]), float(self.ask[i] >= self.ask[i - 1])
            flow[i] += -down * self.ask_size[i] + up * self.ask_size[i - 1]
        return flow

    def in_depths(self, what: Column, tau: float) -> Column:
        return self.decayed(what, tau) * self.decayed(np.ones(N), tau) / self.decayed(self.depth, tau)

    def from_average(self, what: Column, tau: float) -> Column:
        average = what.copy()
        for i in range(1, N):
            kept = math.exp(-(self.t[i] - self.t[i - 1]) / tau)
            average[i] = kept * average[i - 1] + (1 - kept) * what[i]
        return what - average

    def imbalance(self, first: int, last: int) -> Column:
        bids = np.sum([self.value[f"bid_size_{k}"] for k in range(first, last + 1)], axis=0)
        asks = np.sum([self.value[f"ask_size_{k}"] for k in range(first, last + 1)], axis=0)
        return np.array((bids - asks) / (bids + asks))

    def weighted(self, levels: int) -> Column:
        names = [(f"{side}_price_{k}", f"{side}_size_{k}") for k in range(1, levels + 1) for side in ("bid", "ask")]
        money = np.sum([self.value[price] * self.value[size] for price, size in names], axis=0)
        return np.array(money / np.sum([self.value[size] for _, size in names], axis=0) / self.mid - 1)

    def rolling(self, what: Column, count: int) -> Column:
        return pd.Series(what).rolling(count, min_periods=1).sum().to_numpy()

    def last_trade(self) -> npt.NDArray[np.intp]:
        """Index of the last trade up to each event, -1 before the first."""
        return np.maximum.accumulate(np.where(self.trade, np.arange(N), -1))

    def trade_deviation(self) -> Column:
        last = self.last_trade()
        return np.where(last < 0, 0.0, np.log(self.value["trade_price"][last].clip(1e-9)) - np.log(self.mid))

    def angle(self) -> Column:
        return (self.events.ts_ns // 10**9 % 86_400) / 86_400 * 2 * np.pi


BOOK: dict[str, Callable[..., Column]] = {
    "microprice_deviation": lambda b: (b.bid * b.ask_size + b.ask * b.bid_size) / (b.bid_size + b.ask_size) / b.mid - 1,
    "relative_spread": lambda b: (b.ask - b.bid) / b.mid,
    "level_imbalance": lambda b, level: b.imbalance(level, level),
    "depth_imbalance": lambda b, levels: b.imbalance(1, levels),
    "depth_weighted_deviation": lambda b, levels: b.weighted(levels),
    "order_flow_imbalance": lambda b, tau_s: b.in_depths(b.flow(), tau_s),
    "order_flow_imbalance_events": lambda b, count: (
        b.rolling(b.flow(), count) * np.minimum(np.arange(1, N + 1), count) / b.rolling(b.depth, count)
    ),
    "signed_trade_flow": lambda b, tau_s: b.in_depths(b.signed, tau_s),
    "realised_volatility": lambda b, tau_s: np.sqrt(b.decayed(b.returns**2, tau_s)),
    "mid_return_events": lambda b, count: np.log(b.mid / b.mid[np.maximum(np.arange(N) - count, 0)]),
    "event_rate": lambda b, tau_s: np.sqrt(b.decayed(np.ones(N), tau_s) / tau_s),
    "trade_rate": lambda b, tau_s: np.sqrt(b.decayed(b.trade * 1.0, tau_s) / tau_s),
    "spread_deviation": lambda b, tau_s: b.from_average((b.ask - b.bid) / b.mid, tau_s),
    "depth_deviation": lambda b, tau_s: b.from_average(np.log(b.depth), tau_s),
    "mid_deviation": lambda b, tau_s: b.from_average(np.log(b.mid), tau_s),
    "trade_deviation": lambda b: b.trade_deviation(),
    "time_since_trade": lambda b: np.log1p(b.t - b.t[np.maximum(b.last_trade(), 0)]),
    "time_since_event": lambda b: np.log1p(np.diff(b.t, prepend=0.0)),
    "time_of_day_sin": lambda b: np.sin(b.angle()),
    "time_of_day_cos": lambda b: np.cos(b.angle()),
}


class Bars:
    """A bar's columns as pandas series, and windows over them."""

    def __init__(self, events: Events) -> None:
        self.open, self.high, self.low, self.close, self.volume = (pd.Series(column) for column in events.values.T)
        self.ts_ns = events.ts_ns
        self.log = np.log(self.close)
        self.returns = self.log.diff().fillna(0.0)
        self.span, self.body = np.log(self.high / self.low), np.log(self.close / self.open)

    def rolling(self, what: pd.Series, count: int) -> pd.core.window.Rolling:
        return what.rolling(count, min_periods=1)

    def rms(self, what: pd.Series, count: int) -> pd.Series:
        return np.sqrt(self.rolling(what, count).mean().clip(lower=0))

    def wilder(self, what: pd.Series, count: int) -> pd.Series:
        average = what.to_numpy().copy()
        for i in range(1, N):
            average[i] = average[i - 1] + (what.iloc[i] - average[i - 1]) / min(i + 1, count)
        return pd.Series(average)

    def ema(self, what: pd.Series, span: int) -> pd.Series:
        return what.ewm(span=span, adjust=False).mean()

    def macd(self, fast: int, slow: int) -> pd.Series:
        return (self.ema(self.close, fast) - self.ema(self.close, slow)) / self.close

    def histogram(self, fast: int, slow: int, signal: int) -> pd.Series:
        line = self.macd(fast, slow)
        return line - self.ema(line, signal)

    def true_range(self) -> pd.Series:
        before = self.close.shift()
        parts = [self.high - self.low, (self.high - before).abs(), (self.low - before).abs()]
        return pd.concat(parts, axis=1).max(axis=1)

    def rsi(self, count: int) -> pd.Series:
        gains = self.wilder(self.returns.clip(lower=0), count)
        losses = self.wilder(-self.returns.clip(upper=0), count)
        return ((gains - losses) / (gains + losses)).fillna(0.0)

    def score(self, what: pd.Series, count: int) -> pd.Series:
        window = self.rolling(what, count)
        return ((what - window.mean()) / window.std(ddof=0)).fillna(0.0)

    def stochastic(self, count: int) -> pd.Series:
        high, low = self.rolling(self.high, count).max(), self.rolling(self.low, count).min()
        return 2 * (self.close - low) / (high - low) - 1

    def share(self, what: pd.Series, whole: pd.Series, count: int) -> pd.Series:
        return (self.rolling(what, count).sum() / self.rolling(whole, count).sum()).fillna(0.0)

    def vwap(self, count: int) -> pd.Series:
        typical = (self.high + self.low + self.close) / 3
        return np.log(self.close / self.share(typical * self.volume, self.volume, count).replace(0.0, np.nan)).fillna(
            0.0
        )

    def rogers_satchell(self) -> pd.Series:
        h, low, o, c = (np.log(column) for column in (self.high, self.low, self.open, self.close))
        return (h - c) * (h - o) + (low - c) * (low - o)

    def streak(self) -> pd.Series:
        runs, sign = np.zeros(N), np.sign(self.returns.to_numpy())
        for i in range(N):
            runs[i] = 0 if sign[i] == 0 else sign[i] + (runs[i - 1] if i and np.sign(runs[i - 1]) == sign[i] else 0)
        return pd.Series(runs)

    def skewness(self, count: int) -> pd.Series:
        def of(window: Column) -> float:
            away = window - window.mean()
            spread = float(np.sqrt((away**2).mean()))
            return float((away**3).mean()) / spread**3 if spread > 1e-12 else 0.0

        return self.rolling(self.returns, count).apply(of, raw=True)

    def amihud(self, count: int) -> pd.Series:
        money = self.close * self.volume
        each = (self.returns.abs() / money).where(money > 0, 0.0)
        return np.log(self.rolling(each, count).mean() + 1e-15)

    def angle(self) -> Column:
        return (self.ts_ns // 10**9 % 86_400) / 86_400 * 2 * np.pi


BARS: dict[str, Callable[..., pd.Series | Column]] = {
    "bar_return": lambda b, count: b.log - b.log.shift(count).fillna(b.log[0]),
    "bar_volatility": lambda b, count: b.rms(b.returns**2, count),
    "average_true_range": lambda b, count: b.wilder(b.true_range(), count) / b.close,
    "relative_strength_index": lambda b, count: b.rsi(count),
    "macd": lambda b, fast, slow: b.macd(fast, slow),
    "macd_histogram": lambda b, fast, slow, signal: b.histogram(fast, slow, signal),
    "bollinger_position": lambda b, count: b.score(b.close, count) / 2,
    "stochastic_k": lambda b, count: b.stochastic(count),
    "volume_zscore": lambda b, count: b.score(b.volume, count),
    "vwap_deviation": lambda b, count: b.vwap(count),
    "obv_slope": lambda b, count: b.share(np.sign(b.returns) * b.volume, b.volume, count),
    "parkinson_volatility": lambda b, count: b.rms(b.span**2 / (4 * np.log(2)), count),
    "garman_klass_volatility": lambda b, count: b.rms(b.span**2 / 2 - (2 * np.log(2) - 1) * b.body**2, count),
    "rogers_satchell_volatility": lambda b, count: b.rms(b.rogers_satchell(), count),
    "close_location": lambda b: (2 * b.close - b.high - b.low) / (b.high - b.low),
    "bar_range": lambda b: b.span,
    "opening_gap": lambda b: np.log(b.open / b.close.shift()).fillna(0.0),
    "candle_body": lambda b: (b.close - b.open) / (b.high - b.low),
    "return_autocorrelation": lambda b, count: b.share(b.returns * b.returns.shift().fillna(0.0), b.returns**2, count),
    "return_skewness": lambda b, count: b.skewness(count),
    "drawdown": lambda b, count: b.log - b.rolling(b.log, count).max(),
    "streak": lambda b: b.streak(),
    "amihud_illiquidity": lambda b, count: b.amihud(count),
    "efficiency_ratio": lambda b, count: b.share(b.returns, b.returns.abs(), count),
    "volatility_ratio": lambda b, short, long: (
        np.log(b.rms(b.returns**2, short) / b.rms(b.returns**2, long).replace(0.0, np.nan))
        .replace(-np.inf, np.nan)
        .fillna(0.0)
    ),
    "bar_time_of_day_sin": lambda b: np.sin(b.angle()),
    "bar_time_of_day_cos": lambda b: np.cos(b.angle()),
    "time_since_bar": lambda b: np.log1p(np.diff(b.ts_ns, prepend=b.ts_ns[0]) / 1e9),
}


def computed(spec: FeatureSpec, events: Events) -> dict[Feature, Column]:
    features = FeatureEngine(spec).batch(events).astype(np.float64)
    return dict(zip(spec.features, features.T, strict=True))


def check(feature: Feature, was: Column, expected: Column) -> None:
    scale = float(np.max(np.abs(expected)))
    assert scale > 0, "the test data do not exercise this feature"
    np.testing.assert_allclose(was, expected, rtol=2e-5, atol=2e-6 * scale, err_msg=feature.name)


def test_every_kind_has_a_definition_here() -> None:
    assert set(BOOK) | {"mid_return"} == set(BOOK_KINDS)
    assert set(BARS) == set(BAR_KINDS)


# The horizon of mid_return is exact to a sixty-fourth: test_mid_return_looks_back_by_its_horizon.
@pytest.mark.parametrize(
    "feature",
    [feature for feature in default_book_spec(3).features if feature.kind != "mid_return"],
    ids=lambda feature: feature.name,
)
def test_book_feature_follows_its_definition(feature: Feature) -> None:
    events = book_events()
    spec = FeatureSpec("one", "book", 3, (feature,), 10**15, 0)
    check(feature, computed(spec, events)[feature], BOOK[feature.kind](Book(events), **dict(feature.params)))


@pytest.mark.parametrize("feature", default_bars_spec().features, ids=lambda feature: feature.name)
def test_bar_feature_follows_its_definition(feature: Feature) -> None:
    events = bar_events()
    spec = FeatureSpec("one", "bars", 0, (feature,), 10**18, 0)
    check(
        feature, computed(spec, events)[feature], np.asarray(BARS[feature.kind](Bars(events), **dict(feature.params)))
    )


@pytest.mark.parametrize("horizon", [0.05, 0.5, 3.0])
def test_mid_return_looks_back_by_its_horizon(horizon: float) -> None:
    """The start is the newest event as old as the horizon, or one at most horizon / 64 before that event."""
    events = book_events()
    feature = Feature.of("mid_return", horizon_s=horizon)
    was = computed(FeatureSpec("one", "book", 3, (feature,), 10**15, 0), events)[feature]
    book, full = Book(events), 0
    for i in range(N):
        age = book.t[i] - book.t[: i + 1]
        newest = int(np.flatnonzero(age >= horizon)[-1]) if age[0] >= horizon else 0
        oldest = int(np.flatnonzero(book.t >= book.t[newest] - horizon / 64)[0])
        allowed = np.log(book.mid[i] / book.mid[oldest : newest + 1])
        assert np.min(np.abs(allowed - was[i])) < 1e-9
        full += age[0] >= horizon
    assert full > N // 10


def test_state_stays_bounded_and_exact_at_any_event_rate() -> None:
    """A burst of events far denser than the horizon's slots: the start is still the horizon away."""
    count, horizon = 30_000, 1.0
    values = np.zeros((count, 8))
    values[:, 4] = values[:, 6] = 100.0 * np.exp(np.arange(count) * 1e-6)
    values[:, 5] = values[:, 7] = 1.0
    feature = Feature.of("mid_return", horizon_s=horizon)
    events = Events("book", 1, np.arange(count) * 100_000, values)
    was = computed(FeatureSpec("one", "book", 1, (feature,), 10**15, 0), events)[feature]
    back = was[10_200:] / 1e-6 * 1e-4
    assert np.all((back > horizon * 0.999) & (back < horizon * (1 + 1 / 64) * 1.001))


def test_a_rolling_sum_forgets_a_wild_value() -> None:
    """Added and taken away again, 1e12 would leave rounding behind; the ring is summed afresh when it wraps."""
    events = book_events()
    values = events.values.copy()
    values[100, 5] = 1e12
    feature = Feature.of("order_flow_imbalance_events", count=20)
    spec = FeatureSpec("one", "book", 3, (feature,), 10**15, 0)
    clean = computed(spec, events)[feature]
    dirty = computed(spec, Events("book", 3, events.ts_ns, values))[feature]
    np.testing.assert_array_equal(dirty[160:], clean[160:])


def test_a_trade_without_a_side_is_signed_by_the_quote_rule() -> None:
    values = np.zeros((3, 8))
    values[:, 4:] = (99.0, 1.0, 101.0, 1.0)
    values[:, 0], values[:, 2] = TRADE, 5.0
    values[:, 1] = (101.0, 99.0, 100.0)
    feature = Feature.of("signed_trade_flow", tau_s=1.0)
    spec = FeatureSpec("one", "book", 1, (feature,), 1, 0)
    each = [computed(spec, Events("book", 1, np.array([0]), values[i : i + 1]))[feature][0] for i in range(3)]
    assert each == [5.0, -5.0, 0.0]

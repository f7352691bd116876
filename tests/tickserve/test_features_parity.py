"""Online equals batch, bit for bit from the first event: any mix of step and batch, chunks, threads, gaps, bad rows."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from market.readers import open_source
from market.simulator import SimulatedSource
from tickserve.errors import SchemaError
from tickserve.events import Events
from tickserve.features import engine as engine_module
from tickserve.features.engine import FeatureEngine
from tickserve.features.spec import FeatureSpec, default_bars_spec, default_book_spec, default_spec

HOUR_NS = 3_600 * 10**9


def bits(features: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(features).view(np.uint32)


def part(events: Events, start: int, stop: int) -> Events:
    return Events(events.kind, events.levels, events.ts_ns[start:stop], events.values[start:stop])


def stepped(spec: FeatureSpec, events: Events) -> npt.NDArray[np.float32]:
    engine = FeatureEngine(spec)
    rows = [engine.step(int(ts), row) for ts, row in zip(events.ts_ns, events.values, strict=True)]
    return np.array(rows, np.float32)


def simulated(levels: int, count: int, seed: int = 3) -> Events:
    return next(SimulatedSource(seed=seed, events=count, levels=levels).chunks(count))


def random_bars(count: int, seed: int = 3) -> Events:
    random = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(random.normal(0, 0.01, count)))
    opens = close * np.exp(random.normal(0, 0.003, count))
    high, low = np.maximum(opens, close) * 1.002, np.minimum(opens, close) * 0.998
    ts_ns = np.cumsum(random.integers(1, 90, count)) * 10**9
    return Events("bars", 0, ts_ns, np.column_stack([opens, high, low, close, random.gamma(1, 50, count)]))


def spoiled(events: Events, seed: int) -> Events:
    """The events with absent levels, NaN, infinities, zero and negative values, steps back and long gaps in time."""
    random = np.random.default_rng(seed)
    values = events.values.copy()
    for bad in (np.nan, np.inf, -np.inf, 0.0, -1.0, 1e308, 5e-324):
        values[random.random(values.shape) < 0.004] = bad
    values[random.random(len(values)) < 0.02] = np.nan
    steps = np.diff(events.ts_ns, prepend=events.ts_ns[0])
    steps[random.random(len(steps)) < 0.05] *= 0
    steps[random.random(len(steps)) < 0.01] *= -1
    steps[random.random(len(steps)) < 0.01] = 40 * 24 * HOUR_NS
    return Events(events.kind, events.levels, events.ts_ns[0] + np.cumsum(steps), values)


CASES = {
    "book-l1": (default_book_spec(1), simulated(1, 1_500)),
    "book-l5": (default_book_spec(5), simulated(5, 1_500)),
    "bars": (default_bars_spec(), random_bars(1_500)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bad", [False, True])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 1_500), max_size=6), first=st.booleans(), seed=st.integers(0, 99))
def test_any_mix_of_batch_and_step_gives_the_same_bits(
    case: str, bad: bool, cuts: list[int], first: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MIN_THREAD_EVENTS", 64)
    spec, events = CASES[case]
    events = spoiled(events, seed) if bad else events
    engine, pieces, by_step = FeatureEngine(spec, threads=3), [], first
    edges = [0, *sorted(cuts), len(events)]
    for start, stop in pairwise(edges):
        piece = part(events, start, stop)
        if by_step:
            pieces += [engine.step(int(piece.ts_ns[i]), piece.values[i])[None] for i in range(len(piece))]
        else:
            pieces.append(engine.batch(piece))
        by_step = not by_step
    assert np.array_equal(bits(np.concatenate(pieces)), bits(stepped(spec, events)))


@pytest.mark.parametrize(
    ("paths", "count"),
    [
        (["binance_l2_stream/usdm_btcusdt_20240808.jsonl.gz"], 20_000),
        (["binance_l2_stream/spot_ethusdt_20240808.jsonl.gz"], 20_000),
        (["binance_l2_stream/usdm_btcusdt_20230404.us.jsonl.gz"], 20_000),
        (["us_equity_tick/aig"], 20_000),
        (["fx_tick/fxcm_eurusd/20140501_quote.zip"], 20_000),
        (["bars_1m/bitfinex/ETHUSD_1m_201804_201812.parquet"], 20_000),
        (["bars_1m/nautilus/btc-perp-20211231-20220201_1m.csv.gz"], 20_000),
        (["bars_1h/lean_us/spy.zip"], 20_000),
        (["bars_1d/lean_us/uso.zip"], 20_000),
    ],
    ids=lambda value: value[0].rsplit("/", 1)[-1] if isinstance(value, list) else "",
)
def test_online_equals_batch_on_recorded_data(market_data: Path, paths: list[str], count: int) -> None:
    source = open_source([market_data / path for path in paths])
    events = next(source.chunks(count))
    spec = default_spec(source.kind, source.levels)
    features, place = FeatureEngine(spec, threads=2).batch_with_index(events)
    assert np.array_equal(bits(features), bits(stepped(spec, events)))
    warm = features[place >= spec.warmup_events]
    assert len(warm) > 0
    assert np.isfinite(warm).all(axis=1).mean() > 0.99
    constant = [name for name, column in zip(spec.columns, warm.T, strict=True) if np.all(column == column[0])]
    assert len(constant) < len(spec.columns) // 2


def test_a_gap_starts_a_session_anew() -> None:
    spec, events = CASES["book-l5"]
    late = Events("book", 5, events.ts_ns + 10 * HOUR_NS, events.values)
    engine = FeatureEngine(spec)
    first, index = engine.batch_with_index(events)
    assert index[-1] == len(events) - 1
    again, place = engine.batch_with_index(late)
    assert np.array_equal(place, np.arange(len(late)))
    timeless = [i for i, name in enumerate(spec.columns) if "time_of_day" not in name]
    assert np.array_equal(bits(first[:, timeless]), bits(again[:, timeless]))


def test_a_gap_as_long_as_allowed_does_not() -> None:
    spec, events = CASES["bars"]
    engine = FeatureEngine(spec)
    engine.step(0, events.values[0])
    engine.step(spec.session_gap_ns, events.values[1])
    assert engine.events_seen == 2
    engine.step(2 * spec.session_gap_ns + 1, events.values[2])
    assert engine.events_seen == 1


def test_warm_follows_the_spec_and_reset_forgets() -> None:
    spec, events = CASES["bars"]
    engine = FeatureEngine(spec)
    seen = []
    for i in range(spec.warmup_events + 1):
        engine.step(int(events.ts_ns[i]), events.values[i])
        seen.append(engine.warm)
    assert seen == [False] * spec.warmup_events + [True]
    before = stepped(spec, events)
    engine.reset()
    assert (engine.events_seen, engine.warm) == (0, False)
    assert np.array_equal(bits(engine.batch(events)), bits(before))


def test_rows_of_any_layout_give_the_same_bits() -> None:
    spec, events = CASES["book-l5"]
    wide = np.zeros((len(events), 2 * events.values.shape[1]))
    wide[:, ::2] = events.values
    readonly = events.values.copy()
    readonly.flags.writeable = False
    expected = bits(FeatureEngine(spec).batch(events))
    for values in (wide[:, ::2], readonly, np.asfortranarray(events.values), events.values.astype(">f8")):
        assert np.array_equal(bits(FeatureEngine(spec).batch(Events("book", 5, events.ts_ns, values))), expected)
        engine = FeatureEngine(spec)
        rows = np.array([engine.step(int(events.ts_ns[i]), values[i]) for i in range(300)])
        assert np.array_equal(bits(rows), expected[:300])


def test_wrong_rows_are_refused_and_leave_the_state() -> None:
    spec, events = CASES["book-l5"]
    engine = FeatureEngine(spec)
    wrong = [
        events.values[0][:-1],
        events.values[:2],
        np.array(["1"] * events.values.shape[1]),
        events.values[0].astype(object),
    ]
    for row in wrong:
        with pytest.raises(SchemaError, match=r"values.*expected"):
            engine.step(1, row)
    for chunk in (simulated(4, 10), random_bars(10)):
        with pytest.raises(SchemaError, match=r"events.*expected book with 5 levels"):
            engine.batch(chunk)
    with pytest.raises(SchemaError, match="ts_ns"):
        engine.batch(Events("book", 5, events.ts_ns[:-1], events.values))
    assert engine.events_seen == 0
    assert engine.batch(part(events, 0, 0)).shape == (0, len(spec.columns))


def test_every_value_is_finite_or_the_one_nan() -> None:
    for name, (spec, events) in CASES.items():
        features = FeatureEngine(spec).batch(spoiled(events, 5))
        assert not np.isinf(features).any(), name
        patterns = np.unique(bits(features)[np.isnan(features)])
        assert list(patterns) == [np.float32(np.nan).view(np.uint32)], name


def test_quotes_without_sizes_give_order_flow_in_quotes() -> None:
    values = np.zeros((3, 8))
    values[:, 4], values[:, 6] = (1.0, 1.1, 1.1), (1.2, 1.2, 1.2)
    spec = default_book_spec(1)
    last = FeatureEngine(spec).batch(Events("book", 1, np.arange(3) * 10**9, values))[-1]
    found = dict(zip(spec.columns, last.tolist(), strict=True))
    assert np.isfinite(last).all()
    assert found["order_flow_imbalance_events_20"] == 1.0
    assert found["level_imbalance_1"] == found["microprice_deviation"] == 0.0


def test_an_engine_uses_the_cores_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert len(FeatureEngine(default_book_spec(5))._groups) == 1
    assert len(FeatureEngine(default_book_spec(5), threads=4)._groups) == 4

"""The look-ahead probe passes the default specs and catches leaks, also subtle ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from market.readers import open_source
from market.simulator import SimulatedSource
from tickserve.errors import GateRefusedError, UsageError
from tickserve.events import Events
from tickserve.features.engine import FeatureEngine
from tickserve.features.lookahead import probe
from tickserve.features.spec import default_book_spec, default_spec

Features = npt.NDArray[np.float32]
SPEC = default_book_spec(5)


@pytest.fixture(scope="module")
def events() -> Events:
    return next(SimulatedSource(seed=11, events=3_000, levels=5).chunks(3_000))


@pytest.mark.parametrize("cut", [1, 1_024, 2_999])
def test_the_default_book_spec_does_not_look_ahead(events: Events, cut: int) -> None:
    assert probe(SPEC, events, cut) == 5


@pytest.mark.parametrize(
    "path", ["binance_l2_stream/usdm_btcusdt_20240808.jsonl.gz", "bars_1m/bitfinex/BTCUSD_1m_201804_201812.parquet"]
)
def test_the_default_specs_do_not_look_ahead_on_recorded_data(market_data: Path, path: str) -> None:
    source = open_source([market_data / path])
    recorded = next(source.chunks(6_000))
    assert probe(default_spec(source.kind, source.levels), recorded, len(recorded) // 2) == 5


def _next_event(events: Events) -> Features:
    """Column 3 is the next event's."""
    features = FeatureEngine(SPEC).batch(events)
    features[:-1, 3] = features[1:, 3]
    return features


def _scaled_by_all(events: Events) -> Features:
    """The classic: standardised over the whole file, test rows included."""
    features = FeatureEngine(SPEC).batch(events)
    return (features - features.mean(axis=0)) / (features.std(axis=0) + np.float32(1e-9))


def _next_time(events: Events) -> Features:
    """A column that knows how long it will be quiet."""
    features = FeatureEngine(SPEC).batch(events)
    features[:-1, 0] = np.diff(events.ts_ns)
    return features


def _backfilled(events: Events) -> Features:
    """Drops the rows whose future is not there yet."""
    return FeatureEngine(SPEC).batch(events)[: len(events) - 10]


@pytest.mark.parametrize("leaky", [_next_event, _scaled_by_all, _next_time, _backfilled])
def test_a_leak_is_refused(events: Events, leaky: Callable[[Events], Features]) -> None:
    with pytest.raises(GateRefusedError, match="look-ahead"):
        probe(leaky, events, 1_500)


def test_the_refusal_names_column_and_event(events: Events) -> None:
    with pytest.raises(GateRefusedError, match=r"column 3 of event 1499 moved when events from 1500 on changed"):
        probe(_next_event, events, 1_500)


def test_an_honest_function_passes(events: Events) -> None:
    assert probe(lambda events: FeatureEngine(SPEC).batch(events), events, 1_500) == 5


@pytest.mark.parametrize("cut", [0, -1, 3_000])
def test_a_cut_without_past_or_future_is_refused(events: Events, cut: int) -> None:
    with pytest.raises(UsageError, match="cut"):
        probe(SPEC, events, cut)

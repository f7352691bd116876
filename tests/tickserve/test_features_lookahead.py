"""The look-ahead probe passes the default specs and catches leaks, also subtle ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from market.readers import open_source
from market.simulator import SimulatedSource
from tickserve.errors import GateRefusedError, UsageError
from tickserve.events import EVENT, TRADE_SIGN, Events
from tickserve.features import engine
from tickserve.features.catalog import KINDS
from tickserve.features.engine import FeatureEngine
from tickserve.features.lookahead import CUTS, probe
from tickserve.features.spec import Feature, FeatureSpec, default_book_spec, default_spec

Features = npt.NDArray[np.float32]
SPEC = default_book_spec(5)


@pytest.fixture(scope="module")
def events() -> Events:
    return next(SimulatedSource(seed=11, events=3_000, levels=5).chunks(3_000))


BOOK_WAYS, BAR_WAYS = 12, 9


@pytest.mark.parametrize("cut", [1, 1_024, 2_999])
def test_the_default_book_spec_does_not_look_ahead(events: Events, cut: int) -> None:
    assert probe(SPEC, events, cut) == BOOK_WAYS


def test_without_a_cut_many_are_probed(events: Events) -> None:
    assert probe(SPEC, events) == CUTS * BOOK_WAYS
    assert probe(SPEC, events, [5, 1_000]) == 2 * BOOK_WAYS
    few = Events("book", 5, events.ts_ns[:4], events.values[:4])
    assert probe(SPEC, few) == 3 * BOOK_WAYS
    with pytest.raises(UsageError, match="cut"):
        probe(SPEC, Events("book", 5, events.ts_ns[:1], events.values[:1]))


@pytest.mark.parametrize(
    ("path", "ways"),
    [
        ("binance_l2_stream/usdm_btcusdt_20240808.jsonl.gz", BOOK_WAYS),
        ("bars_1m/bitfinex/BTCUSD_1m_201804_201812.parquet", BAR_WAYS),
    ],
)
def test_the_default_specs_do_not_look_ahead_on_recorded_data(market_data: Path, path: str, ways: int) -> None:
    source = open_source([market_data / path])
    recorded = next(source.chunks(3_000))
    assert probe(default_spec(source.kind, source.levels), recorded) == CUTS * ways


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


def _with_column(events: Events, column: Any) -> Features:
    features = np.ascontiguousarray(FeatureEngine(SPEC).batch(events))
    features[:, 0] = column
    return features


def _next_is_a_trade(events: Events) -> Features:
    return _with_column(events, np.append(events.values[1:, EVENT], 0.0))


def _next_mid_is_higher(events: Events) -> Features:
    mid = events.values[:, 4] + events.values[:, 6]
    return _with_column(events, np.append(mid[1:] > mid[:-1], False))


def _next_event_of_the_same_time(events: Events) -> Features:
    """The next bid where it comes at the very same time: most events have none."""
    same = np.append(np.diff(events.ts_ns) == 0, False)
    return _with_column(events, np.where(same, np.append(events.values[1:, 4], 0.0), 0.0))


def _end_of_the_millisecond(events: Events) -> Features:
    """The best bid's size at the end of the event's millisecond, as a careless resampling gives it."""
    millisecond = events.ts_ns // 10**6
    return _with_column(events, events.values[np.searchsorted(millisecond, millisecond, side="right") - 1, 5])


def _events_to_come(events: Events) -> Features:
    """How many events the next 100 ms hold."""
    return _with_column(
        events, np.searchsorted(events.ts_ns, events.ts_ns + 10**8, side="right") - np.arange(len(events))
    )


def _next_trade_is_a_purchase(events: Events) -> Features:
    return _with_column(events, np.append(events.values[1:, TRADE_SIGN] > 0, False))


SPARSE = [
    _next_is_a_trade, _next_mid_is_higher, _next_event_of_the_same_time, _end_of_the_millisecond, _events_to_come,
    _next_trade_is_a_purchase,
]  # fmt: skip


def _backfilled(events: Events) -> Features:
    """Drops the rows whose future is not there yet."""
    return FeatureEngine(SPEC).batch(events)[: len(events) - 10]


@pytest.mark.parametrize("leaky", [_next_event, _scaled_by_all, _next_time, _backfilled])
def test_a_leak_is_refused(events: Events, leaky: Callable[[Events], Features]) -> None:
    with pytest.raises(GateRefusedError, match="look-ahead"):
        probe(leaky, events, 1_500)


@pytest.mark.parametrize("leaky", SPARSE)
def test_a_leak_of_a_bit_is_refused_by_default(market_data: Path, leaky: Callable[[Events], Features]) -> None:
    """On recorded data, where most events show nothing of such a leak."""
    recorded = next(open_source([market_data / "binance_l2_stream/usdm_btcusdt_20240808.jsonl.gz"]).chunks(3_000))
    with pytest.raises(GateRefusedError, match="look-ahead: column 0 of event"):
        probe(leaky, recorded)


class _PeekingEngine(FeatureEngine):
    """An engine whose kind `peek` takes its value from the next row, as a formula with a wrong index would."""

    def batch_with_index(self, events: Events) -> tuple[Features, npt.NDArray[np.int64]]:
        features, index = super().batch_with_index(events)
        for column, feature in enumerate(self.spec.features):
            if feature.kind == "peek":
                features[:-1, column] = features[1:, column].copy()
        return features, index


def test_a_leaky_spec_is_refused(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spec with a kind that reads the next row: registered, compiled and run like any other, and refused by name."""
    monkeypatch.setitem(KINDS, "peek", KINDS["relative_spread"])
    columns = (Feature.of("microprice_deviation"), Feature.of("peek"))
    leaky = FeatureSpec("leaky", "book", 5, columns, SPEC.session_gap_ns, SPEC.warmup_events)
    assert probe(leaky, events) == CUTS * BOOK_WAYS  # the true engine reads the row itself
    monkeypatch.setattr(engine, "FeatureEngine", _PeekingEngine)
    assert probe(SPEC, events) == CUTS * BOOK_WAYS
    with pytest.raises(GateRefusedError, match="look-ahead: peek of event"):
        probe(leaky, events)


def test_the_refusal_names_column_and_event(events: Events) -> None:
    with pytest.raises(GateRefusedError, match=r"column 3 of event 1499 moved when events from 1500 on changed"):
        probe(_next_event, events, 1_500)


def test_an_honest_function_passes(events: Events) -> None:
    assert probe(lambda events: FeatureEngine(SPEC).batch(events), events, 1_500) == BOOK_WAYS


@pytest.mark.parametrize("cut", [0, -1, 3_000])
def test_a_cut_without_past_or_future_is_refused(events: Events, cut: int) -> None:
    with pytest.raises(UsageError, match="cut"):
        probe(SPEC, events, cut)

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest

from market.simulator import START_NS, SimulatedSource
from tickserve.errors import UsageError
from tickserve.events import TRADE, TRADE_PRICE, TRADE_SIGN, TRADE_SIZE, Events


def whole(source: SimulatedSource, rows: int = 131_072) -> Events:
    chunks = list(source.chunks(rows))
    ts_ns = np.concatenate([chunk.ts_ns for chunk in chunks])
    return Events("book", source.levels, ts_ns, np.concatenate([chunk.values for chunk in chunks]))


@pytest.fixture(scope="module")
def events() -> Events:
    return whole(SimulatedSource(seed=7))


def level(events: Events, name: str) -> npt.NDArray[np.float64]:
    return events.values[:, events.columns.index(name)]


def test_labelled_simulated_everywhere() -> None:
    source = SimulatedSource(seed=7, events=10)
    assert (source.symbol, source.venue, source.kind, source.simulated) == ("simulated", "simulator", "book", True)
    assert source.files == ()
    list(source.chunks())
    assert "SIMULATED" in source.quality.to_json()["notes"][0]


@pytest.mark.parametrize("rows", [1, 97, 4_000])
def test_same_seed_same_rows_in_any_chunks(rows: int) -> None:
    once, again = whole(SimulatedSource(3, 4_000)), whole(SimulatedSource(3, 4_000), rows)
    np.testing.assert_array_equal(once.ts_ns, again.ts_ns)
    np.testing.assert_array_equal(once.values, again.values)


def test_a_longer_run_starts_with_the_shorter_one() -> None:
    short, long = whole(SimulatedSource(3, 500)), whole(SimulatedSource(3, 900))
    np.testing.assert_array_equal(short.values, long.values[:500])


def test_another_seed_other_rows_and_digest() -> None:
    digests = [SimulatedSource(*args).digests()["simulator"] for args in ((1, 9, 5), (2, 9, 5), (1, 8, 5), (1, 9, 4))]
    assert len(set(digests)) == 4
    assert SimulatedSource(1, 9, 5).digests() == SimulatedSource(1, 9, 5).digests()
    assert not np.array_equal(whole(SimulatedSource(1, 500)).values, whole(SimulatedSource(2, 500)).values)


@pytest.mark.parametrize("levels", [1, 5, 20])
def test_every_row_is_a_book(levels: int) -> None:
    events = whole(SimulatedSource(seed=11, events=30_000, levels=levels))
    assert np.isfinite(events.values).all()
    bids, asks = events.values[:, 4::4], events.values[:, 6::4]
    assert (bids[:, 0] < asks[:, 0]).all()
    assert (np.diff(bids, axis=1) < 0).all()
    assert (np.diff(asks, axis=1) > 0).all()
    assert (events.values[:, 5::2] > 0).all()
    assert (asks[:, 0] - bids[:, 0] < 0.25).all()


def test_trades_take_the_best_price_of_the_row_before(events: Events) -> None:
    trades = np.flatnonzero(events.values[:, 0] == TRADE)[1:]
    rows = events.values[trades]
    before = np.where(
        rows[:, TRADE_SIGN] > 0, level(events, "ask_price_1")[trades - 1], level(events, "bid_price_1")[trades - 1]
    )
    np.testing.assert_array_equal(rows[:, TRADE_PRICE], before)
    assert (rows[:, TRADE_SIZE] > 0).all()
    assert set(np.unique(rows[:, TRADE_SIGN])) == {-1.0, 1.0}
    updates = events.values[events.values[:, 0] != TRADE]
    assert not updates[:, 1:4].any()


def test_time_starts_where_nobody_recorded_and_never_steps_back(events: Events) -> None:
    assert events.ts_ns[0] > START_NS
    assert (np.diff(events.ts_ns) >= 0).all()


def test_arrivals_cluster(events: Events) -> None:
    waits = np.diff(events.ts_ns[np.flatnonzero(np.diff(events.ts_ns, prepend=0))]).astype(float)
    # A Poisson stream has a coefficient of variation of 1; its error at this length is about 0.004.
    assert waits.std() / waits.mean() > 1.05


def test_imbalance_mildly_predicts_the_next_move_and_the_past_does_less(events: Events) -> None:
    mid = (level(events, "bid_price_1") + level(events, "ask_price_1")) / 2
    bid, ask = level(events, "bid_size_1"), level(events, "ask_size_1")
    later = np.searchsorted(events.ts_ns, events.ts_ns + 1_000_000_000)
    known = later < len(mid)
    move = mid[later[known]] - mid[known]
    correlation = np.corrcoef(((bid - ask) / (bid + ask))[known], move)[0, 1]
    assert 0.1 < correlation < 0.4
    assert 0.2 < np.mean(move == 0) < 0.5


def test_sixty_thousand_events_take_less_than_a_second(events: Events) -> None:
    start = time.perf_counter()
    whole(SimulatedSource(seed=8))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"events": 0}, {"levels": 0}, {"levels": 21}])
def test_wrong_arguments_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))}.*expected"):
        SimulatedSource(**{"seed": 1, **wrong})

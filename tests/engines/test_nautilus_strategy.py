"""The strategy in NautilusTrader's own engine: when it is told a signal, what it may do about one, what goes wrong."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nautilus_trader.backtest.engine import BacktestEngine, BacktestEngineConfig
from nautilus_trader.common.actor import Actor
from nautilus_trader.config import LoggingConfig
from nautilus_trader.model.currencies import USD
from nautilus_trader.model.data import (
    BarType,
    BookOrder,
    DataType,
    InstrumentStatus,
    OrderBookDelta,
    OrderBookDeltas,
    QuoteTick,
)
from nautilus_trader.model.enums import AccountType, BookAction, MarketStatusAction, OmsType, OrderSide, RecordFlag
from nautilus_trader.model.objects import Money

from tests.engines.conftest import instrument
from tickserve.engines.nautilus import ModelSignal, SignalStrategy, SignalStrategyConfig, nautilus_data
from tickserve.errors import DataError, TickserveError, TransportError, UsageError
from tickserve.events import Events
from tickserve.features.spec import FeatureSpec, default_bars_spec, default_book_spec
from tickserve.journal import ActionRecord, DecisionRecord, Journal, read_journal
from tickserve.risk import ModelAction, write_actions
from tickserve.signal import Signal
from tickserve.testing import FLAT_ANSWER, UP_ANSWER, Entry, MockClient, make_manifest, mock_client

MODEL, WARMUP, MS, SECOND = "mock-model", 4, 10**6, 10**9
FULL = default_book_spec(1)
SPEC = FeatureSpec("short", "book", 1, FULL.features, 60 * SECOND, WARMUP)
START = 1_700_000_000 * SECOND
ONE = instrument(2, 0)


class Buyer(SignalStrategy):
    """Buys one on every signal, whatever it says; `reduces`: only to close."""

    def __init__(self, config: SignalStrategyConfig, *, reduces: bool = False, **given: Any) -> None:
        super().__init__(config, **given)
        self.seen: list[tuple[int, Signal]] = []
        self.told: list[tuple[str, TickserveError | None]] = []
        self.refusals: list[UsageError] = []
        self.reduces = reduces

    def on_model_signal(self, signal: Signal, ts_ns: int) -> None:
        self.seen.append((ts_ns, signal))
        order = self.order_factory.market(ONE.id, OrderSide.BUY, ONE.make_qty(1), reduce_only=self.reduces)
        try:
            self.submit_on(signal, order)
        except UsageError as error:
            self.refusals.append(error)

    def on_no_signal(self, reason: str, error: TickserveError | None) -> None:
        self.told.append((reason, error))


class Listener(Actor):  # type: ignore[misc]
    """Any other actor of the node."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[ModelSignal] = []

    def on_start(self) -> None:
        self.subscribe_data(DataType(ModelSignal))

    def on_data(self, data: ModelSignal) -> None:
        self.heard.append(data)


def quotes(steps: range, at_ns: int = START) -> list[Any]:
    values = np.zeros((len(steps), 8))
    values[:, 4] = [100 + step % 17 / 100 for step in steps]
    values[:, 5], values[:, 6], values[:, 7] = 10, values[:, 4] + 0.02, 10
    times = np.array([at_ns + step * MS for step in steps])
    return nautilus_data(Events("book", 1, times, np.round(values, 2)), ONE)


def config(**options: Any) -> SignalStrategyConfig:
    return SignalStrategyConfig(instrument_id=ONE.id, model=MODEL, deadline_ms=5_000, **options)


@contextmanager
def ran(strategy: SignalStrategy, data: list[Any], *actors: Actor) -> Iterator[BacktestEngine]:
    engine = BacktestEngine(BacktestEngineConfig(logging=LoggingConfig(bypass_logging=True), run_analysis=False))
    try:
        engine.add_venue(ONE.id.venue, OmsType.NETTING, AccountType.MARGIN, [Money(1_000_000, USD)])
        engine.add_instrument(ONE)
        engine.add_data(data, sort=False)
        for actor in actors:
            engine.add_actor(actor)
        engine.add_strategy(strategy)
        engine.run()
        yield engine
    finally:
        engine.dispose()


def scripted(*script: Entry, then: Entry = FLAT_ANSWER, **options: Any) -> MockClient:
    return mock_client(make_manifest(spec=SPEC), script, then=then, **options)


def test_signals_are_told_published_and_journaled_with_the_order(tmp_path: Path) -> None:
    listener = Listener()
    with Journal(tmp_path / "journal") as journal:
        strategy = Buyer(config(), client=scripted(then=UP_ANSWER, observer=journal), journal=journal)
        with ran(strategy, quotes(range(WARMUP + 6)), listener) as engine:
            assert int(engine.portfolio.net_position(ONE.id)) == 6
            orders = [str(order.client_order_id) for order in engine.cache.orders()]
    assert [ts_ns for ts_ns, _ in strategy.seen] == [START + step * MS for step in range(WARMUP, WARMUP + 6)]
    assert strategy.counts == {"OK": 6}
    assert [each.signal for each in listener.heard] == [signal for _, signal in strategy.seen]
    assert [each.ts_event for each in listener.heard] == [ts_ns for ts_ns, _ in strategy.seen]
    records = list(read_journal(tmp_path / "journal"))
    decisions = [each for each in records if isinstance(each, DecisionRecord)]
    actions = [each for each in records if isinstance(each, ActionRecord)]
    assert [each.newest_event_ns for each in decisions] == [ts_ns for ts_ns, _ in strategy.seen]
    assert [each.request_id for each in actions] == [each.request_id for each in decisions]
    assert {each.action for each in actions} == {"buy 1"}
    assert [each.fields["order"] for each in actions] == orders


@pytest.mark.parametrize("fallback", ["flat", "signal"])
def test_a_signal_without_the_models_number_opens_nothing(fallback: Any) -> None:
    gone = [TransportError("gone")] * 3
    strategy = Buyer(config(), client=scripted(UP_ANSWER, *gone, then=UP_ANSWER, fallback=fallback))
    with ran(strategy, quotes(range(WARMUP + 6))) as engine:
        assert int(engine.portfolio.net_position(ONE.id)) == 3
    status = "FALLBACK" if fallback == "flat" else "UNAVAILABLE"
    assert [signal.status for _, signal in strategy.seen] == ["OK", status, status, status, "OK", "OK"]
    assert len(strategy.refusals) == 3
    assert f"{status}: no position may be opened" in str(strategy.refusals[0])


@pytest.mark.parametrize(("action", "held"), [("none", 3), ("label", 3), ("shrink", 1), ("flat", 0)])
def test_the_size_is_what_drift_leaves_of_it(action: Any, held: int, tmp_path: Path) -> None:
    class Sized(Buyer):
        def on_model_signal(self, signal: Signal, ts_ns: int) -> None:
            size = self.size_for(signal, "3")  # of 1.5 the step of one leaves one
            if size and not self.portfolio.net_position(ONE.id):
                self.submit_on(signal, self.order_factory.market(ONE.id, OrderSide.BUY, ONE.make_qty(size)))

    asked = ModelAction(action=action, factor={"shrink": 0.5, "flat": 0.0}.get(action, 1.0))
    write_actions(tmp_path / "actions.json", time.time_ns(), {MODEL: asked})
    strategy = Sized(config(), client=scripted(then=UP_ANSWER, risk_actions=tmp_path / "actions.json"))
    with ran(strategy, quotes(range(WARMUP + 3))) as engine:
        assert int(engine.portfolio.net_position(ONE.id)) == held


def test_a_stale_signal_opens_nothing() -> None:
    """Recorded events are old by any clock, so with an age limit every one of them is stale."""
    strategy = Buyer(config(), client=scripted(max_age_ms=1_000))
    with ran(strategy, quotes(range(WARMUP + 3))) as engine:
        assert not engine.cache.orders()
    assert strategy.counts == {"STALE": 3}
    assert len(strategy.refusals) == 3


def test_a_position_may_be_closed_without_a_signal() -> None:
    strategy = Buyer(config(), client=scripted(*[TransportError("gone")] * 9, fallback="flat"), reduces=True)
    with ran(strategy, quotes(range(WARMUP + 2))) as engine:
        assert len(engine.cache.orders()) == 2  # the venue refuses them: there is no position
    assert not strategy.refusals


def test_a_failed_call_is_told_and_the_loop_goes_on() -> None:
    strategy = Buyer(config(), client=scripted(UP_ANSWER, TransportError("gone"), then=UP_ANSWER))
    with ran(strategy, quotes(range(WARMUP + 4))):
        pass
    assert strategy.counts == {"OK": 3, "TransportError": 1}
    ((reason, error),) = strategy.told
    assert isinstance(error, TransportError)
    assert "gone" in reason


def test_a_halt_hands_on_no_signal_until_trading_resumes() -> None:
    def status(step: int, action: MarketStatusAction) -> InstrumentStatus:
        return InstrumentStatus(ONE.id, action, START + step * MS, START + step * MS)

    data = quotes(range(WARMUP + 9))
    data.insert(WARMUP + 7, status(WARMUP + 6, MarketStatusAction.TRADING))
    data.insert(WARMUP + 3, status(WARMUP + 2, MarketStatusAction.HALT))
    client = scripted(then=UP_ANSWER)
    strategy = Buyer(config(), client=client)
    with ran(strategy, data) as engine:
        assert int(engine.portfolio.net_position(ONE.id)) == 5
    assert strategy.told == [("halted", None)] * 4
    assert strategy.counts == {"OK": 9}
    assert len(client.transport.requests) == 9, "events of a halt feed the stream, as they fed training"


def test_a_session_gap_warms_up_anew() -> None:
    strategy = Buyer(config(), client=scripted())
    later = START + 61 * SECOND
    with ran(strategy, quotes(range(WARMUP + 2)) + quotes(range(WARMUP + 3), later)):
        pass
    assert [ts_ns for ts_ns, _ in strategy.seen] == [
        *(START + step * MS for step in range(WARMUP, WARMUP + 2)),
        *(later + step * MS for step in range(WARMUP, WARMUP + 3)),
    ]


class Late(Buyer):
    """Meets one quote ten seconds late, as a live feed may deliver it; a backtest's own clock never steps back."""

    quotes = 0

    def on_quote_tick(self, tick: QuoteTick) -> None:
        super().on_quote_tick(tick)
        self.quotes += 1
        if self.quotes == WARMUP + 3:
            super().on_quote_tick(quotes(range(WARMUP, WARMUP + 1), START - 10 * SECOND)[0])


def test_a_quote_out_of_order_is_refused_and_the_rest_is_as_without_it() -> None:
    whole, client = scripted(), scripted()
    with ran(Buyer(config(), client=whole), quotes(range(WARMUP + 8))):
        pass
    strategy = Late(config(), client=client)
    with ran(strategy, quotes(range(WARMUP + 8))):
        pass
    assert strategy.counts == {"OK": 8, "InputRejectedError": 1}
    assert "out of order" in strategy.told[0][0]
    asked = [[tensor.data for tensor in request.tensors] for request in client.transport.requests]
    assert asked == [[tensor.data for tensor in request.tensors] for request in whole.transport.requests]


def test_recorded_events_out_of_order_never_reach_the_backtests_clock() -> None:
    events = Events("book", 1, np.array([START, START - 1]), np.ones((2, 8)))
    with pytest.raises(DataError, match="out of order"):
        nautilus_data(events, ONE)


def test_bars_and_book_changes_are_fed_too() -> None:
    """The feeds that the backtest on a recording does not take: their subscriptions and their rows."""
    minute = BarType.from_str(f"{ONE.id}-1-MINUTE-LAST-EXTERNAL")
    values = np.column_stack([np.full((9, 4), 100.0), np.full(9, 7.0)])
    times = START + np.arange(1, 10) * 60 * SECOND
    short = FeatureSpec("short", "bars", 0, default_bars_spec().features[:2], 3_600 * SECOND, WARMUP)
    client = mock_client(make_manifest(spec=short))
    strategy = Buyer(config(feed="bars", bar_type=minute), client=client)
    with ran(strategy, nautilus_data(Events("bars", 0, times, values), ONE, minute)):
        pass
    assert [ts_ns for ts_ns, _ in strategy.seen] == times[WARMUP:].tolist()

    def change(step: int) -> OrderBookDeltas:
        sides = ((OrderSide.BUY, 100.0, 1 + step), (OrderSide.SELL, 100.01, 2))
        orders = [BookOrder(side, ONE.make_price(price), ONE.make_qty(size), 0) for side, price, size in sides]
        flags, ts_ns = (0, RecordFlag.F_LAST), START + step * MS
        return OrderBookDeltas(
            ONE.id,
            [
                OrderBookDelta(ONE.id, BookAction.UPDATE, order, flag, 0, ts_ns, ts_ns)
                for order, flag in zip(orders, flags, strict=True)
            ],
        )

    strategy = Buyer(config(feed="deltas"), client=scripted())
    with ran(strategy, [change(step) for step in range(WARMUP + 3)]):
        pass
    assert [ts_ns for ts_ns, _ in strategy.seen] == [START + step * MS for step in range(WARMUP, WARMUP + 3)]


def test_what_the_page_shows_is_a_strategy(root: Path) -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "engines.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(shown, names)
    strategy = names["Follow"](config(), client=scripted())
    with ran(strategy, quotes(range(WARMUP + 3))):
        pass
    assert strategy.counts == {"OK": 3}


@pytest.mark.parametrize(
    ("options", "field"),
    [({"feed": "bars"}, "feed"), ({"rules": "nyse"}, "rules"), ({"model": "other"}, "model")],
)
def test_a_configuration_that_does_not_fit_ends_the_start(options: dict[str, Any], field: str) -> None:
    made = SignalStrategyConfig(**({"instrument_id": ONE.id, "model": MODEL} | options))
    with pytest.raises(UsageError, match=field), ran(Buyer(made, client=scripted()), quotes(range(2))):
        pass


def test_a_model_of_more_levels_than_the_feed_has_is_refused() -> None:
    client = mock_client(make_manifest(spec=default_book_spec(5)))
    with pytest.raises(UsageError, match=r"feed.*5 levels"), ran(Buyer(config(), client=client), quotes(range(2))):
        pass

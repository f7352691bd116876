"""A NautilusTrader backtest on recorded data whose strategy asks the served model in its event loop.

    tickserve serve &                                            # after `make demo DATA=recording`
    python examples/nautilus_backtest.py --data recording --model btcusdt-l5-gbdt

The strategy is the simplest there is: long while the model says up, short while it says down, flat when it says flat.
A signal that is not `OK` (`FALLBACK`, `STALE`, ...) closes the position and opens none. Simulated time stands still
during a call, so orders fill as if the answer had taken no time; what the calls really took is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nautilus_trader.backtest.engine import BacktestEngine, BacktestEngineConfig
from nautilus_trader.config import LoggingConfig
from nautilus_trader.model.currencies import USD
from nautilus_trader.model.enums import AccountType, AssetClass, BookType, OmsType, OrderSide, TimeInForce
from nautilus_trader.model.identifiers import InstrumentId, Symbol, Venue
from nautilus_trader.model.instruments import Cfd
from nautilus_trader.model.objects import Money, Price, Quantity

from market.readers import Source, open_source
from tickserve.client import newest_versions
from tickserve.engines.nautilus import SignalStrategy, SignalStrategyConfig, decimals, nautilus_data
from tickserve.errors import TickserveError, UsageError
from tickserve.events import Events
from tickserve.manifest import load_manifest
from tickserve.signal import Signal

POSITION = {"down": -1, "flat": 0, "up": 1}
# How the reader of each venue makes rows of its books.
RULES = {"us-equity": "lean-equity", "fxcm": "lean-fx", "fx": "lean-fx"}
CASH = Money(1_000_000, USD)


class FollowConfig(SignalStrategyConfig, kw_only=True, frozen=True):
    """`size`: units of the instrument held while the model says up or, sold, while it says down."""

    size: str = "1"
    quiet: bool = False


class Follow(SignalStrategy):
    """Holds what the model asks for."""

    def __init__(self, config: FollowConfig, **given: Any) -> None:
        super().__init__(config, **given)
        self.call_us: list[float] = []

    def on_model_signal(self, signal: Signal, ts_ns: int) -> None:
        """Trade the difference between the position wanted and the position held."""
        self.call_us.append(signal.stage_us["total"])
        instrument = self.cache.instrument(self.config.instrument_id)
        if self.cache.orders_inflight(instrument_id=instrument.id) or self.cache.orders_open(
            instrument_id=instrument.id
        ):
            return
        wanted = POSITION[signal.decision[0]] if signal.ok and signal.decision is not None else 0
        held = self.portfolio.net_position(instrument.id)
        change = wanted * self.size_for(signal, self.config.size) - held
        if not change:
            return
        order = self.order_factory.market(
            instrument.id,
            OrderSide.BUY if change > 0 else OrderSide.SELL,
            instrument.make_qty(abs(change)),
            time_in_force=TimeInForce.IOC,  # what the recorded book does not hold is not waited for
            reduce_only=wanted == 0,
        )
        self.submit_on(signal, order)
        if not self.config.quiet:
            score = "none" if signal.score is None else f"{signal.score[0]:+.4f}"
            print(f"{ts_ns} {signal.status} score {score} -> {order.side_string()} {order.quantity}")

    def on_no_signal(self, reason: str, error: TickserveError | None) -> None:
        """Nothing is opened; the position stays until the next signal."""
        print(f"no signal: {reason}", file=sys.stderr)


def read(source: Source, most: int) -> Events:
    """The first `most` events of the recording (0: all)."""
    chunks, count = [], 0
    for chunk in source.chunks():
        chunks.append(chunk)
        count += len(chunk)
        if most and count >= most:
            break
    times, values = np.concatenate([each.ts_ns for each in chunks]), np.concatenate([each.values for each in chunks])
    most = most or count
    return Events(source.kind, source.levels, times[:most], values[:most])


def instrument_of(source: Source, events: Events) -> Cfd:
    """The recording's instrument, with the precision that its numbers have; settled in dollars, sold short freely."""
    prices = max(decimals(events.values[:, 1]), decimals(events.values[:, 4::2]))
    sizes = max(decimals(events.values[:, 2]), decimals(events.values[:, 5::2]))
    symbol = source.symbol.upper()
    venue = Venue(source.venue.upper().replace("-", "_"))  # a hyphen ends the venue in the name of an account
    return Cfd(
        InstrumentId(Symbol(symbol), venue),
        Symbol(symbol),
        AssetClass.ALTERNATIVE,
        USD,
        prices,
        sizes,
        Price(10**-prices, prices),
        Quantity(10**-sizes, sizes),
        0,
        0,
    )


def engine_of(instrument: Cfd, events: Events) -> BacktestEngine:
    """An engine with one venue, the instrument, and the events as its market data."""
    engine = BacktestEngine(BacktestEngineConfig(logging=LoggingConfig(log_level="ERROR"), run_analysis=False))
    engine.add_venue(
        instrument.id.venue,
        OmsType.NETTING,
        AccountType.MARGIN,
        [CASH],
        book_type=BookType.L1_MBP if events.levels == 1 else BookType.L2_MBP,
    )
    engine.add_instrument(instrument)
    engine.add_data(nautilus_data(events, instrument), sort=False)
    return engine


def levels_of(repository: Path, model: str) -> int:
    """Book levels that the model was trained on. Raises UsageError for an unknown model or one of bars."""
    found = newest_versions(repository)
    manifest = load_manifest(found[model]) if model in found else None
    if manifest is None or manifest.stream is None or manifest.stream.spec["kind"] != "book":
        raise UsageError("not a model of order books here", field="--model", expected=", ".join(found), was=repr(model))
    return int(manifest.stream.spec["levels"])


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Run the backtest; what came of it as plain values."""
    source = open_source(chosen.data, levels=levels_of(chosen.repository, chosen.model))
    events = read(source, chosen.events)
    instrument = instrument_of(source, events)
    engine = engine_of(instrument, events)
    config = FollowConfig(
        instrument_id=instrument.id,
        model=chosen.model,
        url=chosen.url,
        repository=str(chosen.repository),
        feed="quotes" if events.levels == 1 else "depth",
        rules=RULES.get(source.venue, "binance"),
        deadline_ms=chosen.deadline_ms,
        fallback=chosen.fallback,
        journal=str(chosen.journal),
        size=chosen.size,
        quiet=chosen.json,
    )
    strategy = Follow(config)
    engine.add_strategy(strategy)
    try:
        engine.run()
        return told(engine, strategy, len(events))
    finally:
        engine.dispose()


def told(engine: BacktestEngine, strategy: Follow, events: int) -> dict[str, Any]:
    """Counts, orders, profit and the time of the calls."""
    instrument_id = strategy.config.instrument_id
    pnl = [engine.portfolio.realized_pnl(instrument_id), engine.portfolio.unrealized_pnl(instrument_id)]
    times = np.array(strategy.call_us) if strategy.call_us else np.array([np.nan])
    return {
        "events": events,
        "rows_refused": dict(strategy.rows.counts),
        "signals": len(strategy.call_us),
        "by_status": dict(strategy.counts),
        "orders": len(engine.cache.orders()),
        "filled": len([order for order in engine.cache.orders() if order.is_closed and order.filled_qty]),
        "position": str(engine.portfolio.net_position(instrument_id)),
        "pnl_realized": None if pnl[0] is None else pnl[0].as_double(),
        "pnl_unrealized": None if pnl[1] is None else pnl[1].as_double(),
        "call_us": {name: float(np.percentile(times, point)) for name, point in (("p50", 50), ("p99", 99))},
    }


def main(arguments: Sequence[str]) -> None:
    """Read the options, run, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, nargs="+", help="a recording of one instrument's book")
    parser.add_argument("--model", required=True)
    parser.add_argument("--url", default="127.0.0.1:8000")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="what the engine pins")
    parser.add_argument("--journal", type=Path, default=Path("journal"))
    parser.add_argument("--deadline-ms", type=float, default=50.0)
    parser.add_argument("--fallback", choices=["flat", "signal"], help="a labelled signal instead of a failure")
    parser.add_argument("--size", default="1", help="units to hold")
    parser.add_argument("--events", type=int, default=0, help="end after so many; 0: at the end of the recording")
    parser.add_argument("--json", action="store_true", help="print the result as JSON and no decisions")
    chosen = parser.parse_args(arguments)
    result = run(chosen)
    if chosen.json:
        print(json.dumps(result))
        return
    statuses = ", ".join(f"{count:,} {status}" for status, count in result["by_status"].items())
    calls, pnl = result["call_us"], (result["pnl_realized"], result["pnl_unrealized"])
    print(f"{result['events']:,} events, {result['signals']:,} signals ({statuses}), {result['orders']:,} orders")
    print(f"PnL realized {pnl[0]}, unrealized {pnl[1]}, without fees; position {result['position']}")
    print(f"calls: p50 {calls['p50']:,.0f} us, p99 {calls['p99']:,.0f} us; journal: {chosen.journal}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except TickserveError as error:
        sys.exit(f"error: {error}")

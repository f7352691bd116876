"""A NautilusTrader strategy that feeds a model's stream and is told its signals, in the engine's event loop.

Every message becomes a row, every row an event of the stream, and where training would have kept the row the served
model is asked, inside the deadline. Nothing here trades: `on_model_signal` does.
"""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any, Literal

from nautilus_trader.core.data import Data
from nautilus_trader.model.data import (
    Bar,
    BarType,
    DataType,
    InstrumentStatus,
    OrderBookDeltas,
    OrderBookDepth10,
    QuoteTick,
    TradeTick,
)
from nautilus_trader.model.enums import BookType, MarketStatusAction, OrderSide
from nautilus_trader.model.identifiers import InstrumentId
from nautilus_trader.model.orders import Order
from nautilus_trader.trading.config import StrategyConfig
from nautilus_trader.trading.strategy import Strategy

from tickserve.client import Client
from tickserve.engines.nautilus._rows import RULES, BarRows, BookRows
from tickserve.errors import DataError, RequestError, TickserveError, UsageError
from tickserve.journal import Journal
from tickserve.signal import Signal
from tickserve.stream import Stream

Feed = Literal["quotes", "depth", "deltas", "bars"]
HALTS = {
    MarketStatusAction.HALT,
    MarketStatusAction.PAUSE,
    MarketStatusAction.SUSPEND,
    MarketStatusAction.CLOSE,
    MarketStatusAction.NOT_AVAILABLE_FOR_TRADING,
}
RESUMES = {MarketStatusAction.TRADING}
HALTED = "halted"


class SignalStrategyConfig(StrategyConfig, kw_only=True, frozen=True):
    """What a `SignalStrategy` needs; plain values, so that a trading node's configuration can hold it.

    - `instrument_id`, `model`: whose data is fed to which model; `url`, `repository`: as `Client` takes them.
    - `feed`: which data of the instrument; trades come along unless it is "bars", which need `bar_type`.
    - `rules`: which books make a row, by the reader of the training data (`RULES`).
    - `deadline_ms`: for one call; the engine's loop stands still no longer.
    - `max_age_ms`: older events give `STALE`; for live trading, since a backtest's events are all old.
    - `fallback`: None (a failure is told to `on_no_signal`), or "flat" or "signal" as `Client` takes them.
    - `journal`: a folder for every decision and action (None: no journal).
    - `risk_actions`: the action file that signals obey (None: none); `size_for` then gives what may be traded.
    """

    instrument_id: InstrumentId
    model: str
    url: str = "127.0.0.1:8000"
    repository: str = "model_repository"
    feed: Feed = "quotes"
    bar_type: BarType | None = None
    rules: str = "binance"
    deadline_ms: float = 50.0
    max_age_ms: float | None = None
    fallback: Literal["flat", "signal"] | None = None
    journal: str | None = None
    risk_actions: str | None = None


class ModelSignal(Data):  # type: ignore[misc]  # nautilus' Data is untyped
    """A `Signal` as nautilus data: `subscribe_data(DataType(ModelSignal))` in any actor receives it.

    `ts_event` is the time of the newest event behind it, `ts_init` the engine's clock.
    """

    def __init__(self, signal: Signal, instrument_id: InstrumentId, ts_event: int, ts_init: int) -> None:
        self.signal, self.instrument_id = signal, instrument_id
        self._ts_event, self._ts_init = ts_event, ts_init

    @property
    def ts_event(self) -> int:
        """Nanoseconds of the newest event."""
        return self._ts_event

    @property
    def ts_init(self) -> int:
        """Nanoseconds of the engine's clock."""
        return self._ts_init


class SignalStrategy(Strategy):  # type: ignore[misc]  # nautilus' Strategy is untyped
    """Override `on_model_signal` (and `on_no_signal`), and send orders with `submit_on`.

    `client` and `journal` replace those that the configuration names, for tests and for several strategies over one;
    they stay open then. `counts` says what became of the messages: signals by status, refused and failed by error type.
    Raises UsageError when configuration and model do not fit, at the start.
    """

    def __init__(
        self, config: SignalStrategyConfig, *, client: Client | None = None, journal: Journal | None = None
    ) -> None:
        super().__init__(config)
        self.counts: Counter[str] = Counter()
        self.halted = False
        self.stream: Stream
        self.rows: BookRows | BarRows
        self._given, self._client, self._journal = client, client, journal
        self._owned: list[Client | Journal] = []

    # What a strategy overrides.

    def on_model_signal(self, signal: Signal, ts_ns: int) -> None:
        """A signal for the event of `ts_ns`. One whose status is not `OK` has no number of the model's to act on."""

    def on_no_signal(self, reason: str, error: TickserveError | None) -> None:
        """A call that failed, an event that was refused (`error`), or a halt: nothing may be opened on it."""

    # What a strategy calls.

    def size_for(self, signal: Signal, size: Decimal | str) -> Decimal:
        """`size` times the signal's `size_factor`, down to the instrument's step; 0 is too little to trade."""
        step: Decimal = self.cache.instrument(self.config.instrument_id).size_increment.as_decimal()
        wanted = Decimal(size) * Decimal(str(signal.size_factor))
        return wanted // step * step

    def submit_on(self, signal: Signal, order: Order) -> None:
        """Submit `order` because of `signal`, and write it into the journal beside the decision.

        Raises UsageError for an order that could open a position on a signal that is not `OK`, or in a halt.
        """
        reason = HALTED if self.halted else "" if signal.ok else signal.status
        if reason and not order.is_reduce_only:
            raise UsageError(f"{reason}: no position may be opened", field="order", expected="reduce_only=True")
        self.submit_order(order)
        if self._journal is not None:
            side = "buy" if order.side == OrderSide.BUY else "sell"
            self._journal.action(
                signal.request_id,
                f"{side} {order.quantity}",
                order=order.client_order_id,
                instrument=order.instrument_id,
                reduce_only=order.is_reduce_only,
                engine_ns=self.clock.timestamp_ns(),
            )

    # What the engine calls.

    def on_start(self) -> None:
        """Open client and journal, hold the feed against the model's manifest, subscribe."""
        self._open()
        definition = self.stream.definition.spec
        config = self.config
        if (definition.kind == "bars") != (config.feed == "bars"):
            raise UsageError("not what the model takes", field="feed", expected=definition.kind, was=config.feed)
        if config.feed == "bars":
            if config.bar_type is None or config.bar_type.instrument_id != config.instrument_id:
                raise UsageError(
                    "bars need a type",
                    field="bar_type",
                    expected=f"one of {config.instrument_id}",
                    was=str(config.bar_type),
                )
            self.rows = BarRows(config.instrument_id)
            self.subscribe_bars(config.bar_type)
        else:
            self.rows = self._book_rows(definition.levels)
            self.subscribe_trade_ticks(config.instrument_id)
        self.subscribe_instrument_status(config.instrument_id)

    def _open(self) -> None:
        config = self.config
        if self._journal is None and config.journal is not None:
            self._journal = Journal(config.journal, label=str(self.id))
            self._owned.append(self._journal)
        if self._client is None:
            self._client = Client(
                config.url,
                manifest=None if config.url.startswith("local://") else config.repository,
                deadline_ms=config.deadline_ms,
                max_age_ms=config.max_age_ms,
                fallback=config.fallback,
                observer=self._journal,
                risk_actions=config.risk_actions,
            )
            self._owned.insert(0, self._client)
        self.stream = Stream(self._client, config.model, deadline_ms=config.deadline_ms)

    def _book_rows(self, levels: int) -> BookRows:
        config, most = self.config, {"quotes": 1, "depth": 10}
        if config.rules not in RULES:
            raise UsageError("unknown", field="rules", expected=f"one of {', '.join(RULES)}", was=repr(config.rules))
        if levels > most.get(config.feed, levels):
            raise UsageError("the model takes more levels", field="feed", expected=f"{levels} levels", was=config.feed)
        if config.feed == "quotes":
            self.subscribe_quote_ticks(config.instrument_id)
        elif config.feed == "depth":
            self.subscribe_order_book_depth(config.instrument_id)
        else:
            self.subscribe_order_book_deltas(config.instrument_id, book_type=BookType.L2_MBP)
        return BookRows(config.instrument_id, levels, RULES[config.rules])

    def on_stop(self) -> None:
        """Close what `on_start` opened: the client, then the journal, which is written to its end."""
        for each in self._owned:
            each.close()
        self._owned.clear()
        self._client = self._given

    def on_reset(self) -> None:
        """Forget what was counted and that the market was halted."""
        self.counts.clear()
        self.halted = False

    def on_quote_tick(self, tick: QuoteTick) -> None:
        """See `_take`."""
        self._take(tick)

    def on_order_book_depth(self, depth: OrderBookDepth10) -> None:
        """See `_take`."""
        self._take(depth)

    def on_order_book_deltas(self, deltas: OrderBookDeltas) -> None:
        """See `_take`."""
        self._take(deltas)

    def on_trade_tick(self, tick: TradeTick) -> None:
        """See `_take`."""
        self._take(tick)

    def on_bar(self, bar: Bar) -> None:
        """See `_take`."""
        self._take(bar)

    def on_instrument_status(self, data: InstrumentStatus) -> None:
        """In a halt events still feed the stream, as they fed training, but no signal is handed on."""
        if data.action in HALTS or data.is_trading is False:
            self.halted = True
        elif data.action in RESUMES or data.is_trading:
            self.halted = False

    def _take(self, data: Any) -> None:
        """One message: its row, the stream, the signal. What is refused or fails is told, never raised."""
        try:
            event = self.rows.take(data)
            step = None if event is None else self.stream.feed(event.ts_ns, event.row)
        except (RequestError, DataError) as error:
            self.counts[type(error).__name__] += 1
            self.on_no_signal(str(error), error)
            return
        if event is None or step is None or step.signal is None:
            return
        signal = step.signal
        self.counts[signal.status] += 1
        said = ModelSignal(signal, self.config.instrument_id, event.ts_ns, self.clock.timestamp_ns())
        self.publish_data(DataType(ModelSignal), said)
        if self.halted:
            self.on_no_signal(HALTED, None)
        else:
            self.on_model_signal(signal, event.ts_ns)

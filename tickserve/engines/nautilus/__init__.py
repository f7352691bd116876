"""NautilusTrader: its market data as the rows a model was trained on, and a strategy that is told the model's signals.

Needs the extra `engines` (nautilus-trader), and `stream` for the features. Tested with nautilus-trader 1.221.
"""

from tickserve.errors import MissingExtraError

try:
    import nautilus_trader  # noqa: F401
except ModuleNotFoundError as missing:
    raise MissingExtraError.of("nautilus_trader", "engines") from missing

from tickserve.engines.nautilus._backtest import decimals, nautilus_data
from tickserve.engines.nautilus._rows import RULES, BarRows, BookRows, BookRules, Event
from tickserve.engines.nautilus._strategy import ModelSignal, SignalStrategy, SignalStrategyConfig

__all__ = [
    "RULES",
    "BarRows",
    "BookRows",
    "BookRules",
    "Event",
    "ModelSignal",
    "SignalStrategy",
    "SignalStrategyConfig",
    "decimals",
    "nautilus_data",
]

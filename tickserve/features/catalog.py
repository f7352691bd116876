"""The kinds of features there are: for each its number in the kernels, its parameters, and how much state it needs.

No numba here: a client reads specs without compiling anything. The arithmetic of a kind is in `book_updates.py` or
`bar_updates.py`, under the kind's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from tickserve.errors import UsageError
from tickserve.events import Kind

# A time horizon is sampled on this many slots, so that its state is bounded however fast events come.
HORIZON_SLOTS: Final = 64
# Slots inside a horizon, the sample before it, the newest one and some to spare; a power of two.
HORIZON_CAPACITY: Final = 128
HORIZON_HEADER: Final = 4
MAX_COUNT: Final = 4_096
MAX_SECONDS: Final = 86_400.0
FIRST_BAR_ID: Final = 100

Number = float | int


def _none(_: Mapping[str, Number]) -> int:
    return 1


def _few(_: Mapping[str, Number]) -> int:
    return 4


def _horizon(_: Mapping[str, Number]) -> int:
    return HORIZON_HEADER + 2 * HORIZON_CAPACITY


def _rings(rings: int) -> Callable[[Mapping[str, Number]], int]:
    """A header of 4 and `rings` windows of `count` values."""
    return lambda params: 4 + rings * int(params["count"])


def _long_ring(params: Mapping[str, Number]) -> int:
    return 4 + int(params["long"])


@dataclass(frozen=True)
class FeatureKind:
    """One kind: `id` in the kernels, the rows it reads, its parameters in order, its state in float64 words.

    `cost` is relative and only shares features out among threads.
    """

    id: int
    rows: Kind
    parameters: tuple[str, ...]
    state_words: Callable[[Mapping[str, Number]], int]
    cost: int = 1


BOOK_KINDS: Final[dict[str, FeatureKind]] = {
    "microprice_deviation": FeatureKind(0, "book", (), _none),
    "relative_spread": FeatureKind(1, "book", (), _none),
    "level_imbalance": FeatureKind(2, "book", ("level",), _none),
    "depth_imbalance": FeatureKind(3, "book", ("levels",), _none),
    "depth_weighted_deviation": FeatureKind(4, "book", ("levels",), _none),
    "order_flow_imbalance": FeatureKind(5, "book", ("tau_s",), _none),
    "order_flow_imbalance_events": FeatureKind(6, "book", ("count",), _few, 2),
    "signed_trade_flow": FeatureKind(7, "book", ("tau_s",), _none),
    "realised_volatility": FeatureKind(8, "book", ("tau_s",), _none),
    "mid_return": FeatureKind(9, "book", ("horizon_s",), _horizon, 4),
    "mid_return_events": FeatureKind(10, "book", ("count",), _none),
    "event_rate": FeatureKind(11, "book", ("tau_s",), _none),
    "trade_rate": FeatureKind(12, "book", ("tau_s",), _none),
    "time_since_trade": FeatureKind(13, "book", (), _none),
    "time_since_event": FeatureKind(14, "book", (), _none),
    "time_of_day_sin": FeatureKind(15, "book", (), _few),
    "time_of_day_cos": FeatureKind(16, "book", (), _few),
    "spread_deviation": FeatureKind(17, "book", ("tau_s",), _none),
    "depth_deviation": FeatureKind(18, "book", ("tau_s",), _none),
    "mid_deviation": FeatureKind(19, "book", ("tau_s",), _none),
    "trade_deviation": FeatureKind(20, "book", (), _none),
}

BAR_KINDS: Final[dict[str, FeatureKind]] = {
    "bar_return": FeatureKind(FIRST_BAR_ID + 0, "bars", ("count",), _rings(1)),
    "bar_volatility": FeatureKind(FIRST_BAR_ID + 1, "bars", ("count",), _rings(1), 3),
    "average_true_range": FeatureKind(FIRST_BAR_ID + 2, "bars", ("count",), _few),
    "relative_strength_index": FeatureKind(FIRST_BAR_ID + 3, "bars", ("count",), _few),
    "macd": FeatureKind(FIRST_BAR_ID + 4, "bars", ("fast", "slow"), _few),
    "macd_histogram": FeatureKind(FIRST_BAR_ID + 5, "bars", ("fast", "slow", "signal"), _few),
    "bollinger_position": FeatureKind(FIRST_BAR_ID + 6, "bars", ("count",), _rings(1), 4),
    "stochastic_k": FeatureKind(FIRST_BAR_ID + 7, "bars", ("count",), _rings(2), 4),
    "volume_zscore": FeatureKind(FIRST_BAR_ID + 8, "bars", ("count",), _rings(1), 8),
    "vwap_deviation": FeatureKind(FIRST_BAR_ID + 9, "bars", ("count",), _rings(2), 6),
    "obv_slope": FeatureKind(FIRST_BAR_ID + 10, "bars", ("count",), _rings(2), 4),
    "parkinson_volatility": FeatureKind(FIRST_BAR_ID + 11, "bars", ("count",), _rings(1), 3),
    "garman_klass_volatility": FeatureKind(FIRST_BAR_ID + 12, "bars", ("count",), _rings(1), 3),
    "rogers_satchell_volatility": FeatureKind(FIRST_BAR_ID + 13, "bars", ("count",), _rings(1), 3),
    "close_location": FeatureKind(FIRST_BAR_ID + 14, "bars", (), _none),
    "bar_range": FeatureKind(FIRST_BAR_ID + 15, "bars", (), _none, 2),
    "opening_gap": FeatureKind(FIRST_BAR_ID + 16, "bars", (), _none, 2),
    "candle_body": FeatureKind(FIRST_BAR_ID + 17, "bars", (), _none),
    "return_autocorrelation": FeatureKind(FIRST_BAR_ID + 18, "bars", ("count",), _rings(2), 8),
    "return_skewness": FeatureKind(FIRST_BAR_ID + 19, "bars", ("count",), _rings(1), 8),
    "drawdown": FeatureKind(FIRST_BAR_ID + 20, "bars", ("count",), _rings(1), 6),
    "streak": FeatureKind(FIRST_BAR_ID + 21, "bars", (), _few),
    "amihud_illiquidity": FeatureKind(FIRST_BAR_ID + 22, "bars", ("count",), _rings(1), 4),
    "efficiency_ratio": FeatureKind(FIRST_BAR_ID + 23, "bars", ("count",), _rings(2), 3),
    "volatility_ratio": FeatureKind(FIRST_BAR_ID + 24, "bars", ("short", "long"), _long_ring, 8),
    "bar_time_of_day_sin": FeatureKind(FIRST_BAR_ID + 25, "bars", (), _few),
    "bar_time_of_day_cos": FeatureKind(FIRST_BAR_ID + 26, "bars", (), _few),
    "time_since_bar": FeatureKind(FIRST_BAR_ID + 27, "bars", (), _none, 2),
}

KINDS: Final[dict[str, FeatureKind]] = BOOK_KINDS | BAR_KINDS


def check_parameter(kind: str, name: str, value: object, levels: int) -> None:
    """Refuse a parameter out of its range; `levels` are those of the spec.

    Names ending in `_s` are seconds in (0, 86400]; `level` and `levels` are 1 to the spec's levels; the rest are
    counts of rows from 1 to 4096. Raises UsageError.
    """
    if name.endswith("_s"):
        well = isinstance(value, (float, int)) and not isinstance(value, bool) and 0 < value <= MAX_SECONDS
        expected = f"seconds above 0, at most {MAX_SECONDS:g}"
    else:
        top = levels if name in ("level", "levels") else MAX_COUNT
        well = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= top
        expected = f"an integer from 1 to {top}"
    if not well:
        raise UsageError("out of range", field=f"{kind}.{name}", expected=expected, was=repr(value)[:40])

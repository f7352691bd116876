"""The canonical market events: what readers produce and what the feature engine steps over.

N events as int64 nanoseconds (UTC) and one float64 row of C columns each. Letters: N events, C columns, L levels.
An order book's row carries the whole state after the event, so that a feature never has to look elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["book", "bars"]

BOOK_UPDATE = 0.0
TRADE = 1.0

# Columns of every book row, before the levels. `event` is BOOK_UPDATE or TRADE; the trade columns are 0 on updates.
# `trade_sign` is +1 where the buyer took liquidity, -1 where the seller did, 0 where the venue does not say.
BOOK_PREFIX = ("event", "trade_price", "trade_size", "trade_sign")
EVENT, TRADE_PRICE, TRADE_SIZE, TRADE_SIGN = range(4)
BAR_COLUMNS = ("open", "high", "low", "close", "volume")
OPEN, HIGH, LOW, CLOSE, VOLUME = range(5)

# The columns without whose prices an event says nothing of the market: the best bid and ask, or all of a bar.
PRICES: dict[Kind, tuple[int, ...]] = {"book": (4, 6), "bars": (OPEN, HIGH, LOW, CLOSE)}


def book_columns(levels: int) -> tuple[str, ...]:
    """Column names of book rows: the prefix, then bid_price_1, bid_size_1, ask_price_1, ask_size_1, bid_price_2, ...

    C = 4 + 4 * levels; level k (from 0) starts at column 4 + 4 * k. An absent level has a NaN price and size 0.
    """
    sides = ("bid_price", "bid_size", "ask_price", "ask_size")
    return BOOK_PREFIX + tuple(f"{side}_{level}" for level in range(1, levels + 1) for side in sides)


def columns_of(kind: Kind, levels: int) -> tuple[str, ...]:
    """Column names of a row of this kind (`levels` is ignored for bars)."""
    return book_columns(levels) if kind == "book" else BAR_COLUMNS


@dataclass(frozen=True)
class Events:
    """A chunk of events in time order.

    `ts_ns` is int64 [N]: when the event could first be known here (receive time where the file has one, else the
    venue's time; for a bar the end of the bar). `values` is float64 [N, C], C-contiguous, columns as `columns_of`.
    """

    kind: Kind
    levels: int
    ts_ns: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ts_ns)

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names of `values`."""
        return columns_of(self.kind, self.levels)

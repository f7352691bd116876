"""One side of a limit order book, kept as a dictionary of sizes and a sorted list of prices with the best at its end.

Prices are keyed by `sign * price` (+1 bids, -1 asks), so that for both sides a larger key is a better price. Prices
come from decimal text, and equal text values give equal floats, so floats are exact keys.
"""

from __future__ import annotations

from bisect import bisect_left, insort

NAN = float("nan")


class BookSide:
    """Sizes by key and keys in rising order. Memory is one entry per price level ever open at the same time."""

    __slots__ = ("keys", "sign", "sizes")

    def __init__(self, sign: float) -> None:
        self.sign = sign
        self.sizes: dict[float, float] = {}
        self.keys: list[float] = []

    def clear(self) -> None:
        """Forget every level."""
        self.sizes.clear()
        self.keys.clear()

    def set(self, price: float, size: float) -> None:
        """Make `price` hold `size`; 0 removes the level."""
        key = self.sign * price
        if size:
            if key not in self.sizes:
                insort(self.keys, key)
            self.sizes[key] = size
        elif self.sizes.pop(key, None) is not None:
            del self.keys[bisect_left(self.keys, key)]

    def set_best(self, price: float, size: float) -> None:
        """Make `price` the best level: everything better is gone, whatever it said."""
        key = self.sign * price
        keys, sizes = self.keys, self.sizes
        while keys and keys[-1] > key:
            del sizes[keys.pop()]
        if not keys or keys[-1] != key:
            keys.append(key)
        sizes[key] = size

    @property
    def best(self) -> float:
        """Best price; NaN where the side is empty."""
        return self.sign * self.keys[-1] if self.keys else NAN

    def top(self, levels: int) -> tuple[list[float], list[float]]:
        """Prices and sizes of the best `levels`, best first; absent levels are NaN and 0."""
        keys = self.keys[: -levels - 1 : -1]
        sign, sizes = self.sign, self.sizes
        prices, amounts = [sign * key for key in keys], [sizes[key] for key in keys]
        missing = levels - len(keys)
        if missing:
            prices += [NAN] * missing
            amounts += [0.0] * missing
        return prices, amounts

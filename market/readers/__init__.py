"""Readers: recorded market data to canonical events. `open_source` finds the reader that a file needs."""

from market.readers.opening import open_source
from market.readers.source import Source

__all__ = ["Source", "open_source"]

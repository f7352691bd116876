"""Tickserve: the number a trading engine receives is the number research computed, or the engine is told why not."""

__version__ = "0.1.0"

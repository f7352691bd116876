"""Readers: recorded market data to canonical events. `open_source` finds the reader that a file needs."""

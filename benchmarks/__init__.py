"""Measurements side by side, for a person to read: `python -m benchmarks.NAME --help`."""

"""Adapters for trading engines, each imported by its own name: `tickserve.engines.nautilus`.

`docs/engines.md` shows them from the engine's side. Importing this package loads no engine.
"""

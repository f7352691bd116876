"""Tickserve: the number a trading engine receives is the number research computed, or the engine is told why not."""

from __future__ import annotations

TYPE_CHECKING = False  # importing `typing` would take most of the time until the command can be interrupted cleanly
if TYPE_CHECKING:
    from typing import Any

    from tickserve.client import Client
    from tickserve.signal import Signal

__version__ = "0.1.0"
__all__ = ["Client", "Signal", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Client` and `Signal` when they are first asked for, so that the command starts without them."""
    if name == "Client":
        from tickserve.client import Client

        return Client
    if name == "Signal":
        from tickserve.signal import Signal

        return Signal
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Online features: feed market events, get signals. The features are the training matrix's, bit for bit.

Needs the extra `stream` (numba). `docs/stream.md` shows it from a trading engine's side.
"""

from tickserve.stream._stream import AsyncStream, Step, Stream

__all__ = ["AsyncStream", "Step", "Stream"]

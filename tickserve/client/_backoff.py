"""How long to leave a replica alone: doubling up to a cap, with jitter, so that many engines do not return at once."""

from __future__ import annotations

import random


class Backoff:
    """Waits in nanoseconds: each is between half and all of a span that doubles from `first_ns` to `cap_ns`."""

    __slots__ = ("_cap_ns", "_first_ns", "_span_ns")

    def __init__(self, first_ns: int, cap_ns: int) -> None:
        self._first_ns, self._cap_ns = first_ns, cap_ns
        self._span_ns = first_ns

    def next_ns(self) -> int:
        """The wait now; the next one is longer."""
        span, self._span_ns = self._span_ns, min(self._cap_ns, 2 * self._span_ns)
        return int(span * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret

    def reset(self) -> None:
        """Begin again with the shortest."""
        self._span_ns = self._first_ns

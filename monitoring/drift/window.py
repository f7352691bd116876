"""A window that moves over the journal's own time, in slices: what is older falls out, and memory is bounded.

Time is the wall clock of the records, so a journal that is read later gives what it would have given then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
NS_PER_S = 1_000_000_000


class Window:
    """Sums of arrays of one `shape` over the newest `window_s`, moved on in `slices` steps."""

    def __init__(self, shape: tuple[int, ...], window_s: float, slices: int, dtype: Any = np.int64) -> None:
        self._shape, self._dtype, self._count = shape, dtype, slices
        self._step_ns = max(1, int(window_s * NS_PER_S / slices))
        self._slices: dict[int, Array] = {}
        self._newest, self._from_ns = -(2**62), -(2**62)

    def at(self, wall_ns: int) -> Array | None:
        """The slice of a moment, to be added to; None for one that has left the window."""
        place = wall_ns // self._step_ns
        if place <= self._newest - self._count or wall_ns < self._from_ns:
            return None
        self.advance(wall_ns)
        if place not in self._slices:
            self._slices[place] = np.zeros(self._shape, self._dtype)
        return self._slices[place]

    def advance(self, wall_ns: int) -> None:
        """Move on to a moment: what is older than the window falls out, though nothing came in."""
        place = wall_ns // self._step_ns
        if place > self._newest:
            self._newest = place
            self._slices = {each: kept for each, kept in self._slices.items() if each > place - self._count}

    def forget(self, before_ns: int) -> None:
        """Begin anew: nothing from before a moment counts any more."""
        self._slices, self._from_ns = {}, before_ns

    def total(self) -> Array:
        """The sum over the window."""
        return sum(self._slices.values(), np.zeros(self._shape, self._dtype))

"""Sessions of a feature set: the engine's own, cut further where a bar series jumps.

The engine starts anew after a gap and knows nothing of splits, and it must not: research and production run the same
engine. So its numbers stay as they are, and the rows a jump spoils are not kept: a jump starts a new session, whose
warm-up is as long as the longest window. Letters: N rows of a chunk.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from market.jumps import jumps, priced
from tickserve.events import Kind


class SessionCounter:
    """Numbers the sessions of one pass, chunk by chunk."""

    def __init__(self, kind: Kind) -> None:
        self._cuts_at_jumps = kind == "bars"
        self._sessions, self._place, self._price = 0, -1, np.nan

    def advance(
        self, index: npt.NDArray[np.int64], price: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Session number int32 [N] and place in it int64 [N] (0 opens one) of the next chunk.

        `index` is the engine's place in its own session, `price` the close (NaN where there is none).
        """
        opens = index == 0
        if self._cuts_at_jumps:
            opens |= jumps(price, self._price)
            known = np.flatnonzero(priced(price))
            self._price = float(price[known[-1]]) if len(known) else self._price
        rows = np.arange(len(index), dtype=np.int64)
        opened = np.maximum.accumulate(np.where(opens, rows, -1 - self._place))
        session = self._sessions + np.cumsum(opens) - 1
        place = rows - opened
        if len(rows):
            self._sessions, self._place = int(session[-1]) + 1, int(place[-1])
        return session.astype(np.int32), place

"""Events to rows, one at a time, as `market.build` made them all at once: engine, sessions, warm-up, every k-th.

Letters: C columns of an event, F features.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tickserve.events import CLOSE
from tickserve.features.engine import FeatureEngine
from tickserve.stream._definition import Definition

Singles = npt.NDArray[np.float32]


class Row(NamedTuple):
    """What one event led to. `features` float32 [F]; `kept`: a row of training's pace; `session` counts from 0.

    `place` is the event's place in its session; below the spec's warm-up nothing is kept.
    """

    features: Singles
    kept: bool
    session: int
    place: int


class RowMaker:
    """The state between events: the engine's, and where the session and the pace stand."""

    def __init__(self, definition: Definition) -> None:
        self._definition, self._engine = definition, FeatureEngine(definition.spec, threads=1)
        self._warmup, self._stride = definition.spec.warmup_events, definition.stride
        self._factor = definition.jump_factor
        self._session, self._place, self._warm, self._price = -1, -1, 0, math.nan

    def step(self, ts_ns: int, row: npt.NDArray[np.float64]) -> Row:
        """Advance by one event, float64 [C]. Raises SchemaError for another length or type, and stays as it was."""
        features = self._engine.step(ts_ns, row)
        opens = self._engine.events_seen == 1
        if self._factor is not None and self._jumped(float(row[CLOSE]), self._factor):
            opens = True
        self._session, self._place = self._session + opens, 0 if opens else self._place + 1
        warm = self._place >= self._warmup
        kept = warm and self._warm % self._stride == 0
        self._warm += warm
        if kept and np.isinf(features).any():
            features[np.isinf(features)] = np.nan  # as training took it: the client refuses infinity
        return Row(features, kept, self._session, self._place)

    def _jumped(self, price: float, factor: float) -> bool:
        """Whether the price left the last one by more than the factor; an event without a price never does."""
        if not (math.isfinite(price) and price > 0):
            return False
        ratio, self._price = price / self._price, price
        return ratio > factor or ratio < 1 / factor

    def restart(self) -> None:
        """The next event opens a session, as the first one ever did; the pace goes on."""
        self._engine.reset()

    @property
    def until_kept(self) -> int:
        """Events to the next row, in a session past its warm-up."""
        return -self._warm % self._stride + 1

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything the next row depends on."""
        numbers = np.array([self._session, self._place, self._warm], np.int64)
        return self._engine.state() | {"place": numbers, "price": np.array([self._price])}

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Go on where `state` was taken. Raises SchemaError for one of another spec."""
        self._engine.restore(state)
        self._session, self._place, self._warm = (int(number) for number in state["place"])
        self._price = float(state["price"][0])

"""Rows to what a model takes: a row as it is, a window of rows, or a row with the state the last answer left.

Letters: T steps of a window, F features, L layers, H hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tickserve.manifest import StateTensor
from tickserve.signal import Signal
from tickserve.stream._definition import Definition

Singles = npt.NDArray[np.float32]
Inputs = dict[str, Singles]
# Rows a stateful stream keeps while no answer comes; beyond them it starts anew rather than never catch up.
MAX_PENDING = 256


class Feeder(Protocol):
    """What stands between rows and requests."""

    def push(self, row: Singles, *, opens: bool) -> str:
        """Take the next row; `opens`: it is the first of its session. Why nothing can be asked yet, or ''."""
        ...

    def ask(self) -> Inputs | None:
        """The next inputs to score, None when all is answered. The same again until `answered`."""
        ...

    def answered(self, signal: Signal) -> bool:
        """Take the answer to `ask`; whether to go on asking."""
        ...

    def repeat(self) -> Inputs | None:
        """What was last answered, to be asked once more without moving on."""
        ...

    def take_reset(self) -> bool:
        """Whether an answer since the last time this was asked was the first after starting anew."""
        ...

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What the next input depends on."""
        ...

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on where `state` was taken."""
        ...


def feeder(definition: Definition) -> Feeder:
    """The feeder of a model."""
    width = len(definition.spec.columns)
    if definition.state:
        return Carried(definition.input, definition.state, width)
    return Windows(definition.input, definition.window or 1, width, flat=definition.window is None)


class Windows:
    """The last T rows of a session; with `flat` a row on its own."""

    def __init__(self, name: str, steps: int, width: int, *, flat: bool) -> None:
        self._name, self._steps, self._flat = name, steps, flat
        # Each row is kept twice, T apart, so that every window lies in one piece.
        self._rows = np.zeros((2 * steps, width), np.float32)
        self._held, self._at = 0, 0
        self._waiting = False

    def push(self, row: Singles, *, opens: bool) -> str:
        """See `Feeder`."""
        if opens:
            self._held = 0
        self._rows[self._at] = self._rows[self._at + self._steps] = row
        self._at = (self._at + 1) % self._steps
        self._held = min(self._held + 1, self._steps)
        self._waiting = self._held == self._steps
        return "" if self._waiting else f"the window fills: {self._held} of {self._steps} rows"

    def ask(self) -> Inputs | None:
        """See `Feeder`."""
        return self.repeat() if self._waiting else None

    def answered(self, signal: Signal) -> bool:
        """See `Feeder`."""
        self._waiting = False
        return False

    def repeat(self) -> Inputs | None:
        """See `Feeder`."""
        if self._held < self._steps:
            return None
        window = self._rows[self._at : self._at + self._steps]
        return {self._name: window if self._flat else window[np.newaxis]}

    def take_reset(self) -> bool:
        """See `Feeder`: there is no state."""
        return False

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """See `Feeder`."""
        return {"rows": self._rows, "window": np.array([self._held, self._at, self._waiting], np.int64)}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """See `Feeder`."""
        self._rows[:] = state["rows"]
        held, at, waiting = state["window"].tolist()
        self._held, self._at, self._waiting = held, at, bool(waiting)


class _Pending(NamedTuple):
    row: Singles
    starts: bool  # from zeros


class Carried:
    """A row and the state of its stream. Rows without an answer wait, in order: the state never skips one."""

    def __init__(self, name: str, tensors: tuple[StateTensor, ...], width: int) -> None:
        self._name, self._width, self._tensors = name, width, tensors
        self._zeros = {tensor.input: np.zeros((1, *tensor.shape), np.float32) for tensor in tensors}
        self._state: Mapping[str, Singles] = self._zeros
        self._pending: list[_Pending] = []
        self._last: Inputs | None = None
        self._bundle_id = 0
        self._steps = 0  # answered since the stream began
        self._reset = False

    def push(self, row: Singles, *, opens: bool) -> str:
        """See `Feeder`."""
        if len(self._pending) >= MAX_PENDING:
            self._pending, opens = [], True
        self._pending.append(_Pending(row, opens))
        return ""

    def ask(self) -> Inputs | None:
        """See `Feeder`."""
        if not self._pending:
            return None
        row, starts = self._pending[0]
        state = self._zeros if starts else self._state
        return {self._name: row[np.newaxis], **state}

    def answered(self, signal: Signal) -> bool:
        """See `Feeder`."""
        if signal.state is None:
            return False  # stale, or a stand-in: the row waits
        row, starts = self._pending[0]
        if self._bundle_id not in (0, signal.bundle_id) and not starts:
            # Another model was put in force: the state is none of its own, so it starts from zeros.
            self._pending[0] = _Pending(row, starts=True)
            return True
        self._last = self.ask()
        self._reset |= starts and self._steps > 0
        self._state, self._bundle_id, self._steps = signal.state, signal.bundle_id, self._steps + 1
        del self._pending[0]
        return bool(self._pending)

    def repeat(self) -> Inputs | None:
        """See `Feeder`."""
        return self._last

    def take_reset(self) -> bool:
        """See `Feeder`."""
        taken, self._reset = self._reset, False
        return taken

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """See `Feeder`."""
        rows = [each.row for each in self._pending]
        kept = {
            "pending": np.array(rows, np.float32).reshape(len(rows), self._width),
            "starts": np.array([each.starts for each in self._pending], np.bool_),
            "carried": np.array([self._bundle_id, self._steps, self._reset], np.int64),
        }
        last = {f"last.{name}": array for name, array in (self._last or {}).items()}
        return kept | last | {f"state.{name}": array for name, array in self._state.items()}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """See `Feeder`."""
        self._pending = [_Pending(*each) for each in zip(state["pending"], state["starts"].tolist(), strict=True)]
        self._bundle_id, self._steps, reset = state["carried"].tolist()
        self._reset = bool(reset)
        self._state = {name: state[f"state.{name}"] for name in self._zeros}
        names = (self._name, *self._zeros)
        self._last = {name: state[f"last.{name}"] for name in names} if f"last.{self._name}" in state else None

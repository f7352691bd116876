"""The state a stateful model's caller carries: what goes in is finite, and so is what comes out, or it is refused.

Letters: B rows (streams), L layers, H hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tickserve.client._lanes import all_finite
from tickserve.client._transport import Array
from tickserve.errors import InputRejectedError, ProtocolError

FEW_BYTES = 4_096


def finite(data: bytes) -> bool:
    """Whether every float32 in `data` is finite."""
    return (
        all_finite(data) if len(data) <= FEW_BYTES else b"\0" not in np.isfinite(np.frombuffer(data, "<f4")).tobytes()
    )


def check_state(name: str, array: npt.NDArray[Any]) -> tuple[str, ...]:
    """No flags; raises InputRejectedError: a state that is not finite would spoil every later number of its stream."""
    if b"\0" in np.isfinite(array).tobytes():  # cheaper than numpy's reduction on a short array
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise InputRejectedError(f"row {row}: not finite", field=name, expected="the state of an answer, or zeros")
    return ()


def next_state(outputs: Mapping[str, Array], pairs: Sequence[tuple[str, str]]) -> Mapping[str, npt.NDArray[np.float32]]:
    """A stateful model's next state by the names of its inputs, read-only. Raises ProtocolError."""
    state = {}
    for fed_back, name in pairs:
        array = outputs[name]
        if not finite(array.tobytes()):
            raise ProtocolError("the state of the answer is not finite", field=name, expected="finite numbers")
        if array.flags.writeable:
            array = array.view()
            array.flags.writeable = False
        state[fed_back] = array
    return state

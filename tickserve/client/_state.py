"""The state a stateful model's caller carries: what goes in is finite, and so is what comes out, or it is refused.

Letters: B rows (streams), L layers, H hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tickserve.client._transport import Array
from tickserve.errors import InputRejectedError, ProtocolError

FEW_BYTES = 4_096  # up to here one whole number is faster than waking numpy


def all_finite(data: bytes) -> bool:
    """Whether every float32 in `data` is finite: none has an exponent of ones alone.

    All are looked at in one whole number: where the eight bits are ones, adding one to the lowest carries out of them.
    """
    if len(data) > FEW_BYTES:
        return b"\0" not in np.isfinite(np.frombuffer(data, "<f4")).tobytes()
    exponents, ones, carries = _masks(len(data))
    return not ((int.from_bytes(data, "little") & exponents) + ones) & carries


@lru_cache(maxsize=64)
def _masks(size: int) -> tuple[int, int, int]:
    parts = (b"\0\0\x80\x7f", b"\0\0\x80\0", b"\0\0\0\x80")
    exponents, ones, carries = (int.from_bytes(part * (size // 4), "little") for part in parts)
    return exponents, ones, carries


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
        if not all_finite(array.tobytes()):
            raise ProtocolError("the state of the answer is not finite", field=name, expected="finite numbers")
        if array.flags.writeable:
            array = array.view()
            array.flags.writeable = False
        state[fed_back] = array
    return state

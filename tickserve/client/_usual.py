"""The usual request, cleared cheaply: a few rows of exactly the contract's tensors with nothing odd about any value.

It clears and never refuses: what it does not clear, `Contract` looks at in full, and flags or names. Of numpy it asks
two passes and the bytes: each function that a call wakes after a wait costs it as much as the comparisons do.
Letters: B rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tickserve.client._state import all_finite
from tickserve.client._transport import Tensor, named

FEW_VALUES = 1_024  # beyond it whole comparisons are as fast


class Rule(NamedTuple):
    """What one input tensor must look like. The last axis of `shape` is the feature columns."""

    name: str
    datatype: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]  # without the batch
    is_state: bool
    # The far ends of each value, [1, *shape]: numpy compares arrays of one shape three times as fast as it broadcasts.
    lowest: npt.NDArray[np.float32]
    highest: npt.NDArray[np.float32]


class Usual:
    """The usual request under `rules`: at most `max_batch` rows, and with `rejects_nan` none that holds a NaN."""

    __slots__ = ("_by_name", "_ends", "_few_rows", "_rules")

    def __init__(self, rules: Sequence[Rule], max_batch: int | None, *, rejects_nan: bool) -> None:
        self._rules = tuple(rules)
        self._by_name = _getter([rule.name for rule in rules])
        most = FEW_VALUES // max(math.prod(rule.shape) for rule in rules)
        self._few_rows = most if max_batch is None else min(most, max_batch)
        # The one pair lets a NaN pass as it is; the other makes a number of it, and so no more what it was.
        self._ends: tuple[np.ufunc, np.ufunc] = (np.fmax, np.fmin) if rejects_nan else (np.maximum, np.minimum)

    def clear(self, inputs: object) -> tuple[tuple[Tensor, ...], int] | None:
        """A snapshot of `inputs` and B; None for what might be refused or flagged."""
        arrays = self._arrays(inputs)
        if arrays is None:
            return None
        tensors, batch, (at_least, at_most) = [], 0, self._ends
        for (name, datatype, dtype, row, is_state, lowest, highest), array in zip(self._rules, arrays, strict=True):
            if type(array) is not np.ndarray or array.dtype is not dtype:
                return None
            shape = array.shape
            if shape[1:] != row or not 0 < shape[0] <= self._few_rows or (batch and shape[0] != batch):
                return None
            batch = shape[0]
            # In C order whatever the strides are, and the caller can no longer change it.
            data = array.tobytes()
            if is_state:
                if not all_finite(data):
                    return None
            elif at_most(at_least(array, lowest), highest).tobytes() != data:
                return None
            tensors.append(named(Tensor, (name, datatype, shape, data)))
        return tuple(tensors), batch

    def _arrays(self, inputs: object) -> tuple[object, ...] | None:
        """What is given for each rule; None where it is not one for one."""
        if type(inputs) is np.ndarray:
            return (inputs,) if len(self._rules) == 1 else None
        if type(inputs) is not dict or len(inputs) != len(self._rules):
            return None
        try:
            return self._by_name(inputs)
        except KeyError:
            return None


def _getter(names: Sequence[str]) -> Callable[[Mapping[str, Any]], tuple[object, ...]]:
    if len(names) > 1:
        return itemgetter(*names)
    return lambda inputs: (inputs[names[0]],)

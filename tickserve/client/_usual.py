"""The usual request, cleared cheaply: a few rows of exactly the contract's tensors with nothing odd about any value.

It clears and never refuses: what it does not clear, `Contract` looks at in full, and flags or names. What is cleared is
the snapshot that is sent. Letters: B rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tickserve.client._lanes import Ends
from tickserve.client._state import finite
from tickserve.client._transport import Tensor, named

FEW_VALUES = 128  # up to here they are looked at as one whole number, which grows
MOST_VALUES = 1_024  # up to here by two passes of numpy and their bytes; beyond it comparisons are as fast


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


class Checked(NamedTuple):
    """Inputs that passed: tensors for the wire, B, and the flags that go into the signal."""

    tensors: tuple[Tensor, ...]
    batch: int
    flags: tuple[str, ...]


class Usual:
    """The usual request under `rules`: at most `max_batch` rows, and with `rejects_nan` none that holds a NaN."""

    __slots__ = ("_ends", "_few_rows", "_given", "_nan", "_pair", "_rules")

    def __init__(self, rules: Sequence[Rule], max_batch: int | None, *, rejects_nan: bool) -> None:
        self._rules = tuple(rules)
        self._given = itemgetter(*[rule.name for rule in rules])
        most = MOST_VALUES // max(math.prod(rule.shape) for rule in rules)
        self._few_rows = most if max_batch is None else min(most, max_batch)
        self._nan = not rejects_nan
        # The one pair lets a NaN pass as it is; the other makes a number of it, and so no more what it was.
        self._pair: tuple[np.ufunc, np.ufunc] = (np.fmax, np.fmin) if rejects_nan else (np.maximum, np.minimum)
        self._ends: dict[tuple[str, int], Ends] = {}

    def clear(self, inputs: object) -> Checked | None:
        """`inputs`, as a snapshot of them; None for what might be refused or flagged."""
        rules = self._rules
        if type(inputs) is dict and len(inputs) == len(rules):
            try:
                given = self._given(inputs)
            except KeyError:
                return None
        elif len(rules) == 1:
            given = inputs
        else:
            return None
        if len(rules) == 1:
            tensor = self._tensor(rules[0], given)
            return None if tensor is None else named(Checked, ((tensor,), tensor.shape[0], ()))
        return self._several(given)

    def _several(self, arrays: Sequence[object]) -> Checked | None:
        tensors: list[Tensor] = []
        for rule, array in zip(self._rules, arrays, strict=True):
            tensor = self._tensor(rule, array)
            if tensor is None or (tensors and tensor.shape[0] != tensors[0].shape[0]):
                return None
            tensors.append(tensor)
        return named(Checked, (tuple(tensors), tensors[0].shape[0], ()))

    def _tensor(self, rule: Rule, array: object) -> Tensor | None:
        name, datatype, dtype, row, is_state, lowest, highest = rule
        if type(array) is not np.ndarray or array.dtype is not dtype:
            return None
        shape = array.shape
        if shape[1:] != row or not 0 < shape[0] <= self._few_rows:
            return None
        # In C order whatever the strides are, and the caller can no longer change it.
        data = array.tobytes()
        if is_state:
            good = finite(data)
        elif len(data) <= 4 * FEW_VALUES:
            ends = self._ends.get((name, shape[0])) or self._ends_of(rule, shape[0])
            good = ends.hold(data, nan=self._nan)
        else:
            at_least, at_most = self._pair
            good = at_most(at_least(array, lowest), highest).tobytes() == data
        return named(Tensor, (name, datatype, shape, data)) if good else None

    def _ends_of(self, rule: Rule, rows: int) -> Ends:
        ends = Ends(rule.lowest.tobytes() * rows, rule.highest.tobytes() * rows)
        self._ends[rule.name, rows] = ends
        return ends

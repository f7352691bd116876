"""A stateful model's inputs as plain rows, so that every gate takes them: features, then each state tensor, flat.

For a model without state a packed row is the row itself. Letters: N rows, F features, P a packed row's width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tickserve.manifest import Manifest

Rows = npt.NDArray[np.float32]


def pack(arrays: Mapping[str, npt.NDArray[Any]], manifest: Manifest) -> Rows:
    """Inputs by name, [N, ...] each, as rows [N, P]."""
    parts = [arrays[tensor.name] for tensor in manifest.inputs]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def feed(rows: Rows, manifest: Manifest) -> dict[str, Rows]:
    """Packed rows [N, P] as inputs by name, [N, ...] each.

    A gate makes holes anywhere in a row; state is finite by contract, so a hole in it becomes zero.
    """
    first, *state = manifest.inputs
    if not state:
        return {first.name: rows}
    fed, at = {first.name: np.ascontiguousarray(rows[:, : first.shape[0]])}, first.shape[0]
    for tensor in state:
        size = math.prod(tensor.shape)
        part = np.nan_to_num(rows[:, at : at + size], nan=0.0, posinf=0.0, neginf=0.0)
        fed[tensor.name], at = part.reshape(len(rows), *tensor.shape), at + size
    return fed

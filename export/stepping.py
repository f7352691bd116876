"""The gates of a stateful model's state: one step answers research's next state, and many steps do not drift away.

A number may be right at every step and the state wrong in its last digits; what matters then is whether that grows.
Letters: N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from export.packed import feed
from tickserve.errors import GateRefusedError
from tickserve.manifest import GateResult, Manifest, StateContract, Tolerance

Rows = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[Any]]
Score = Callable[[dict[str, Rows]], Arrays]
PROBABILITIES = "probabilities"
# The steps of one stream that are followed: an error that grows shows long before.
MAX_STEPS = 256


def state_gates(score: Score, rows: Rows, research: Score, manifest: Manifest) -> tuple[GateResult, ...]:
    """Both gates on packed recorded rows [N, P]; none for a model without state.

    `score` runs the graph and `research` the model, both from inputs by name to outputs by name. Raises
    GateRefusedError with the first row and tensor that differ.
    """
    if manifest.state is None:
        return ()
    inputs = feed(rows, manifest)
    measured = _compare("parity.state", research(inputs), score(inputs), manifest.state, manifest.tolerance)
    first = manifest.inputs[0].name
    steps = inputs[first][:MAX_STEPS]
    drifted = _follow(score, research, first, steps, manifest.state, manifest.tolerance)
    limits: dict[str, float | int | str | None] = {"atol": manifest.tolerance.atol, "rtol": manifest.tolerance.rtol}
    return (
        GateResult(name="parity.state", passed=True, measured={"rows": len(rows), **measured}, limits=limits),
        GateResult(name="parity.stepped", passed=True, measured={"steps": len(steps), **drifted}, limits=limits),
    )


def _follow(
    score: Score, research: Score, first: str, steps: Rows, state: StateContract, tolerance: Tolerance
) -> dict[str, float | int | str | None]:
    """Step both through the rows from zeros, each by its own state; the largest difference anywhere on the way."""
    zeros = {tensor.input: np.zeros((1, *tensor.shape), np.float32) for tensor in state.tensors}
    ours, theirs = dict(zeros), dict(zeros)
    largest: dict[str, float | int | str | None] = {}
    for place, row in enumerate(steps):
        said, wanted = score({first: row[None], **ours}), research({first: row[None], **theirs})
        apart = _compare("parity.stepped", wanted, said, state, tolerance, place)
        largest = {name: max(float(largest.get(name) or 0.0), value) for name, value in apart.items()}
        ours = {tensor.input: said[tensor.output] for tensor in state.tensors}
        theirs = {tensor.input: wanted[tensor.output] for tensor in state.tensors}
    return largest


def _compare(
    gate: str, wanted: Arrays, said: Arrays, state: StateContract, tolerance: Tolerance, offset: int = 0
) -> dict[str, float]:
    """The largest absolute difference of each tensor. Raises GateRefusedError; a NaN on either side is a difference."""
    largest = {}
    for name in (PROBABILITIES, *(tensor.output for tensor in state.tensors)):
        expected, was = wanted[name].astype(np.float64), said[name]
        apart = np.abs(was - expected)
        wrong = np.argwhere(~(apart <= tolerance.atol + tolerance.rtol * np.abs(expected)))
        if len(wrong):
            at = tuple(wrong[0])
            raise GateRefusedError(
                f"gate {gate} refused: row {offset + int(at[0])}",
                field=name,
                expected=str(float(expected[at])),
                was=str(float(was[at])),
                hint="nothing was published",
            )
        largest[f"max_abs_{name}"] = float(apart.max(initial=0.0))
    return largest

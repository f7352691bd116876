"""Golden pairs: inputs and research's outputs for them, read and compared in one way wherever they are checked.

Export checks them before it publishes, the CPU backend when it loads, and the embedded server before it is called
ready; with one reader and one comparison, what is published is what loads. Letters: G golden rows.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tickserve.errors import ArtifactError, GateRefusedError
from tickserve.manifest import GOLDEN_NAME, TensorSpec, Tolerance

Arrays = dict[str, npt.NDArray[Any]]
BUNDLE_ID = "bundle_id"
DTYPES: dict[str, npt.DTypeLike] = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}


def read_golden(path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Arrays:
    """The arrays of a `golden.npz`: every input and every output but `bundle_id`, each [G, *shape], and no other.

    Raises ArtifactError naming the array that is missing, unknown or of another type or shape.
    """
    try:
        # From bytes, or a lone .npy would come back as an array that is no context manager.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            golden: Arrays = {name: file[name] for name in file.files}
    except (OSError, EOFError, TypeError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ArtifactError("cannot read the golden pairs", field=GOLDEN_NAME, hint=str(error)[:100]) from error
    wanted = {tensor.name: tensor for tensor in (*inputs, *outputs) if tensor.name != BUNDLE_ID}
    if set(golden) != set(wanted):
        raise ArtifactError(
            "wrong arrays in the golden pairs", field=GOLDEN_NAME, expected=str(sorted(wanted)), was=_names(golden)
        )
    first = golden[inputs[0].name]
    rows = len(first) if first.ndim else 0
    for name, tensor in wanted.items():
        array = golden[name]
        if not rows or array.dtype != DTYPES[tensor.dtype] or array.shape != (rows, *tensor.shape):
            raise ArtifactError(
                f"wrong array in {GOLDEN_NAME}",
                field=name,
                expected=f"{tensor.dtype} [{max(rows, 1)}, {', '.join(map(str, tensor.shape))}]",
                was=f"{array.dtype} {list(array.shape)}",
            )
    return golden


def _names(golden: Arrays) -> str:
    return str(sorted(golden))[:200]


def compare(
    golden: Arrays,
    answer: Mapping[str, npt.NDArray[Any]],
    outputs: Sequence[TensorSpec],
    *,
    tolerance: Tolerance,
    bundle_id: int,
) -> float:
    """The largest absolute difference between an answer and research's numbers for the same rows.

    Raises GateRefusedError naming the first value outside the tolerance, an output that is missing or of
    another shape, or another bundle's id.
    """
    worst = 0.0
    for name in (tensor.name for tensor in outputs):
        if name not in answer:
            raise GateRefusedError("an output is missing from the answer", field=name)
        if name == BUNDLE_ID:
            _check_id(answer[name], bundle_id)
            continue
        research = golden[name]
        apart = _apart(name, research, answer[name])
        # Not "any beyond": a NaN in the answer has to fail too.
        within = apart <= tolerance.atol + tolerance.rtol * np.abs(research.astype(np.float64))
        if not within.all():
            row = int(np.argwhere(~within)[0][0])
            raise GateRefusedError(
                f"golden {name}, row {row}: the number is not research's",
                field=name,
                expected=f"research's number {research[row].tolist()} within {tolerance}",
                was=str(answer[name][row].tolist()),
            )
        worst = max(worst, float(apart.max()))
    return worst


def _apart(name: str, research: npt.NDArray[Any], answer: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    if answer.shape != research.shape:
        raise GateRefusedError(
            f"golden {name}: wrong shape", field=name, expected=str(research.shape), was=str(answer.shape)
        )
    apart: npt.NDArray[np.float64] = np.abs(answer.astype(np.float64) - research)
    return apart


def _check_id(answered: npt.NDArray[Any], expected: int) -> None:
    if not (answered == expected).all():
        raise GateRefusedError(
            "another model answers", field=BUNDLE_ID, expected=str(expected), was=str(answered.ravel()[0])
        )

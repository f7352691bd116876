"""Writing a bundle: the model file, golden and parity rows, and the manifest that names their digests, all or nothing.

Letters: G golden rows, R parity rows, F features, T steps of a window.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from market.jumps import JUMP_FACTOR
from tickserve.manifest import (
    GOLDEN_NAME,
    FeatureContract,
    Manifest,
    Provenance,
    StageFigures,
    StreamContract,
    TensorSpec,
    check_model_name,
    write_manifest,
)
from tickserve.stages import checkout_root
from tickserve.store import sha256_file, staged_directory
from training.examples import DataMeta, Examples, IntArray, Rows

PARITY_NAME = "parity.npz"
GOLDEN_ROWS = 16
OUTPUTS = (
    TensorSpec(name="probabilities", dtype="FP32", shape=(3,)),
    TensorSpec(name="score", dtype="FP32", shape=(1,)),
    TensorSpec(name="bundle_id", dtype="INT64", shape=(1,)),
)
LIBRARIES = ("numpy", "torch", "xgboost", "scikit-learn", "onnx", "onnxruntime")
DOWN, UP = 0, 2

Arrays = dict[str, Rows]


@dataclass(frozen=True)
class TrainedBundle:
    """A bundle on disk, its manifest, and the report of how it came about (JSON values)."""

    path: Path
    manifest: Manifest
    report: dict[str, Any]


def scores(probabilities: Rows) -> Rows:
    """`score` [n, 1]: p_up - p_down of probabilities [n, 3], in float32 as the served graph computes it."""
    return probabilities[:, [UP]] - probabilities[:, [DOWN]]


def golden_inputs(inputs: Rows) -> Rows:
    """G real inputs, evenly from all of them; the last one with its newest first feature missing."""
    chosen = inputs[np.linspace(0, len(inputs) - 1, min(GOLDEN_ROWS, len(inputs))).astype(np.int64)].copy()
    chosen[-1].reshape(-1, chosen.shape[-1])[-1, 0] = np.nan
    return chosen


def feature_contract(meta: DataMeta, examples: Examples, rows: IntArray) -> FeatureContract:
    """Columns and the range each had in training `rows`; a column with no finite value there has the range 0 to 0."""
    seen = examples.features[rows]
    finite = np.isfinite(seen)
    known = finite.any(axis=0)
    low = np.where(known, np.where(finite, seen, np.inf).min(axis=0), 0.0)
    high = np.where(known, np.where(finite, seen, -np.inf).max(axis=0), 0.0)
    return FeatureContract(
        spec=meta.spec,
        digest=meta.feature_digest,
        columns=meta.columns,
        minimum=tuple(map(float, low)),
        maximum=tuple(map(float, high)),
    )


def stream_contract(meta: DataMeta, examples: Examples) -> StreamContract | None:
    """How events become the rows of this run; None for a table that was not computed from a feature spec."""
    if meta.definition is None:
        return None
    # A jump cuts the sessions of bars only (market/sessions.py).
    factor = JUMP_FACTOR if meta.kind == "bars" else None
    return StreamContract(spec=dict(meta.definition), stride=examples.stride, jump_factor=factor)


def provenance(meta: DataMeta, seed: int, stages: dict[str, StageFigures]) -> Provenance:
    """Data, code, libraries and machine of this run."""
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        symbol=meta.symbol,
        data=dict(meta.data),
        simulated=meta.simulated,
        git_commit=_git_commit(),
        seed=seed,
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
        hardware=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        stages={**meta.stages, **stages},
    )


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(checkout_root()), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None  # an image holds no checkout
    return answer.stdout.strip()


def write_bundle(
    out: Path,
    *,
    name: str,
    model_file: str,
    save: Callable[[Path], None],
    predict: Callable[[Rows], Rows],
    tensor: TensorSpec,
    parity_inputs: Rows,
    fields: dict[str, Any],
) -> tuple[Path, Manifest]:
    """Write the bundle of a model with one input; returns its path and manifest.

    `predict` gives the research model's probabilities; golden and parity rows carry what it says. `fields` are the
    rest of the manifest. Raises ComponentError when `out` cannot be written, ValueError for an unsafe name.
    """
    golden = golden_inputs(parity_inputs)
    expected = predict(golden)
    arrays: dict[str, Arrays] = {
        GOLDEN_NAME: {tensor.name: golden, "probabilities": expected, "score": scores(expected)},
        PARITY_NAME: {tensor.name: parity_inputs, "probabilities": predict(parity_inputs)},
    }
    tensors = {"inputs": (tensor,), "outputs": OUTPUTS}
    return store_bundle(out, name=name, model_file=model_file, save=save, arrays=arrays, fields=fields | tensors)


def store_bundle(
    out: Path,
    *,
    name: str,
    model_file: str,
    save: Callable[[Path], None],
    arrays: Mapping[str, Arrays],
    fields: dict[str, Any],
) -> tuple[Path, Manifest]:
    """Write `out/<name>/` atomically, replacing an earlier bundle of that name; returns its path and manifest.

    `arrays` are the content of each `.npz` by its name; `fields` are the manifest without name and files. Raises
    ComponentError when `out` cannot be written, ValueError for an unsafe name.
    """
    check_model_name(name)
    path = out / name
    with staged_directory(path, replace=True) as staging:
        save(staging / model_file)
        for file, content in arrays.items():
            np.savez_compressed(staging / file, **content)
        files = _digests(staging, (model_file, *arrays))
        manifest = Manifest(name=name, model_file=model_file, files=files, **fields)
        write_manifest(staging, manifest)
    return path, manifest


def _digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    return {name: sha256_file(folder / name) for name in names}

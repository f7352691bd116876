"""A manifest that contradicts itself makes no contract: what is looked at when it is pinned. Raises ArtifactError."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tickserve.client._arguments import shown
from tickserve.errors import ArtifactError, DigestMismatchError
from tickserve.manifest import CLASSES, ExportRecord, FeatureContract, Manifest, TensorSpec

PROBABILITIES, SCORE, BUNDLE_ID = "probabilities", "score", "bundle_id"


def check_digest(record: ExportRecord | None, digest: str) -> None:
    """Whether the manifest is the one that was exported."""
    if record is not None and record.bundle_digest != digest:
        raise DigestMismatchError(
            "the manifest was changed after export",
            field="export.bundle_digest",
            expected=record.bundle_digest,
            was=digest,
        )


def check_ranges(features: FeatureContract) -> None:
    """Each column once, and its range the right way up."""
    columns, low, high = features.columns, features.minimum, features.maximum
    if not len(columns) == len(low) == len(high):
        raise ArtifactError("the manifest's columns and ranges differ in number", field="features")
    if len(set(columns)) != len(columns):
        raise ArtifactError("a column is given twice", field="features.columns")
    for column, lowest, highest in zip(columns, low, high, strict=True):
        if not -math.inf < lowest <= highest < math.inf:
            raise ArtifactError(
                f"the range of column {column!r} is none", field="features", was=f"{lowest} to {highest}"
            )


def check_input_specs(inputs: Sequence[TensorSpec], columns: int) -> None:
    """Every input is looked at column by column: one of another width would pass with no check of its values."""
    names = {spec.name for spec in inputs}
    if not inputs or len(names) != len(inputs):
        raise ArtifactError("the manifest's input tensors are none, or one is given twice", field="inputs")
    for spec in inputs:
        if any(size < 1 for size in spec.shape):
            raise ArtifactError(
                "a negative or zero dimension", field=spec.name, was=str(list(spec.shape)), expected="1 up"
            )
        if spec.dtype != "FP32" or spec.shape[-1:] != (columns,):
            raise ArtifactError(
                "the tensor is not as wide as the manifest's columns",
                field=spec.name,
                expected=f"FP32 [..., {columns}]",
                was=f"{spec.dtype} {list(spec.shape)}",
            )


def check_output_specs(manifest: Manifest) -> None:
    """The classes and tensors that a signal is made of."""
    outputs = {spec.name: spec for spec in manifest.outputs}
    if len(outputs) != len(manifest.outputs):
        raise ArtifactError("an output is given twice", field="outputs")
    if manifest.classes != CLASSES:
        raise ArtifactError("other classes", field="classes", expected=str(CLASSES), was=shown(manifest.classes))
    needed = {PROBABILITIES: ("FP32", (len(CLASSES),)), SCORE: ("FP32", (1,)), BUNDLE_ID: ("INT64", (1,))}
    if not needed.keys() <= outputs.keys():
        raise ArtifactError("the manifest lacks tensors a signal is made of", field="outputs")
    for name, (dtype, shape) in needed.items():
        spec = outputs[name]
        if (spec.dtype, spec.shape) != (dtype, shape):
            raise ArtifactError(
                "no signal can be made of this tensor",
                field=name,
                expected=f"{dtype} {list(shape)}",
                was=f"{spec.dtype} {list(spec.shape)}",
            )

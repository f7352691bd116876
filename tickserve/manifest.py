"""The manifest: what a model is, what goes in and comes out, how it scored, and the digests that prove it.

Training writes it beside the model file (a *bundle*), export copies it into each repository version with an `export`
record, and the client holds requests against it.

The *bundle digest* is the SHA-256 of the canonical JSON of what `manifest.json` holds, without its member `export`:
`json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)` in UTF-8. Nothing is added or dropped, so
any language can recompute it, and a field added to this schema later does not change it for a manifest that lacks the
field. Since the manifest names the digest of every file, the digest names the whole bundle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from tickserve.errors import ArtifactError, DigestMismatchError
from tickserve.reference import ManifestReference
from tickserve.runtimes import Gated, RuntimeRecord
from tickserve.store import canonical_json, sha256_bytes, sha256_file, write_json_atomic

MANIFEST_NAME = "manifest.json"
GOLDEN_NAME = "golden.npz"
CLASSES = ("down", "flat", "up")
MODEL_NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")

Dtype = Literal["FP32", "INT64"]
NanPolicy = Literal["native", "impute_mean", "reject"]
# Trees, then nets: a row each for the trees and the MLP, a window of rows for the others.
Family = Literal["gbdt", "mlp", "lstm", "tcn", "deeplob", "tlob"]
TREES: Final = frozenset({"gbdt"})


class Frozen(BaseModel):
    """Immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TensorSpec(Frozen):
    """One tensor on the wire: `shape` is without the batch dimension, so `(F,)`, `(T, F)` or `(1,)`."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]


class FeatureContract(Frozen):
    """The features a model was trained on: spec name and digest, column order, and each column's training range."""

    spec: str
    digest: str
    columns: tuple[str, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]


class Horizon(Frozen):
    """What the model predicts: the move over the next `value` milliseconds or rows; `threshold` splits off "flat".

    `threshold` is a relative return (0.0001 is one basis point).
    """

    unit: Literal["ms", "rows"]
    value: int = Field(gt=0)
    threshold: float = Field(ge=0)


class GateResult(Frozen):
    """What one gate measured and decided."""

    name: str
    passed: bool
    measured: dict[str, float | int | str | None] = {}
    limits: dict[str, float | int | str | None] = {}
    detail: str = ""


class Tolerance(Frozen):
    """How far a served number may lie from the research number: `|a - b| <= atol + rtol * |b|`."""

    atol: float = Field(ge=0)
    rtol: float = Field(ge=0)


class StateTensor(Frozen):
    """One tensor a stateful model hands on: what it answers as `output` is its `input` at the next step.

    `shape` is without the batch: (layers, hidden).
    """

    input: str
    output: str
    shape: tuple[int, ...]


class StateContract(Frozen):
    """What the caller of a stateful model carries from step to step, and when it starts anew.

    A stream's first step takes zeros. So does the first step after more than `session_gap_ns` between two events,
    after a gap in the numbers of a feed that numbers its messages, and after a jump of the price (`StreamContract`).
    A step is taken every `stride` events, as training took it. The server keeps nothing: one that dies loses no
    stream's state.
    """

    tensors: tuple[StateTensor, ...] = Field(min_length=1)
    initial: Literal["zeros"] = "zeros"
    session_gap_ns: int = Field(gt=0)
    sequence_gap: Literal["reset"] = "reset"
    stride: int = Field(ge=1)


class StreamContract(Frozen):
    """How market events become the rows this model was trained on; `tickserve.stream.Stream` follows it.

    `spec` is the feature spec (`FeatureSpec.to_json`) behind `features.digest`; of the events past warm-up every
    `stride`-th became a row; a price step by more than `jump_factor` (None: by none) starts a new session.
    """

    spec: dict[str, Any]
    stride: int = Field(ge=1)
    jump_factor: float | None = Field(gt=1)


StageFigures = dict[str, float | None]


class Provenance(Frozen):
    """Where the bundle comes from.

    `stages` is what each stage took: seconds, rows_per_s, peak_memory_mb of the process tree, gpu_memory_mb and
    gpu_utilisation (percent); None is not known, or no GPU.
    """

    created: str
    symbol: str = ""
    data: dict[str, str] = {}
    simulated: bool = False
    git_commit: str | None = None
    seed: int
    libraries: dict[str, str] = {}
    hardware: str = ""
    stages: dict[str, StageFigures] = {}


class ExportRecord(Frozen):
    """What export adds to a published version.

    `runtime` is there where runtimes were measured. `gated` and `stages` (as those of `Provenance`) are not in versions
    published before they were recorded.
    """

    bundle_digest: str
    bundle_id: int
    onnx_sha256: str
    golden_sha256: str
    opset: int
    ir_version: int
    gates: tuple[GateResult, ...]
    max_batch: int
    runtime: RuntimeRecord | None = None
    gated: Gated | None = None
    stages: dict[str, StageFigures] | None = None

    def judged_with(self) -> Gated | None:
        """What the gates judged; for a version from before that was recorded what was measured, else None."""
        if self.gated is None and self.runtime is not None:
            return Gated(threads=self.runtime.threads, graph_level=self.runtime.graph_level)
        return self.gated


# The served contract: what every model answers, whatever its family, precision or runtime.
OUTPUTS = (
    TensorSpec(name="probabilities", dtype="FP32", shape=(3,)),
    TensorSpec(name="score", dtype="FP32", shape=(1,)),
    TensorSpec(name="bundle_id", dtype="INT64", shape=(1,)),
)
# Written even when they hold their defaults: a reader of the JSON alone needs them. A field added later does not join
# them, or it would change the digests of manifests written before.
ALWAYS_STORED = frozenset(
    {"schema_version", "precision", "task", "parents", "architecture", "classes", "metrics", "gates"}
)


def _wrong(field: str, expected: object, was: object) -> PydanticCustomError:
    text = "expected {expected}, was {was}"
    return PydanticCustomError("contract", text, {"field": field, "expected": str(expected), "was": str(was)[:200]})


class Manifest(Frozen):
    """The whole manifest. `files` maps every file of the bundle (manifest excepted) to `sha256:<hex>`.

    Whoever reads one (export, serving, the client) gets a consistent one: one input, the served outputs and classes,
    and a column with its range for each feature of the input. A model with `state` has its tensors as further inputs
    and outputs, in the order of `state.tensors`.
    """

    schema_version: Literal[1] = 1
    name: str
    family: Family
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    task: Literal["direction"] = "direction"
    horizon: Horizon
    parents: tuple[str, ...] = ()
    model_file: str
    architecture: dict[str, Any] = {}
    state: StateContract | None = None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    classes: tuple[str, ...] = CLASSES
    nan_policy: NanPolicy
    features: FeatureContract
    stream: StreamContract | None = None
    tolerance: Tolerance
    metrics: dict[str, Any] = {}
    gates: tuple[GateResult, ...] = ()
    files: dict[str, str]
    provenance: Provenance
    reference: ManifestReference = None
    export: ExportRecord | None = None

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        return check_model_name(name)

    @field_validator("state")
    @classmethod
    def _distinct_state(cls, state: StateContract | None) -> StateContract | None:
        served = {tensor.name for tensor in OUTPUTS}
        for side in ("input", "output"):
            names = [getattr(tensor, side) for tensor in state.tensors] if state else []
            if len({*names, *served}) != len(names) + len(served):
                raise _wrong("state.tensors", f"distinct {side} names, none of an output", names)
        for tensor in state.tensors if state else ():
            if not tensor.shape or any(size < 1 for size in tensor.shape):
                raise _wrong("state.tensors", "sizes from 1", f"{tensor.input} {list(tensor.shape)}")
        return state

    @field_validator("inputs")
    @classmethod
    def _one_input(cls, inputs: tuple[TensorSpec, ...], info: ValidationInfo) -> tuple[TensorSpec, ...]:
        state = _state_tensors(info.data.get("state"), "input")
        if len(inputs) != 1 + len(state):
            raise _wrong("inputs", f"{1 + len(state)} tensor{'s' if state else ''}", len(inputs))
        tensor = inputs[0]
        if tensor.dtype != "FP32" or len(tensor.shape) not in (1, 2) or any(size < 1 for size in tensor.shape):
            raise _wrong("inputs.0", "FP32 (F,) or (T, F), each 1 or more", f"{tensor.dtype} {tensor.shape}")
        if state and (inputs[1:] != state or len(tensor.shape) != 1 or tensor.name in {each.name for each in state}):
            raise _wrong("inputs", f"one FP32 (F,), then {_shown(state)}", _shown(inputs))
        return inputs

    @field_validator("outputs")
    @classmethod
    def _served_outputs(cls, outputs: tuple[TensorSpec, ...], info: ValidationInfo) -> tuple[TensorSpec, ...]:
        expected = OUTPUTS + _state_tensors(info.data.get("state"), "output")
        if outputs != expected:
            raise _wrong("outputs", _shown(expected), _shown(outputs))
        return outputs

    @field_validator("classes")
    @classmethod
    def _served_classes(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if classes != CLASSES:
            raise _wrong("classes", list(CLASSES), list(classes))
        return classes

    @field_validator("features")
    @classmethod
    def _columns_of_the_input(cls, features: FeatureContract, info: ValidationInfo) -> FeatureContract:
        columns, inputs = features.columns, info.data.get("inputs")
        if inputs and len(columns) != inputs[0].shape[-1]:
            raise _wrong("features.columns", f"{inputs[0].shape[-1]}, as the input's last dimension", len(columns))
        if len(set(columns)) != len(columns):
            twice = sorted(name for name in set(columns) if columns.count(name) > 1)
            raise _wrong("features.columns", "distinct names", f"{twice[0]!r} more than once")
        for side, values in (("minimum", features.minimum), ("maximum", features.maximum)):
            if len(values) != len(columns):
                raise _wrong(f"features.{side}", f"{len(columns)} values, one for each column", len(values))
        for name, low, high in zip(columns, features.minimum, features.maximum, strict=True):
            if low > high:
                raise _wrong("features.minimum", f"at most the maximum {high} of column {name!r}", low)
        return features

    def model_post_init(self, context: Any) -> None:
        """Mark what is always stored as given."""
        self.__pydantic_fields_set__.update(ALWAYS_STORED)

    def stored(self) -> dict[str, Any]:
        """What `manifest.json` holds: every value that was given, none that is only this schema's default."""
        return self.model_dump(mode="json", exclude_unset=True)

    def digest(self) -> str:
        """The bundle digest, `sha256:<hex>`: of `stored()` without `export` (see the module)."""
        return sha256_bytes(canonical_json(_without_export(self.stored())))

    def bundle_id(self) -> int:
        """The first 8 bytes of the bundle digest as a signed big-endian integer: what the graph answers per row."""
        return bundle_id_of(self.digest())


def _state_tensors(state: StateContract | None, side: Literal["input", "output"]) -> tuple[TensorSpec, ...]:
    tensors = () if state is None else state.tensors
    return tuple(TensorSpec(name=getattr(each, side), dtype="FP32", shape=each.shape) for each in tensors)


def _shown(tensors: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in tensors) or "none"


def _without_export(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in value.items() if name != "export"}


def bundle_id_of(digest: str) -> int:
    """The `bundle_id` of a `sha256:<hex>` bundle digest (signed int64, big endian)."""
    return int.from_bytes(bytes.fromhex(digest.removeprefix("sha256:"))[:8], "big", signed=True)


def check_model_name(name: str) -> str:
    """`name`, when it is safe as a folder name and in a URL. Raises ValueError otherwise."""
    if not MODEL_NAME_PATTERN.fullmatch(name) or ".." in name:
        shown = repr(name[:40]) + ("..." if len(name) > 40 else "")
        raise ValueError(f"model name: expected 1 to 100 of [a-z0-9._-] without '..', was {shown}")
    return name


def _first_problem(error: ValidationError) -> tuple[str, str]:
    problem = error.errors()[0]
    if problem["type"] == "contract":
        return str(problem["ctx"]["field"]), str(problem["msg"])
    return ".".join(str(part) for part in problem["loc"]) or "manifest", str(problem["msg"])


def parse_manifest(data: bytes | str | Mapping[str, Any]) -> Manifest:
    """A manifest from JSON text or a mapping. Raises ArtifactError naming the field that is wrong."""
    try:
        value = json.loads(data) if isinstance(data, bytes | str) else dict(data)
        manifest = Manifest.model_validate(value)
        if isinstance(data, bytes | str):
            _check_unchanged(value, manifest)
        return manifest
    except ValidationError as error:
        field, message = _first_problem(error)
        raise ArtifactError(f"the manifest is not valid: {message}", field=field) from error
    except (ValueError, TypeError, RecursionError) as error:  # not UTF-8, not JSON, not an object, too deep or too long
        raise ArtifactError("the manifest is not JSON", field=MANIFEST_NAME, hint=str(error)[:100]) from error


def _check_unchanged(value: Mapping[str, Any], manifest: Manifest) -> None:
    """Raise ArtifactError when reading changed a value (`1` to `1.0`, say): its digest could not be recomputed."""
    stored = manifest.stored()
    for name in sorted({*value, *stored}):
        if name not in value:
            raise ArtifactError("missing from the manifest", field=name)
        if canonical_json(value[name]) != canonical_json(stored[name]):
            raise ArtifactError("the manifest holds a value in another form than it is written in", field=name[:100])


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`, atomically."""
    write_json_atomic(folder / MANIFEST_NAME, manifest.stored())


def load_manifest(folder: Path) -> Manifest:
    """Read `folder/manifest.json` without checking the files it names. Raises ArtifactError."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ArtifactError(f"no {MANIFEST_NAME} in {folder.name!r}", field=MANIFEST_NAME)
    return parse_manifest(path.read_bytes())


def load_bundle(folder: Path) -> Manifest:
    """Read the manifest and verify that every file it names is there with its digest, and nothing unnamed.

    Raises ArtifactError (missing manifest or file, unknown file) and DigestMismatchError.
    """
    manifest = load_manifest(folder)
    for name, digest in manifest.files.items():
        verify_file(folder, name, digest)
    unknown = {path.name for path in folder.iterdir()} - set(manifest.files) - {MANIFEST_NAME}
    if unknown:
        raise ArtifactError("the bundle holds files its manifest does not name", field=sorted(unknown)[0])
    return manifest


def verify_file(folder: Path, name: str, digest: str) -> None:
    """Raise unless `folder/name` is a plain file inside `folder` with that digest."""
    path = folder / name
    if Path(name).name != name or path.is_symlink() or not path.is_file():
        raise ArtifactError("the manifest names a file that is not a plain file beside it", field=name[:100])
    actual = sha256_file(path)
    if actual != digest:
        raise DigestMismatchError("wrong digest", field=name, expected=digest, was=actual)

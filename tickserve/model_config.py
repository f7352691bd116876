"""The Triton model configuration Tickserve uses, in one place: export writes it, our CPU backend honours it or refuses.

NVIDIA's C++ ONNX Runtime backend and our Python-based one serve the same `config.pbtxt`. That holds only while both
read the same fields, so the fields and `parameters` in use are listed here and anything else is refused at load, never
ignored. Works on the JSON form that Triton hands to a backend.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tickserve.errors import ArtifactError
from tickserve.manifest import Manifest, TensorSpec

BACKEND = "onnxruntime"
MODEL_FILE = "model.onnx"
CONFIG_NAME = "config.pbtxt"
INTRA_OP_THREADS = "intra_op_thread_count"
INTER_OP_THREADS = "inter_op_thread_count"
EXECUTION_MODE = "execution_mode"
SEQUENTIAL = "0"
MAX_BATCH_LINE = re.compile(rb"^max_batch_size: ([1-9][0-9]{0,8})$", re.MULTILINE)
MANIFEST_PARAMETER = re.compile(r"manifest\.([1-9][0-9]*)")

# `dynamic_batching { priority_levels }`: the batcher takes lane 1 first; a request that names none is in lane 1.
SINGLE_LANE, BULK_LANE = 1, 2

# Of every session of ONNX Runtime. One that waits by spinning takes the core from the engine's or the server's own
# threads. And a processor with AVX2 and no VNNI adds products of 8-bit numbers in 16 bits, and cuts off what is more,
# unless it is told to be precise: a quantized model says something else there.
SESSION_ENTRIES = {"session.intra_op.allow_spinning": "0", "session.x64quantprecision": "1"}
# `optimization { graph { level } }` as NVIDIA's backend reads it, to the name ONNX Runtime gives it.
GRAPH_LEVELS = {0: "ORT_ENABLE_ALL", -1: "ORT_ENABLE_BASIC", 1: "ORT_ENABLE_EXTENDED", 2: "ORT_DISABLE_ALL"}
# ONNX Runtime's TensorRT provider, `optimization { execution_accelerators }`. It concerns GPU instances alone: on a CPU
# instance NVIDIA's backend does not look at it, and neither does ours. Any other accelerator, parameter or a missing
# one is refused, so that what a GPU server does is what export wrote.
TENSORRT = "tensorrt"
ACCELERATOR_PARAMETERS = frozenset(
    {
        "precision_mode",
        "trt_engine_cache_enable",
        "trt_engine_cache_path",
        "trt_engine_cache_prefix",
        "trt_timing_cache_enable",
        "trt_timing_cache_path",
        "trt_profile_min_shapes",
        "trt_profile_opt_shapes",
        "trt_profile_max_shapes",
    }
)
KINDS = ("KIND_AUTO", "KIND_CPU", "KIND_GPU")
DTYPES = {"TYPE_FP32": "FP32", "TYPE_INT64": "INT64"}

# Triton itself honours these, whichever backend serves.
SERVER_FIELDS = frozenset({"name", "version_policy", "dynamic_batching", "model_warmup", "response_cache"})
# The backend honours these.
BACKEND_FIELDS = frozenset(
    {
        "backend",
        "default_model_filename",
        "max_batch_size",
        "input",
        "output",
        "instance_group",
        "optimization",
        "parameters",
    }
)
# Inside `optimization`, what Triton fills in by itself; all of it concerns GPU memory and is left at its default.
OPTIMIZATION_DEFAULTS: dict[str, Any] = {
    "priority": "PRIORITY_DEFAULT",
    "input_pinned_memory": {"enable": True},
    "output_pinned_memory": {"enable": True},
    "gather_kernel_buffer_threshold": 0,
    "eager_batching": False,
}


@dataclass(frozen=True)
class BackendOptions:
    """What a backend has to honour. `manifests` maps a version to the digest of its manifest.json.

    `tensorrt`: a GPU instance is to run on ONNX Runtime's TensorRT provider; a CPU instance ignores it.
    """

    name: str
    max_batch: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    intra_op_threads: int
    inter_op_threads: int
    graph_level: int
    kinds: tuple[str, ...]
    manifests: Mapping[int, str]
    tensorrt: bool = False

    @property
    def graph_optimization(self) -> str:
        """The name of ONNX Runtime's GraphOptimizationLevel."""
        return GRAPH_LEVELS[self.graph_level]


def served_rows(version: Path, manifest: Manifest) -> int | None:
    """The rows that a request for the published version in the folder `version` may have; None for a bundle.

    Those it was gated for, or fewer: config.pbtxt beside it may serve fewer while it loads a version gated for fewer.
    """
    if manifest.export is None:
        return None
    path = version.parent / CONFIG_NAME
    found = MAX_BATCH_LINE.search(path.read_bytes()) if path.is_file() else None
    return min(manifest.export.max_batch, int(found[1])) if found else manifest.export.max_batch


def manifest_parameter(version: int) -> str:
    """The parameter that lists the digest of a version's manifest.json."""
    return f"manifest.{version}"


def read_options(config: Mapping[str, Any]) -> BackendOptions:
    """What `config`, in Triton's JSON form, asks of a backend. Raises ArtifactError for anything not honoured here."""
    for field, value in config.items():
        if field not in SERVER_FIELDS | BACKEND_FIELDS and _set(value):
            raise ArtifactError("a configuration field this backend does not honour", field=field[:100])
    if config.get("backend") != BACKEND:
        raise ArtifactError("wrong backend", field="backend", expected=BACKEND, was=str(config.get("backend"))[:100])
    if (config.get("response_cache") or {}).get("enable"):
        # An answer from the cache would be older than it looks, and the cache has no place in the latency budget.
        raise ArtifactError("answers are never cached", field="response_cache.enable", expected="false", was="true")
    if config.get("default_model_filename") not in ("", None, MODEL_FILE):
        raise ArtifactError("wrong model file", field="default_model_filename", expected=MODEL_FILE)
    parameters = _parameters(config)
    return BackendOptions(
        name=str(config.get("name", "")),
        max_batch=_whole(config.get("max_batch_size", 0), "max_batch_size", lambda rows: rows >= 1),
        inputs=_tensors(config, "input"),
        outputs=_tensors(config, "output"),
        intra_op_threads=_threads(parameters, INTRA_OP_THREADS),
        inter_op_threads=_threads(parameters, INTER_OP_THREADS),
        graph_level=_graph_level(config.get("optimization") or {}),
        kinds=_kinds(config),
        manifests=_manifests(parameters),
        tensorrt=_accelerated(config.get("optimization") or {}),
    )


def _set(value: Any) -> bool:
    """Whether a field holds more than the empty value Triton writes for a field that is not there."""
    return any(map(_set, value.values())) if isinstance(value, Mapping) else bool(value)


def _whole(value: Any, field: str, allowed: Callable[[int], bool]) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = None
    if number is None or not allowed(number):
        raise ArtifactError("wrong value", field=field, was=str(value)[:50])
    return number


def _parameters(config: Mapping[str, Any]) -> dict[str, str]:
    found = {name: str(value.get("string_value", "")) for name, value in (config.get("parameters") or {}).items()}
    for name in found:
        if name not in (INTRA_OP_THREADS, INTER_OP_THREADS, EXECUTION_MODE) and not MANIFEST_PARAMETER.fullmatch(name):
            raise ArtifactError("a parameter this backend does not honour", field=f"parameters.{name[:100]}")
    mode = found.get(EXECUTION_MODE, SEQUENTIAL)
    if mode != SEQUENTIAL:
        raise ArtifactError(
            "only sequential execution is honoured", field=EXECUTION_MODE, expected=SEQUENTIAL, was=mode[:20]
        )
    return found


def _threads(parameters: Mapping[str, str], name: str) -> int:
    return _whole(parameters.get(name, "0"), f"parameters.{name}", lambda threads: threads >= 0)


def _manifests(parameters: Mapping[str, str]) -> dict[int, str]:
    matches = ((MANIFEST_PARAMETER.fullmatch(name), value) for name, value in parameters.items())
    return {int(match[1]): value for match, value in matches if match}


def _graph_level(optimization: Mapping[str, Any]) -> int:
    for field, value in optimization.items():
        known = field in ("graph", "execution_accelerators")  # the latter is read by `_accelerated`
        honoured = known or not _set(value) or value == OPTIMIZATION_DEFAULTS.get(field)
        if not honoured:
            raise ArtifactError("an optimization this backend does not honour", field=f"optimization.{field[:100]}")
    level = (optimization.get("graph") or {}).get("level", 0)
    return _whole(level, "optimization.graph.level", lambda number: number in GRAPH_LEVELS)


def _accelerated(optimization: Mapping[str, Any]) -> bool:
    asked = optimization.get("execution_accelerators") or {}
    if not _set(asked):
        return False
    gpu = asked.get("gpu_execution_accelerator") or []
    ours = [
        each
        for each in gpu
        if each.get("name") == TENSORRT and set(each.get("parameters") or ()) == ACCELERATOR_PARAMETERS
    ]
    if len(ours) != 1 or len(gpu) != 1 or _set(asked.get("cpu_execution_accelerator")):
        raise ArtifactError(
            "an accelerator this backend does not honour",
            field="optimization.execution_accelerators",
            expected=f"{TENSORRT} for the GPU with its {len(ACCELERATOR_PARAMETERS)} parameters",
        )
    return True


def _kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    kinds = tuple(str(group.get("kind", KINDS[0])) for group in config.get("instance_group") or ())
    for kind in kinds:
        if kind not in KINDS:
            raise ArtifactError("wrong instance group", field="instance_group.kind", expected=str(KINDS), was=kind[:50])
    return kinds


def _tensors(config: Mapping[str, Any], side: str) -> tuple[TensorSpec, ...]:
    return tuple(_tensor(tensor, side) for tensor in config.get(side) or ())


def _tensor(tensor: Mapping[str, Any], side: str) -> TensorSpec:
    name, dtype = str(tensor.get("name", "")), str(tensor.get("data_type", ""))
    if dtype not in DTYPES:
        raise ArtifactError(
            "wrong data type", field=f"{side} {name[:100]}", expected=str(sorted(DTYPES)), was=dtype[:50]
        )
    for field in (
        "reshape",
        "is_shape_tensor",
        "allow_ragged_batch",
        "optional",
        "is_non_linear_format_io",
        "label_filename",
    ):
        if _set(tensor.get(field)):
            raise ArtifactError("a tensor option this backend does not honour", field=f"{side} {name[:100]}.{field}")
    shape = tuple(_whole(dim, f"{side} {name[:100]}.dims", lambda size: size >= 1) for dim in tensor.get("dims") or ())
    return TensorSpec(name=name, dtype="FP32" if dtype == "TYPE_FP32" else "INT64", shape=shape)

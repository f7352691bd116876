"""From a served graph to a serialized engine, by the `tensorrt` package (10.x or 11.x).

A strongly typed network: fp16 is where the graph casts, INT8 where it quantizes and dequantizes (QDQ), and the builder
chooses kernels, never precisions. `typing = "flags"` lets TensorRT 10 choose among the precisions of the model's name;
TensorRT 11 has no such flags. No machine with a GPU has run this module: it is written to TensorRT's documented Python
interface, and its tests record the calls it makes.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onnx import ModelProto

from export import versions
from export.tensorrt.profiles import Profile
from tickserve.config import TensorrtSettings
from tickserve.errors import ArtifactError, ComponentError, ConfigError
from tickserve.manifest import Manifest
from tickserve.store import write_atomic

MIB = 1024 * 1024
PRECISION_FLAGS = {"fp32": (), "fp16": ("FP16",), "int8": ("FP16", "INT8")}
HARDWARE_LEVELS = {
    "none": "NONE",
    "same_compute_capability": "SAME_COMPUTE_CAPABILITY",
    "ampere_plus": "AMPERE_PLUS",
}


def load_tensorrt() -> Any:
    """The `tensorrt` package. Raises ComponentError where it is not installed."""
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise ComponentError("the Python package 'tensorrt' is not installed", field="tensorrt") from error


def build_flags(manifest: Manifest, settings: TensorrtSettings, profiles: Sequence[Profile]) -> dict[str, Any]:
    """What of the settings decides the engine: part of the plan's key."""
    return {
        "typing": settings.typing,
        "precision": manifest.precision,
        "profiles": [asdict(profile) for profile in profiles],
        "workspace_mb": settings.workspace_mb,
        "optimization_level": settings.optimization_level,
        "version_compatible": settings.version_compatible,
        "hardware_compatible": settings.hardware_compatible,
    }


def check_buildable(manifest: Manifest, model: ModelProto) -> None:
    """Raise ArtifactError for a graph with operators that TensorRT does not have: forests, dynamic quantization."""
    foreign = {
        node.op_type for node in model.graph.node if node.domain in (versions.ML_DOMAIN, versions.CONTRIB_DOMAIN)
    }
    if foreign:
        raise ArtifactError(
            f"TensorRT has no {', '.join(sorted(foreign))}",
            field=manifest.name,
            expected="a net in fp32 or fp16, or with QDQ nodes",
            hint="a forest belongs on the CPU or Triton's FIL backend",
        )


def build_plan(
    graph: bytes, manifest: Manifest, profiles: Sequence[Profile], settings: TensorrtSettings, trt: Any = None
) -> bytes:
    """The serialized engine. Raises ArtifactError when TensorRT does not take the graph, ComponentError otherwise."""
    trt = trt or load_tensorrt()
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt, settings))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        problems = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise ArtifactError(f"TensorRT does not read this graph: {problems[:300]}", field="model.onnx")
    config = _config(trt, builder, manifest, settings)
    for profile in profiles:
        _add_profile(builder, config, manifest, profile)
    _load_timings(config, settings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ComponentError("TensorRT built no engine; its own log above says why", field="tensorrt")
    _keep_timings(config, settings)
    return bytes(plan)


def _network_flags(trt: Any, settings: TensorrtSettings) -> int:
    if settings.typing == "flags":
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _config(trt: Any, builder: Any, manifest: Manifest, settings: TensorrtSettings) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mb * MIB)
    config.builder_optimization_level = settings.optimization_level
    # On by default, and rounds float32 products to ten bits: the numbers would not be research's.
    config.clear_flag(trt.BuilderFlag.TF32)
    for name in PRECISION_FLAGS[manifest.precision] if settings.typing == "flags" else ():
        config.set_flag(_flag(trt, name))
    if settings.version_compatible:
        config.set_flag(_flag(trt, "VERSION_COMPATIBLE"))
    level = HARDWARE_LEVELS[settings.hardware_compatible]
    if not hasattr(trt.HardwareCompatibilityLevel, level):
        raise ConfigError(
            f"TensorRT {trt.__version__} has no such level",
            field="tensorrt.hardware_compatible",
            was=settings.hardware_compatible,
        )
    config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    return config


def _flag(trt: Any, name: str) -> Any:
    if not hasattr(trt.BuilderFlag, name):
        raise ConfigError(f"TensorRT {trt.__version__} has no flag {name}", field="tensorrt.typing", expected="strong")
    return getattr(trt.BuilderFlag, name)


def _add_profile(builder: Any, config: Any, manifest: Manifest, profile: Profile) -> None:
    made = builder.create_optimization_profile()
    for tensor in manifest.inputs:
        least, best, most = ((rows, *tensor.shape) for rows in (profile.least, profile.best, profile.most))
        made.set_shape(tensor.name, least, best, most)
    if config.add_optimization_profile(made) < 0:
        raise ComponentError("TensorRT refuses an optimisation profile", field="profiles", was=str(profile))


def _load_timings(config: Any, settings: TensorrtSettings) -> None:
    """Tactics that were timed before; of another device or release they are passed over, not misused."""
    path = Path(settings.timing_cache)
    if not settings.timing_cache:
        return
    known = path.read_bytes() if path.is_file() else b""
    config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)


def _keep_timings(config: Any, settings: TensorrtSettings) -> None:
    cache = config.get_timing_cache() if settings.timing_cache else None
    if cache is not None:
        write_atomic(Path(settings.timing_cache), bytes(cache.serialize()))

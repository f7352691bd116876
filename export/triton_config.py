"""config.pbtxt, written from Triton's own protobuf schema: fully explicit, and the same bytes for the same settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format  # type: ignore[import-untyped]
from onnx import ModelProto
from tritonclient.grpc import model_config_pb2 as schema

from export.check_model import check_signature
from export.tensorrt.accelerator import accelerator_parameters, runs_on_tensorrt
from tickserve import model_config
from tickserve.config import ExportSettings
from tickserve.errors import ArtifactError
from tickserve.manifest import Manifest, TensorSpec
from tickserve.runtimes import Gated, RuntimeRecord

TRITON_TYPES = {"FP32": schema.TYPE_FP32, "INT64": schema.TYPE_INT64}
HEADER = "# Written by tickserve export; a change here is overwritten by the next publish.\n"


def build_config(
    manifest: Manifest, settings: ExportSettings, manifests: Mapping[int, str], load: Sequence[int] | None = None
) -> str:
    """The text of config.pbtxt for the model `manifest` describes.

    `manifests` maps each version in the repository to the digest of its manifest.json. `load` are the versions Triton
    is to load, by default the newest.
    """
    config = schema.ModelConfig(
        name=manifest.name,
        backend=model_config.BACKEND,
        default_model_filename=model_config.MODEL_FILE,
        max_batch_size=settings.max_batch,
        version_policy=_policy(load, settings.keep_versions),
        input=[_input(tensor) for tensor in manifest.inputs],
        output=[_output(tensor) for tensor in manifest.outputs],
        dynamic_batching=_batching(settings),
        instance_group=[schema.ModelInstanceGroup(count=settings.instances, kind=_kind(manifest))],
        optimization=_optimization(manifest, settings),
        response_cache=schema.ModelResponseCache(enable=False),
        model_warmup=[_warmup(manifest, rows) for rows in sorted({1, *settings.preferred_batch_rows})],
        parameters={
            key: schema.ModelParameter(string_value=value)
            for key, value in _parameters(_threads(manifest, settings), manifests)
        },
    )
    text: str = HEADER + text_format.MessageToString(config)
    parse_config(text)
    return text


def _policy(load: Sequence[int] | None, keep: int) -> Any:
    if load is None:
        return schema.ModelVersionPolicy(latest={"num_versions": keep})
    return schema.ModelVersionPolicy(specific={"versions": sorted(load)})


def with_versions(text: str, manifests: Mapping[int, str], load: Sequence[int] | None, keep: int) -> str:
    """A published configuration that lists `manifests` and loads `load`, the newest `keep` for None; else unchanged.

    Raises ArtifactError for a text that is not one of ours.
    """
    parse_config(text)
    config = text_format.Parse(text, schema.ModelConfig())
    for name in [name for name in config.parameters if model_config.MANIFEST_PARAMETER.fullmatch(name)]:
        del config.parameters[name]
    for version in sorted(manifests):
        config.parameters[model_config.manifest_parameter(version)].string_value = manifests[version]
    config.version_policy.CopyFrom(_policy(load, keep))
    changed: str = HEADER + text_format.MessageToString(config)
    return changed


def with_gated(text: str, manifest: Manifest) -> str:
    """A published configuration with the threads and the graph level `manifest` was gated with, where it records them.

    Else unchanged. Raises ArtifactError for a text that is not one of ours.
    """
    gated = manifest.export.judged_with() if manifest.export else None
    options = parse_config(text)
    if gated is None or (options.intra_op_threads, options.graph_level) == (gated.threads, gated.graph_level):
        return text
    config = text_format.Parse(text, schema.ModelConfig())
    config.parameters[model_config.INTRA_OP_THREADS].string_value = str(gated.threads)
    config.optimization.graph.level = gated.graph_level
    changed: str = HEADER + text_format.MessageToString(config)
    return changed


def without_versions(text: str, versions: Iterable[int]) -> str:
    """A published configuration that no longer lists or names `versions`; else unchanged. Raises ArtifactError."""
    parse_config(text)
    config, gone = text_format.Parse(text, schema.ModelConfig()), set(versions)
    for version in gone:
        config.parameters.pop(model_config.manifest_parameter(version), None)
    if config.version_policy.WhichOneof("policy_choice") == "specific":
        config.version_policy.CopyFrom(_policy(sorted(set(config.version_policy.specific.versions) - gone), 1))
    changed: str = HEADER + text_format.MessageToString(config)
    return changed


def policy_of(text: str) -> tuple[str, list[int]]:
    """The version policy of a configuration: `latest` with its number, `specific` with the versions, or `all`."""
    policy = text_format.Parse(text, schema.ModelConfig()).version_policy
    kind = policy.WhichOneof("policy_choice")
    if kind == "all":
        return "all", []
    if kind == "specific":
        return "specific", sorted(policy.specific.versions)
    return "latest", [max(1, policy.latest.num_versions)]


def chosen_by_policy(text: str, versions: Sequence[int]) -> list[int]:
    """Those of `versions` that Triton would load, oldest first."""
    kind, numbers = policy_of(text)
    if kind == "specific":
        return sorted(set(versions) & set(numbers))
    return sorted(versions) if kind == "all" else sorted(versions)[-numbers[0] :]


def _input(tensor: TensorSpec) -> Any:
    return schema.ModelInput(name=tensor.name, data_type=TRITON_TYPES[tensor.dtype], dims=tensor.shape)


def _output(tensor: TensorSpec) -> Any:
    return schema.ModelOutput(name=tensor.name, data_type=TRITON_TYPES[tensor.dtype], dims=tensor.shape)


def _batching(settings: ExportSettings) -> Any:
    """Dynamic batching, and a queue policy that is always said: a bound that refuses, or, empty, that there is none.

    A queue policy or priority levels switch off Triton's prefetching; a request that arrives while every instance is
    busy or just finishing then may not wake the batcher, which looks again after 500 ms (docs/batching.md). So a
    bounded queue is a choice, not the default; a policy with nothing in it leaves prefetching on. Single decisions are
    the default lane, 1; bulk scoring names lane 2.
    """
    batching = schema.ModelDynamicBatching(
        preferred_batch_size=sorted(set(settings.preferred_batch_rows)),
        max_queue_delay_microseconds=settings.queue_delay_us,
    )
    batching.default_queue_policy.SetInParent()
    if settings.queue_policy == "reject":
        batching.default_queue_policy.CopyFrom(_reject(settings))
    if settings.priority_lanes:
        batching.priority_levels = model_config.BULK_LANE
        batching.default_priority_level = model_config.SINGLE_LANE
    return batching


def _reject(settings: ExportSettings) -> Any:
    return schema.ModelQueuePolicy(
        timeout_action=schema.ModelQueuePolicy.REJECT,
        default_timeout_microseconds=settings.queue_timeout_us,
        allow_timeout_override=True,
        max_queue_size=settings.queue_size,
    )


def _warmup(manifest: Manifest, rows: int) -> Any:
    """Zeros of the right shape: a warm-up pays for allocations and first-call kernels, golden pairs check numbers."""
    inputs = {
        tensor.name: schema.ModelWarmup.Input(data_type=TRITON_TYPES[tensor.dtype], dims=tensor.shape, zero_data=True)
        for tensor in manifest.inputs
    }
    return schema.ModelWarmup(name=f"rows_{rows}", batch_size=rows, inputs=inputs, count=1)


def _measured(manifest: Manifest) -> RuntimeRecord | None:
    return manifest.export.runtime if manifest.export else None


def _threads(manifest: Manifest, settings: ExportSettings) -> int:
    """Those the gates judged; for a bundle those that the settings name; else one."""
    gated = _gated(manifest)
    if gated is not None:
        return gated.threads
    return 1 if manifest.export else settings.threads or 1


def _gated(manifest: Manifest) -> Gated | None:
    return manifest.export.judged_with() if manifest.export else None


def _kind(manifest: Manifest) -> Any:
    """KIND_AUTO, the GPU where there is one, else the CPU: one line for a laptop and for production.

    KIND_CPU only where both were measured and the GPU was not better.
    """
    measured = _measured(manifest)
    return schema.ModelInstanceGroup.Kind.Value(measured.kind if measured else "KIND_AUTO")


def _optimization(manifest: Manifest, settings: ExportSettings) -> Any:
    """The graph's level, as gated; and TensorRT in front of CUDA where the settings ask for it."""
    gated = _gated(manifest)
    optimization = schema.ModelOptimizationPolicy(graph={"level": gated.graph_level if gated else 0})
    if settings.tensorrt == "accelerator" and runs_on_tensorrt(manifest):
        accelerator = optimization.execution_accelerators.gpu_execution_accelerator.add(name=model_config.TENSORRT)
        accelerator.parameters.update(accelerator_parameters(manifest, settings))
    return optimization


def _parameters(threads: int, manifests: Mapping[int, str]) -> list[tuple[str, str]]:
    fixed = [
        (model_config.INTRA_OP_THREADS, str(threads)),
        (model_config.INTER_OP_THREADS, "1"),
        (model_config.EXECUTION_MODE, model_config.SEQUENTIAL),
    ]
    return fixed + [(model_config.manifest_parameter(version), manifests[version]) for version in sorted(manifests)]


def parse_config(text: str) -> model_config.BackendOptions:
    """Read config.pbtxt back as a backend will. Raises ArtifactError for an unknown field or one not honoured."""
    try:
        message = text_format.Parse(text, schema.ModelConfig())
    except text_format.ParseError as error:
        raise ArtifactError(f"not a model configuration: {error}", field=model_config.CONFIG_NAME) from error
    return model_config.read_options(json_format.MessageToDict(message, preserving_proto_field_name=True))


def read_config(path: Path) -> model_config.BackendOptions:
    """`parse_config` of a file; its name must be its folder's."""
    if not path.is_file():
        raise ArtifactError("missing", field=model_config.CONFIG_NAME)
    try:
        options = parse_config(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise ArtifactError(f"not UTF-8 at byte {error.start}", field=model_config.CONFIG_NAME) from error
    if options.name != path.parent.name:
        raise ArtifactError("wrong model name", field="name", expected=path.parent.name, was=options.name[:100])
    return options


def check_config_matches(options: model_config.BackendOptions, model: ModelProto) -> None:
    """Raise ArtifactError unless the graph takes and gives exactly the tensors the configuration declares."""
    check_signature(model, options.inputs, options.outputs)

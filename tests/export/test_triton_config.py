"""config.pbtxt: explicit, byte-stable, and refused where a backend would have to ignore something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2 as schema

from export import export_bundle
from export.check_model import read_model
from export.triton_config import build_config, check_config_matches, parse_config, read_config
from tickserve.config import ExportSettings
from tickserve.errors import ArtifactError
from tickserve.manifest import Manifest, load_manifest
from tickserve.model_config import read_options

DIGESTS = {2: "sha256:" + "b" * 64, 10: "sha256:" + "c" * 64, 1: "sha256:" + "a" * 64}


@pytest.fixture
def manifest(trees_bundle_once: Path) -> Manifest:
    return load_manifest(trees_bundle_once)


def as_message(text: str) -> Any:
    return text_format.Parse(text, schema.ModelConfig())


def as_triton_gives_it(text: str) -> dict[str, Any]:
    """The JSON a backend receives: every field, also those that are empty."""
    message = as_message(text)
    given: dict[str, Any] = json.loads(
        json_format.MessageToJson(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    )
    optimization = {"priority": "PRIORITY_DEFAULT", "input_pinned_memory": {"enable": True}, "eager_batching": False}
    given["optimization"] |= optimization | {"output_pinned_memory": {"enable": True}}
    return given


def test_the_config_says_everything(manifest: Manifest, settings: ExportSettings) -> None:
    config = as_message(build_config(manifest, settings, DIGESTS))
    assert (config.name, config.backend, config.max_batch_size) == (manifest.name, "onnxruntime", settings.max_batch)
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("features", schema.TYPE_FP32, [6])]
    assert [(t.name, t.data_type, list(t.dims)) for t in config.output] == [
        ("probabilities", schema.TYPE_FP32, [3]),
        ("score", schema.TYPE_FP32, [1]),
        ("bundle_id", schema.TYPE_INT64, [1]),
    ]
    # That there is no bound is said, by a policy with nothing in it.
    assert config.dynamic_batching.HasField("default_queue_policy")
    assert config.dynamic_batching.default_queue_policy == schema.ModelQueuePolicy()
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, schema.ModelInstanceGroup.KIND_AUTO)]
    assert config.version_policy.latest.num_versions == settings.keep_versions
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 4, 8]
    assert all(warmup.inputs["features"].zero_data for warmup in config.model_warmup)
    assert not config.response_cache.enable
    assert not config.HasField("model_transaction_policy")


def test_a_bounded_queue_is_written_where_it_is_asked_for(manifest: Manifest, settings: ExportSettings) -> None:
    text = build_config(manifest, settings.model_copy(update={"queue_policy": "reject"}), DIGESTS)
    queue = as_message(text).dynamic_batching.default_queue_policy
    assert queue.timeout_action == schema.ModelQueuePolicy.REJECT
    assert (queue.max_queue_size, queue.default_timeout_microseconds) == (
        settings.queue_size,
        settings.queue_timeout_us,
    )
    assert queue.allow_timeout_override
    assert read_options(as_triton_gives_it(text)).name == manifest.name


def test_the_config_reads_back_as_a_backend_reads_it(manifest: Manifest, settings: ExportSettings) -> None:
    text = build_config(manifest, settings, DIGESTS)
    options = parse_config(text)
    assert options == read_options(as_triton_gives_it(text))
    assert (options.name, options.max_batch) == (manifest.name, settings.max_batch)
    assert (options.inputs, options.outputs) == (manifest.inputs, manifest.outputs)
    assert (options.intra_op_threads, options.inter_op_threads) == (1, 1)
    assert options.graph_optimization == "ORT_ENABLE_ALL"
    assert options.manifests == DIGESTS


def test_the_config_is_the_same_bytes_for_the_same_settings(manifest: Manifest, settings: ExportSettings) -> None:
    texts = {
        build_config(manifest, settings, dict(order)) for order in (DIGESTS.items(), reversed(list(DIGESTS.items())))
    }
    assert len(texts) == 1
    assert build_config(manifest, settings.model_copy(update={"max_batch": 99}), DIGESTS) not in texts


Change = Callable[[Any], object]


def accelerate(config: Any) -> None:
    config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda c: setattr(c.sequence_batching, "max_sequence_idle_microseconds", 5), "sequence_batching"),
        (lambda c: c.ensemble_scheduling.step.add(model_name="other"), "ensemble_scheduling"),
        (lambda c: setattr(c.model_transaction_policy, "decoupled", True), "model_transaction_policy"),
        (lambda c: setattr(c, "platform", "onnxruntime_onnx"), "platform"),
        (lambda c: setattr(c, "backend", "python"), "backend"),
        (lambda c: setattr(c, "default_model_filename", "../evil.onnx"), "default_model_filename"),
        (lambda c: setattr(c, "max_batch_size", 0), "max_batch_size"),
        (accelerate, "optimization.execution_accelerators"),
        (lambda c: setattr(c.optimization.cuda, "graphs", True), "optimization.cuda"),
        (lambda c: setattr(c.optimization.graph, "level", 7), "optimization.graph.level"),
        (lambda c: setattr(c.parameters["enable_mem_arena"], "string_value", "1"), "parameters.enable_mem_arena"),
        (lambda c: setattr(c.parameters["manifest.01"], "string_value", "x"), "parameters.manifest.01"),
        (lambda c: setattr(c.parameters["execution_mode"], "string_value", "x"), "execution_mode"),
        (lambda c: setattr(c.parameters["execution_mode"], "string_value", "1"), "execution_mode"),
        (lambda c: setattr(c.instance_group[0], "kind", schema.ModelInstanceGroup.KIND_MODEL), "instance_group.kind"),
        (lambda c: setattr(c.input[0], "data_type", schema.TYPE_FP16), "input features"),
        (lambda c: setattr(c.input[0], "optional", True), "input features.optional"),
        (lambda c: setattr(c.input[0], "allow_ragged_batch", True), "input features.allow_ragged_batch"),
        (lambda c: c.input[0].dims.append(-1), "input features.dims"),
        (lambda c: setattr(c.response_cache, "enable", True), "response_cache.enable"),
        (lambda c: c.batch_input.add(target_name=["x"]), "batch_input"),
    ],
)  # fmt: skip
def test_what_a_backend_does_not_honour_is_refused(
    change: Change, field: str, manifest: Manifest, settings: ExportSettings
) -> None:
    message = as_message(build_config(manifest, settings, DIGESTS))
    change(message)
    with pytest.raises(ArtifactError) as refused:
        parse_config(text_format.MessageToString(message))
    assert refused.value.field == field


def test_an_unknown_field_is_refused(manifest: Manifest, settings: ExportSettings) -> None:
    with pytest.raises(ArtifactError, match="no_such_field"):
        parse_config(build_config(manifest, settings, DIGESTS) + "no_such_field: 1\n")


def test_a_config_that_does_not_match_its_graph_is_refused(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    published = export_bundle(trees_bundle, repository, settings)
    path = repository / published.model / "config.pbtxt"
    graph = read_model(published.path / "model.onnx")
    check_config_matches(read_config(path), graph)
    for old, new in (("dims: 6", "dims: 7"), ('"features"', '"rows"'), ("TYPE_INT64", "TYPE_FP32")):
        changed = parse_config(path.read_text().replace(old, new))
        with pytest.raises(ArtifactError):
            check_config_matches(changed, graph)


def test_a_config_in_another_models_folder_is_refused(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    published = export_bundle(trees_bundle, repository, settings)
    (repository / published.model).rename(repository / "other")
    with pytest.raises(ArtifactError, match="wrong model name"):
        read_config(repository / "other" / "config.pbtxt")
    with pytest.raises(ArtifactError, match="missing"):
        read_config(repository / published.model / "config.pbtxt")


def test_a_config_that_is_not_text_is_refused(trees_bundle: Path, repository: Path, settings: ExportSettings) -> None:
    published = export_bundle(trees_bundle, repository, settings)
    path = repository / published.model / "config.pbtxt"
    path.write_bytes(path.read_bytes() + b"\xff\xfe")
    with pytest.raises(ArtifactError, match="not UTF-8"):
        read_config(path)
    assert export_bundle(trees_bundle, repository, settings).reused, "the next export writes it anew"
    assert read_config(path)

"""Models to ONNX graphs, and a graph to the one that is served.

A net or a forest becomes `input -> probabilities`; `serve_graph` adds what every client gets beside them: the score,
and the id of the bundle that spoke. Letters: B rows, T steps of a window, F features.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper

from export import versions
from export.check_model import BATCH_DIMENSION, check_safe, dimensions, graph_inputs
from export.link_graph import add_link
from models.ordinal import OrdinalLink
from tickserve.errors import ArtifactError
from tickserve.manifest import StateTensor, TensorSpec

PROBABILITIES, SCORE, BUNDLE_ID = "probabilities", "score", "bundle_id"
DIGEST_KEY = "tickserve.bundle_digest"
OPTIMIZATION_KEY = "tickserve.graph_optimization"
# The graph is published as it was converted: ONNX Runtime optimises at load for the machine it runs on, and a graph
# optimised here would carry this machine's choices (and operators) to another.
OPTIMIZATION = "none"
DOWN, UP = 0, 2


def net_to_onnx(model: Any, tensor: TensorSpec) -> ModelProto:
    """A torch module `[B, ...] -> [B, 3]` as a graph from `tensor` to `probabilities` with a dynamic batch.

    `model` is a torch.nn.Module (typed loosely so that importing this module does not load torch).
    """
    return _exported(model, {tensor.name: tensor.shape}, [PROBABILITIES])


def stepped_to_onnx(model: Any, features: int, state: Sequence[StateTensor]) -> ModelProto:
    """A stateful torch module `[B, F], [B, L, H] ... -> [B, 3], [B, L, H] ...` with a dynamic batch.

    The graph is `features`, then each state's input, to `probabilities`, then each state's output.
    """
    inputs = {"features": (features,), **{tensor.input: tensor.shape for tensor in state}}
    return _exported(model, inputs, [PROBABILITIES, *(tensor.output for tensor in state)])


def _exported(model: Any, inputs: Mapping[str, tuple[int, ...]], outputs: list[str]) -> ModelProto:
    import torch

    # Two rows: an example of one row would let the exporter fix the batch at one.
    examples = tuple(torch.zeros(2, *shape) for shape in inputs.values())
    batch = torch.export.Dim(BATCH_DIMENSION)
    with _quiet_exporter():
        program = torch.onnx.export(
            model.eval(),
            examples,
            dynamo=True,
            dynamic_shapes=tuple({0: batch} for _ in examples),
            input_names=list(inputs),
            output_names=outputs,
            opset_version=versions.OPSET,
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise ArtifactError("torch exported nothing", field="model")
    return clean_graph(program.model_proto)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter warns about torch's own deprecations, about how nn.LSTM keeps its weights, and about torchvision.

    None of it concerns the model: what comes out is checked, and held against research.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def trees_to_onnx(booster: Any, features: int) -> ModelProto:
    """An XGBoost booster (`multi:softprob`, 3 classes) as a graph `features -> probabilities`.

    The trees up to `best_iteration` are converted, as early stopping means them. Raises ArtifactError for what does
    not convert faithfully: DART, categorical splits, another objective.
    """
    from export.trees import prepare_booster

    converted = _converted(prepare_booster(booster, features), features)
    _keep_probabilities(converted)
    _name_batch(converted.graph)
    return clean_graph(converted)


def margin_to_onnx(booster: Any, features: int, link: OrdinalLink) -> ModelProto:
    """A booster of one margin (a regression or a ranking) and its link as a graph `features -> probabilities`.

    Raises ArtifactError as `trees_to_onnx` does.
    """
    from export.trees import as_regression, prepare_booster

    converted = _converted(as_regression(prepare_booster(booster, features, margin=True)), features)
    if len(converted.graph.output) != 1:
        raise ArtifactError("expected one margin from the converted trees", field="output")
    _name_batch(converted.graph)
    graph = clean_graph(converted)
    add_link(graph, link, PROBABILITIES)
    return clean_graph(graph)


def _converted(booster: Any, features: int) -> ModelProto:
    from onnxmltools.convert import convert_xgboost
    from onnxmltools.convert.common.data_types import FloatTensorType

    kind = FloatTensorType([None, features])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        model = convert_xgboost(booster, initial_types=[("features", kind)], target_opset=versions.TREE_OPSET)
    converted = ModelProto()
    converted.CopyFrom(model)
    return converted


def _keep_probabilities(model: ModelProto) -> None:
    if any(node.op_type == "ZipMap" for node in model.graph.node):
        raise ArtifactError("expected a tensor of probabilities, was a ZipMap", field="model")
    kept = [output for output in model.graph.output if output.name == PROBABILITIES]
    if len(kept) != 1:
        names = str([output.name for output in model.graph.output])
        raise ArtifactError(
            "the converted trees give no probabilities", field="output", expected=PROBABILITIES, was=names
        )
    del model.graph.output[:]
    model.graph.output.extend(kept)


def _name_batch(graph: GraphProto) -> None:
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH_DIMENSION


def clean_graph(model: ModelProto, *, name: str = "tickserve") -> ModelProto:
    """A copy without what names the machine or the run: doc strings, stack traces, random graph names, producers."""
    cleaned = ModelProto()
    cleaned.CopyFrom(model)
    for field in ("doc_string", "domain", "producer_name", "producer_version", "model_version"):
        cleaned.ClearField(field)
    del cleaned.metadata_props[:]
    cleaned.ir_version = versions.IR_VERSION
    cleaned.graph.name = name
    _clean(cleaned.graph)
    _pin_opset(cleaned)
    return cleaned


def _pin_opset(model: ModelProto) -> None:
    has_nodes = any(node.domain in ("", "ai.onnx") for node in model.graph.node)
    declared = {opset.domain: opset.version for opset in model.opset_import}
    if not has_nodes or "" not in declared:
        # Only operators of other domains so far (trees): what is added later is written for OPSET.
        declared[""] = versions.OPSET
    used = {node.domain for node in model.graph.node}
    del model.opset_import[:]
    model.opset_import.extend(
        helper.make_opsetid(domain, version) for domain, version in sorted(declared.items()) if domain in used | {""}
    )


def _clean(graph: GraphProto) -> None:
    graph.ClearField("doc_string")
    del graph.metadata_props[:]
    # Inferred again by whoever loads it; the recorded ones carry the exporter's notes.
    del graph.value_info[:]
    for item in (*graph.input, *graph.output, *graph.initializer, *graph.node):
        item.ClearField("doc_string")
        del item.metadata_props[:]
    for node in graph.node:
        for attribute in node.attribute:
            attribute.ClearField("doc_string")


def serve_graph(
    model: ModelProto,
    bundle_id: int,
    *,
    input_name: str | None = None,
    bundle_digest: str | None = None,
    state: Sequence[StateTensor] = (),
) -> ModelProto:
    """The graph that is served: `probabilities` FP32 [B, 3], `score` FP32 [B, 1], `bundle_id` INT64 [B, 1].

    `score` is p_up - p_down; `bundle_id` is a constant, one per row. The input is named `input_name`, or "features"
    for rows [B, F] and "window" for windows [B, T, F]; the tensors of `state` follow on both sides.
    Raises UnsafeModelError and ArtifactError.
    """
    served = clean_graph(model)
    inputs, outputs, count = graph_inputs(served), list(served.graph.output), 1 + len(state)
    if (len(inputs), len(outputs)) != (count, count):
        tensors = "one input and one output" if count == 1 else f"{count} inputs and outputs"
        raise ArtifactError(
            "wrong number of tensors", field="model", expected=tensors, was=f"{len(inputs)} and {len(outputs)}"
        )
    rank = len(dimensions(inputs[0]) or ())
    wanted = [input_name or ("features" if rank == 2 else "window"), *(tensor.input for tensor in state)]
    given = [PROBABILITIES, *(tensor.output for tensor in state)]
    _rename(served.graph, dict(zip([value.name for value in (*inputs, *outputs)], [*wanted, *given], strict=True)))
    _add_outputs(served.graph, bundle_id, state)
    _pin_opset(served)
    notes = {OPTIMIZATION_KEY: OPTIMIZATION} | ({DIGEST_KEY: bundle_digest} if bundle_digest else {})
    helper.set_model_props(served, dict(sorted(notes.items())))
    check_safe(served)
    return served


def _add_outputs(graph: GraphProto, bundle_id: int, state: Sequence[StateTensor]) -> None:
    """Gather and Sub rather than one MatMul: a GPU may round a product to TF32, a difference it may not."""
    constants = {
        "tickserve.up": ([1], [UP]),
        "tickserve.down": ([1], [DOWN]),
        "tickserve.bundle_id": ([1, 1], [bundle_id]),
    }
    graph.initializer.extend(
        helper.make_tensor(name, TensorProto.INT64, shape, values) for name, (shape, values) in constants.items()
    )
    graph.node.extend(
        [
            helper.make_node("Gather", [PROBABILITIES, "tickserve.up"], ["tickserve.p_up"], name="p_up", axis=1),
            helper.make_node("Gather", [PROBABILITIES, "tickserve.down"], ["tickserve.p_down"], name="p_down", axis=1),
            helper.make_node("Sub", ["tickserve.p_up", "tickserve.p_down"], [SCORE], name=SCORE),
            helper.make_node("Shape", [SCORE], ["tickserve.shape"], name="shape_of_score"),
            helper.make_node("Expand", ["tickserve.bundle_id", "tickserve.shape"], [BUNDLE_ID], name=BUNDLE_ID),
        ]
    )
    del graph.output[:]
    graph.output.extend(
        [
            helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, [BATCH_DIMENSION, 3]),
            helper.make_tensor_value_info(SCORE, TensorProto.FLOAT, [BATCH_DIMENSION, 1]),
            helper.make_tensor_value_info(BUNDLE_ID, TensorProto.INT64, [BATCH_DIMENSION, 1]),
            *(
                helper.make_tensor_value_info(tensor.output, TensorProto.FLOAT, [BATCH_DIMENSION, *tensor.shape])
                for tensor in state
            ),
        ]
    )


def _rename(graph: GraphProto, renames: Mapping[str, str]) -> None:
    """Rename tensors; an inner tensor that has a name the served graph needs makes room for it."""
    taken = {*renames.values(), SCORE, BUNDLE_ID, PROBABILITIES} - set(renames)
    mapping = {name: f"inner.{name}" for name in taken} | dict(renames)
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = mapping.get(value.name, value.name)
    _rename_nodes(graph, mapping)
    for value in graph.input:
        value.type.tensor_type.shape.dim[0].dim_param = BATCH_DIMENSION


def _rename_nodes(graph: GraphProto, mapping: Mapping[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [mapping.get(name, name) for name in node.input]
        node.output[:] = [mapping.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                raise ArtifactError("graphs with branches or loops are not served", field=node.op_type)

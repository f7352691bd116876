"""Eight-bit graphs in the one form that ONNX Runtime and TensorRT both read: QuantizeLinear and DequantizeLinear.

Symmetric int8 with a zero point of 0, one scale a tensor for activations and one an output channel for weights, which
are stored as int8 behind a DequantizeLinear. Biases stay float: TensorRT refuses an int32 DequantizeLinear, and ONNX
Runtime, where a Gemm or Conv has a float bias, fuses it all the same and rounds the bias, so that its optimised graph
answers other numbers than the graph says. So a bias is an Add of its own, and both give the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from export.onnx_graph import clean_graph
from tickserve.errors import ArtifactError
from training.examples import Rows
from training.quantize import copy_of

INT8_LIMIT = 127
QUANTIZED_OPS = ("MatMul", "Conv")


def count(graph: ModelProto) -> Counter[str]:
    """How many of each operator a graph has: quantizers that were not set are only noticed by counting."""
    return Counter(node.op_type for node in graph.graph.node)


def split_biases(graph: ModelProto) -> ModelProto:
    """Each Gemm as a MatMul and an Add, and each Conv's bias as an Add; the same numbers to float32's last digits."""
    model = copy_of(graph)
    weights = {item.name: item for item in model.graph.initializer}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        made = _split(node, weights, model)
        nodes += made or [node]
    _set_nodes(model, nodes)
    return clean_graph(model)


def _split(node: NodeProto, weights: Mapping[str, Any], model: ModelProto) -> list[NodeProto]:
    """What takes the node's place; nothing where it stays."""
    if node.op_type == "Gemm" and len(node.input) == 3 and node.input[1] in weights:
        return _split_gemm(node, weights, model)
    if node.op_type == "Conv" and len(node.input) == 3 and node.input[2] in weights:
        bias = numpy_helper.to_array(weights[node.input[2]])
        spatial = numpy_helper.to_array(weights[node.input[1]]).ndim - 2
        name = _store(model, f"{node.input[2]}.channels", bias.reshape(1, -1, *(1,) * spatial))
        plain = NodeProto()
        plain.CopyFrom(node)
        del plain.input[2]
        plain.output[0] = f"{node.output[0]}.sum"
        return [plain, helper.make_node("Add", [plain.output[0], name], [node.output[0]], f"{node.name}.bias")]
    return []


def _split_gemm(node: NodeProto, weights: Mapping[str, Any], model: ModelProto) -> list[NodeProto]:
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if given.get("transA", 0) or given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
        raise ArtifactError(
            "not a dense layer", field=node.name[:100] or "Gemm", expected="x W + b", was=str(given)[:80]
        )
    matrix = numpy_helper.to_array(weights[node.input[1]])
    name = node.input[1]
    if given.get("transB", 0):
        name = _store(model, f"{name}.transposed", matrix.T)
    product = f"{node.output[0]}.product"
    return [
        helper.make_node("MatMul", [node.input[0], name], [product], f"{node.name}.product"),
        helper.make_node("Add", [product, node.input[2]], [node.output[0]], f"{node.name}.bias"),
    ]


def int8_weights(graph: ModelProto) -> ModelProto:
    """Every matrix and kernel of dense layers and convolutions as int8, with a float32 scale per output channel.

    Raises ArtifactError when there is none.
    """
    model, stored = copy_of(graph), 0
    weights = {item.name: item for item in model.graph.initializer}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        name = node.input[1] if len(node.input) > 1 else ""
        if node.op_type in (*QUANTIZED_OPS, "Gemm") and name in weights:
            nodes.append(_dequantized(model, node, numpy_helper.to_array(weights[name])))
            stored += 1
        nodes.append(node)
    if not stored:
        raise ArtifactError("nothing to quantize", field="model", expected="a dense layer or a convolution", was="none")
    _set_nodes(model, nodes)
    return clean_graph(model)


def _dequantized(model: ModelProto, node: NodeProto, matrix: Rows) -> NodeProto:
    """Store the node's weight as int8, and give the DequantizeLinear that it reads from now on."""
    name, axis = node.input[1], _channels(node, matrix)
    others = tuple(place for place in range(matrix.ndim) if place != axis)
    top = np.abs(matrix).max(axis=others)
    scale = np.where(top > 0, top / INT8_LIMIT, 1.0).astype(np.float32)
    spread = scale.reshape([-1 if place == axis else 1 for place in range(matrix.ndim)])
    rounded = np.clip(np.rint(matrix / spread), -INT8_LIMIT, INT8_LIMIT).astype(np.int8)
    parts: dict[str, np.ndarray[Any, Any]] = {"int8": rounded, "scale": scale, "zero": np.zeros(len(scale), np.int8)}
    inputs = [_store(model, f"{name}.{key}", part) for key, part in parts.items()]
    node.input[1] = f"{name}.float"
    return helper.make_node("DequantizeLinear", inputs, [f"{name}.float"], f"{name}.dequantize", axis=axis)


def _channels(node: NodeProto, matrix: Rows) -> int:
    """The axis of the output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "MatMul":
        return matrix.ndim - 1
    return 0 if any(each.name == "transB" and each.i for each in node.attribute) else 1


def _store(model: ModelProto, name: str, array: np.ndarray[Any, Any]) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    return name


def _set_nodes(model: ModelProto, nodes: list[NodeProto]) -> None:
    """Put these nodes in, and leave out the weights that none of them reads."""
    kept_nodes = [_copied(node) for node in nodes]
    used = {name for node in kept_nodes for name in node.input}
    kept = [item for item in model.graph.initializer if item.name in used]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(kept_nodes)
    model.graph.initializer.extend(kept)


def _copied(node: NodeProto) -> NodeProto:
    copied = NodeProto()
    copied.CopyFrom(node)
    return copied

"""The ordinal link as graph nodes: the margin of a forest to the probabilities that are served.

The same operations in the same order and precision as `models/ordinal.py`: float64, rounded to float32 once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.check_model import BATCH_DIMENSION
from models.ordinal import OrdinalLink

PREFIX = "link."


def add_link(model: ModelProto, link: OrdinalLink, output: str) -> None:
    """Turn the one output of `model`, a margin FP32 [B, 1], into probabilities FP32 [B, 3] named `output`."""
    graph = model.graph
    (margin,) = (value.name for value in graph.output)
    constants = {
        "slopes": np.array([[-link.slope, link.slope]], np.float64),
        "cuts": np.array([[link.low, -link.high]], np.float64),
        "one": np.ones((1, 1), np.float64),
        "zero": np.zeros((1, 1), np.float64),
    }
    graph.initializer.extend(numpy_helper.from_array(value, PREFIX + name) for name, value in constants.items())
    graph.node.extend(
        [
            _node("Cast", [margin], ["wide"], to=TensorProto.DOUBLE),
            _node("Mul", ["wide", "slopes"], ["steps"]),
            _node("Add", ["steps", "cuts"], ["distances"]),
            _node("Sigmoid", ["distances"], ["sides"]),
            _node("Split", ["sides"], ["down", "up"], axis=1, num_outputs=2),
            _node("Sub", ["one", "down"], ["not_down"]),
            _node("Sub", ["not_down", "up"], ["between"]),
            _node("Max", ["between", "zero"], ["flat"]),
            _node("Concat", ["down", "flat", "up"], ["all"], axis=1),
            helper.make_node("Cast", [PREFIX + "all"], [output], name=PREFIX + "round", to=TensorProto.FLOAT),
        ]
    )
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, [BATCH_DIMENSION, 3]))


def _node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> NodeProto:
    inner = [name if index == 0 and kind == "Cast" else PREFIX + name for index, name in enumerate(inputs)]
    return helper.make_node(
        kind, inner, [PREFIX + name for name in outputs], name=PREFIX + kind.lower() + "_" + outputs[0], **attributes
    )

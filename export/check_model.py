"""What is checked in a model file before anything loads it: model files are data from outside.

Bytes become an ONNX graph only when they are not a pickle, an archive or half a file; the graph is handed on only when
it reads no other file, uses known operators, has finite weights, no dynamic dimension but the batch, and a size that a
model of this project can have. `read_model` lets a process of its own find that out (`export.sandbox`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from export import sandbox, versions
from tickserve.errors import ArtifactError, UnsafeModelError
from tickserve.manifest import TensorSpec

MAX_MODEL_BYTES = 512 * 1024 * 1024
# The largest this project trains are far below: a net of 32 layers has some hundred nodes, a forest is one node.
MAX_NODES = 10_000
MAX_TENSOR_ELEMENTS = 128 * 1024 * 1024
MAX_ATTRIBUTE_VALUES = 32 * 1024 * 1024
MAX_ROW_ELEMENTS = 4 * 1024 * 1024
BATCH_DIMENSION = "batch"
ELEMENT_TYPES = {"FP32": TensorProto.FLOAT, "INT64": TensorProto.INT64}
# First bytes of what is no ONNX file, though it may be called one.
FOREIGN_MAGIC = {
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"PK\x03\x04": "a zip archive (torch.save, .pt2 or .npz)",
    b"\x1f\x8b": "a gzip file",
    b"\x93NUMPY": "a numpy file",
    b"version https://git-lfs": "a git-LFS pointer",
}
# Their numbers differ from call to call, so no parity gate could hold.
RANDOM_OPS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def read_model(source: Path | bytes, *, max_bytes: int = MAX_MODEL_BYTES) -> ModelProto:
    """The checked ONNX graph in a file or in bytes, judged by a limited process before this one parses it.

    Raises UnsafeModelError: too large, empty, truncated, not ONNX, a link, content that `check_safe` refuses, or more
    memory or time than its check may take.
    """
    data = _read_bytes(source, max_bytes)
    check_not_foreign(data, "an ONNX graph")
    sandbox.inspect(data)
    return _decode(data)


def parse_model(data: bytes) -> ModelProto:
    """`read_model` without the limited process: what runs inside it. Raises UnsafeModelError."""
    check_not_foreign(data, "an ONNX graph")
    model = _decode(data)
    check_safe(model)
    return model


def _decode(data: bytes) -> ModelProto:
    try:
        model: ModelProto = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise UnsafeModelError("not an ONNX file, or a part of one", field="model.onnx") from error
    return model


def _read_bytes(source: Path | bytes, max_bytes: int) -> bytes:
    if isinstance(source, bytes):
        data = source
    elif source.is_symlink() or not source.is_file():
        raise UnsafeModelError("expected a plain file", field=source.name)
    elif source.stat().st_size > max_bytes:
        raise UnsafeModelError(
            "too large", field=source.name, expected=f"at most {max_bytes} bytes", was=str(source.stat().st_size)
        )
    else:
        data = source.read_bytes()
    if len(data) > max_bytes:
        raise UnsafeModelError("too large", field="model", expected=f"at most {max_bytes} bytes", was=str(len(data)))
    if not data:
        raise UnsafeModelError("the file is empty", field="model")
    return data


def check_not_foreign(data: bytes, expected: str) -> None:
    """Raise UnsafeModelError when `data` starts like a pickle, an archive or a pointer."""
    for magic, what in FOREIGN_MAGIC.items():
        if data.startswith(magic):
            raise UnsafeModelError("another kind of file under this name", field="model", expected=expected, was=what)


def check_safe(model: ModelProto) -> None:
    """Raise UnsafeModelError unless the graph is one this project loads (see the module)."""
    if not model.graph.node or not model.graph.output or not model.opset_import:
        raise UnsafeModelError("not an ONNX file: it holds no graph", field="model")
    if model.functions or model.training_info:
        raise UnsafeModelError("expected a plain graph, was one with functions or training steps", field="model")
    # External data first: the checker below would open the file it names.
    for tensor in _tensors(model.graph):
        _check_no_external_data(tensor)
    if model.graph.sparse_initializer:
        # A few bytes that stand for any number of zeros.
        raise UnsafeModelError("sparse weights are not served", field="graph.sparse_initializer")
    _check_size(model.graph)
    _check_versions(model)
    for node in _nodes(model.graph):
        _check_operator(node)
    _check_weights(model.graph)
    for value in graph_inputs(model):
        _check_one_dynamic_dimension(value)
    _check_structure(model)


def graph_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """The inputs a caller has to give: those that no initializer fills."""
    filled = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in filled]


def dimensions(value: ValueInfoProto) -> tuple[int | str | None, ...] | None:
    """Each dimension as its number, its name or None; None for a tensor without a rank."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param if dim.HasField("dim_param") else None)
        for dim in tensor.shape.dim
    )


def zeros(value: ValueInfoProto, rows: int) -> npt.NDArray[Any]:
    """An input of `rows` rows of zeros, of the type and shape that `value` declares."""
    shape = [rows, *(int(dim or 0) for dim in (dimensions(value) or ())[1:])]
    return np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def _subgraphs(attribute: AttributeProto) -> Iterator[GraphProto]:
    if attribute.type == AttributeProto.GRAPH:
        yield attribute.g
    yield from attribute.graphs


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in _subgraphs(attribute):
                yield from _nodes(inner)


def _attribute_tensors(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    for sparse in (
        *((attribute.sparse_tensor,) if attribute.HasField("sparse_tensor") else ()),
        *attribute.sparse_tensors,
    ):
        yield sparse.values
        yield sparse.indices
    for inner in _subgraphs(attribute):
        yield from _initializers(inner)


def _initializers(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from _initializers(graph)
    for node in _nodes(graph):
        for attribute in node.attribute:
            yield from _attribute_tensors(attribute)


def _check_no_external_data(tensor: TensorProto) -> None:
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        # The location is not repeated: it is whatever a stranger wrote.
        raise UnsafeModelError("weights outside the file are never read", field=tensor.name[:100] or "initializer")


def _check_size(graph: GraphProto) -> None:
    """Before any tensor is filled: what a tensor or a graph claims to hold is only numbers so far."""
    nodes = sum(1 for _ in _nodes(graph))
    if nodes > MAX_NODES:
        raise UnsafeModelError("too many nodes", field="graph.node", expected=f"at most {MAX_NODES}", was=str(nodes))
    values = sum(len(a.floats) + len(a.ints) + len(a.strings) for node in _nodes(graph) for a in node.attribute)
    elements = sum(_elements(tensor) for tensor in _tensors(graph))
    for field, limit, was in (
        ("attributes", MAX_ATTRIBUTE_VALUES, values),
        ("tensor elements", MAX_TENSOR_ELEMENTS, elements),
    ):
        if was > limit:
            raise UnsafeModelError("too many values", field=field, expected=f"at most {limit}", was=str(was)[:40])


def _elements(tensor: TensorProto) -> int:
    if any(size < 0 for size in tensor.dims):
        raise UnsafeModelError("a negative dimension", field=tensor.name[:100] or "constant")
    return math.prod(tensor.dims)


def _check_versions(model: ModelProto) -> None:
    limits = {
        "": (versions.MIN_OPSET, versions.MAX_OPSET),
        "ai.onnx": (versions.MIN_OPSET, versions.MAX_OPSET),
        versions.ML_DOMAIN: (1, versions.MAX_ML_OPSET),
        versions.CONTRIB_DOMAIN: (1, versions.CONTRIB_OPSET),
    }
    for opset in model.opset_import:
        if opset.domain not in limits:
            raise UnsafeModelError("custom operators are never loaded", field=f"domain {opset.domain[:50]!r}")
        low, high = limits[opset.domain]
        if not low <= opset.version <= high:
            field = f"opset of {opset.domain or 'ai.onnx'}"
            raise UnsafeModelError("unsupported", field=field, expected=f"{low} to {high}", was=str(opset.version))
    if not 1 <= model.ir_version <= versions.MAX_IR_VERSION:
        expected = f"1 to {versions.MAX_IR_VERSION}"
        raise UnsafeModelError("unsupported", field="ir_version", expected=expected, was=str(model.ir_version))


def _check_operator(node: NodeProto) -> None:
    known = {"", "ai.onnx", versions.ML_DOMAIN, versions.CONTRIB_DOMAIN}
    named = f"{node.domain[:50]}.{node.op_type[:50]}" if node.domain else node.op_type[:50]
    if node.domain not in known:
        raise UnsafeModelError("custom operators are never loaded", field=named)
    if node.domain == versions.CONTRIB_DOMAIN and node.op_type not in versions.CONTRIB_OPS:
        raise UnsafeModelError("not one of the ONNX Runtime operators that are loaded", field=named)
    if any(True for attribute in node.attribute for _ in _subgraphs(attribute)):
        raise UnsafeModelError("graphs with branches or loops are not served", field=named)
    if any(a.HasField("sparse_tensor") or a.sparse_tensors for a in node.attribute):
        raise UnsafeModelError("sparse weights are not served", field=named)
    if node.op_type in RANDOM_OPS:
        raise UnsafeModelError("an operator with random results cannot be held to research's numbers", field=named)


def _check_weights(graph: GraphProto) -> None:
    for tensor in _tensors(graph):
        if not _finite_tensor(tensor):
            raise UnsafeModelError("NaN or infinite weights", field=tensor.name[:100] or "constant")
    for node in _nodes(graph):
        for attribute in node.attribute:
            if not _finite(attribute.floats) or not math.isfinite(attribute.f):
                raise UnsafeModelError("NaN or infinite weights", field=f"{node.op_type[:50]}.{attribute.name[:50]}")


def _finite(values: Iterable[float]) -> bool:
    return bool(np.isfinite(np.fromiter(values, np.float64)).all())


def _finite_tensor(tensor: TensorProto) -> bool:
    if tensor.data_type == TensorProto.STRING:
        return True
    try:
        values = numpy_helper.to_array(tensor)
    except (TypeError, ValueError, KeyError) as error:
        raise UnsafeModelError("weights do not match their shape", field=tensor.name[:100] or "constant") from error
    return values.dtype.kind not in "fc" or bool(np.isfinite(values).all())


def _check_one_dynamic_dimension(value: ValueInfoProto) -> None:
    shape = dimensions(value)
    expected = "one dynamic dimension, the first (batch)"
    if not shape:
        raise UnsafeModelError("no shape", field=value.name[:100], expected=expected)
    fixed = [isinstance(dim, int) and dim > 0 for dim in shape]
    if fixed[0] or not all(fixed[1:]):
        raise UnsafeModelError(
            "dynamic dimensions", field=value.name[:100], expected=expected, was=str(list(shape))[:100]
        )
    row = math.prod(int(dim or 0) for dim in shape[1:])
    if row > MAX_ROW_ELEMENTS:
        limit = f"at most {MAX_ROW_ELEMENTS} numbers in a row"
        raise UnsafeModelError("too large an input", field=value.name[:100], expected=limit, was=str(row)[:40])


def _check_structure(model: ModelProto) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UnsafeModelError(f"not a valid graph: {reason}", field="model") from error


def check_signature(model: ModelProto, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Raise ArtifactError unless the graph takes and gives exactly these tensors, in any order."""
    _check_tensors("input", graph_inputs(model), inputs)
    _check_tensors("output", model.graph.output, outputs)


def _check_tensors(side: str, values: Iterable[ValueInfoProto], specs: Sequence[TensorSpec]) -> None:
    found = {value.name: value for value in values}
    wanted = {spec.name: spec for spec in specs}
    if set(found) != set(wanted):
        raise ArtifactError(
            f"the graph's {side}s are not the manifest's",
            field=side,
            expected=str(sorted(wanted)),
            was=str(sorted(found))[:200],
        )
    for name, spec in wanted.items():
        element, shape = found[name].type.tensor_type.elem_type, dimensions(found[name])
        if element != ELEMENT_TYPES[spec.dtype] or shape is None or tuple(shape[1:]) != spec.shape:
            was = f"{TensorProto.DataType.Name(element)} {list(shape or ())}"
            raise ArtifactError(
                f"wrong {side} tensor", field=name, expected=f"{spec.dtype} [batch, {spec.shape}]", was=was
            )

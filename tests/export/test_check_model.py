"""Hostile and broken model files: each refused with a typed error before anything loads it."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.check_model import MAX_NODES, MAX_ROW_ELEMENTS, check_safe, check_signature, parse_model, read_model
from export.onnx_graph import serve_graph
from tickserve.errors import ArtifactError, UnsafeModelError
from tickserve.manifest import TensorSpec


def small_graph(
    *, shape: tuple[int | str | None, ...] = ("batch", 4), opset: int = 18, domain: str = "", op: str = "MatMul"
) -> ModelProto:
    """softmax(features @ weights): a good graph, unless an argument makes it a bad one."""
    weights = numpy_helper.from_array(np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3), "weights")
    nodes = [
        helper.make_node(op, ["features", "weights"], ["logits"], domain=domain),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])],
        [weights],
    )
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


GOOD = small_graph().SerializeToString()


def test_a_good_graph_passes_from_bytes_and_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(GOOD)
    assert read_model(GOOD) == read_model(tmp_path / "model.onnx") == small_graph()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\x00" * 100, "ONNX"),
        (os.urandom(0) + bytes(range(256)) * 20, "ONNX"),
        (b"not a model at all", "ONNX"),
        *((pickle.dumps({"weights": [1.0]}, protocol=protocol), "a pickle") for protocol in (2, 3, 4, 5)),
        (pickle.dumps({"weights": [1.0]}, protocol=0), "ONNX"),
        (zipped(), "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-LFS pointer"),
    ],
)
def test_what_is_no_graph_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(UnsafeModelError, match=message):
        read_model(data)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.8, 0.99])
def test_a_truncated_graph_is_refused(share: float) -> None:
    with pytest.raises(UnsafeModelError):
        parse_model(GOOD[: int(len(GOOD) * share)])


@given(st.binary(max_size=400))
def test_random_bytes_are_refused_and_never_crash(data: bytes) -> None:
    with pytest.raises(UnsafeModelError):
        parse_model(data)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_still_a_checked_graph(position: int, change: int) -> None:
    damaged = bytearray(GOOD)
    damaged[position] ^= change
    try:
        model = parse_model(bytes(damaged))
    except UnsafeModelError:
        return
    check_safe(model)


def test_a_link_and_a_pipe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real.onnx").write_bytes(GOOD)
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    for name in ("link.onnx", "pipe.onnx", "absent.onnx"):
        with pytest.raises(UnsafeModelError, match="plain file"):
            read_model(tmp_path / name)


def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "model.onnx").open("wb") as file:
        file.truncate(50_000_000_000)
    with pytest.raises(UnsafeModelError, match="at most"):
        read_model(tmp_path / "model.onnx")
    with pytest.raises(UnsafeModelError, match="at most"):
        read_model(GOOD, max_bytes=len(GOOD) - 1)


@pytest.mark.parametrize("location", ["../../etc/passwd", "/etc/passwd", "weights.bin", ""])
def test_external_data_is_never_opened(location: str) -> None:
    model = small_graph()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    with pytest.raises(UnsafeModelError, match="weights outside the file") as refused:
        parse_model(model.SerializeToString())
    assert refused.value.field == "weights"
    assert not location or location not in str(refused.value)


def test_external_data_in_a_constant_inside_a_branch_is_found() -> None:
    tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../etc/passwd")
    branch = helper.make_graph([helper.make_node("Constant", [], ["inner"], value=tensor)], "branch", [], [])
    model = small_graph()
    model.graph.node.append(helper.make_node("If", ["features"], ["o"], then_branch=branch, else_branch=branch))
    with pytest.raises(UnsafeModelError, match="hidden"):
        parse_model(model.SerializeToString())


@pytest.mark.parametrize(
    ("domain", "op"),
    [
        ("evil.example", "MatMul"),
        ("ai.onnx.training", "Gradient"),
        ("com.microsoft", "PythonOp"),
        ("com.microsoft.extensions", "X"),
    ],
)
def test_custom_operators_are_refused(domain: str, op: str) -> None:
    with pytest.raises(UnsafeModelError, match="operators"):
        parse_model(small_graph(domain=domain, op=op).SerializeToString())


def test_a_domain_that_is_used_but_not_declared_is_refused() -> None:
    model = small_graph()
    model.graph.node[0].domain = "evil.example"
    with pytest.raises(UnsafeModelError, match="custom operators"):
        parse_model(model.SerializeToString())


def test_a_function_may_not_stand_for_an_operator() -> None:
    model = small_graph()
    node = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("", "MatMul", ["a"], ["b"], [node], [helper.make_opsetid("", 18)]))
    with pytest.raises(UnsafeModelError, match="functions"):
        parse_model(model.SerializeToString())


def test_random_operators_are_refused() -> None:
    model = small_graph()
    model.graph.node.append(helper.make_node("RandomNormalLike", ["features"], ["noise"]))
    with pytest.raises(UnsafeModelError, match="random"):
        parse_model(model.SerializeToString())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_weights_that_are_not_finite_are_refused(bad: float, dtype: type) -> None:
    model = small_graph()
    values = np.zeros(12, dtype)
    values[5] = bad
    model.graph.initializer.append(numpy_helper.from_array(values, "spoiled"))
    with pytest.raises(UnsafeModelError, match="spoiled: NaN"):
        parse_model(model.SerializeToString())


def test_weights_that_do_not_fill_their_shape_are_refused() -> None:
    model = small_graph()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    with pytest.raises(UnsafeModelError):
        parse_model(model.SerializeToString())


@pytest.mark.parametrize(
    "shape", [("batch", "features"), ("batch", None), (2, 4), (), ("batch", 0), ("batch", -1), (2, "features")]
)
def test_any_dynamic_dimension_but_the_batch_is_refused(shape: tuple[int | str | None, ...]) -> None:
    with pytest.raises(UnsafeModelError, match="one dynamic dimension"):
        parse_model(small_graph(shape=shape).SerializeToString())


def test_an_input_without_a_rank_is_refused() -> None:
    model = small_graph()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(UnsafeModelError, match="no shape"):
        parse_model(model.SerializeToString())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda model: setattr(model.opset_import[0], "version", 99), "opset of ai.onnx"),
        (lambda model: setattr(model.opset_import[0], "version", 7), "opset of ai.onnx"),
        (lambda model: setattr(model, "ir_version", 99), "ir_version"),
        (lambda model: setattr(model, "ir_version", 0), "ir_version"),
    ],
)
def test_versions_no_server_loads_are_refused(change: Callable[[ModelProto], None], field: str) -> None:
    model = small_graph()
    change(model)
    with pytest.raises(UnsafeModelError) as refused:
        parse_model(model.SerializeToString())
    assert refused.value.field == field


def test_a_graph_with_a_dangling_tensor_is_refused() -> None:
    model = small_graph()
    model.graph.node[0].input[1] = "nowhere"
    with pytest.raises(UnsafeModelError, match="not a valid graph"):
        parse_model(model.SerializeToString())


FEATURES = TensorSpec(name="features", dtype="FP32", shape=(4,))
PROBABILITIES = TensorSpec(name="probabilities", dtype="FP32", shape=(3,))


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ((FEATURES.model_copy(update={"name": "rows"}),), (PROBABILITIES,)),
        ((FEATURES.model_copy(update={"shape": (5,)}),), (PROBABILITIES,)),
        ((FEATURES.model_copy(update={"dtype": "INT64"}),), (PROBABILITIES,)),
        ((FEATURES, PROBABILITIES), (PROBABILITIES,)),
        ((FEATURES,), ()),
        ((FEATURES,), (PROBABILITIES.model_copy(update={"shape": (2,)}),)),
    ],
)
def test_tensors_that_are_not_the_declared_ones_are_refused(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> None:
    check_signature(small_graph(), (FEATURES,), (PROBABILITIES,))
    with pytest.raises(ArtifactError):
        check_signature(small_graph(), inputs, outputs)


def test_a_served_graph_makes_room_for_its_names() -> None:
    """A graph that already uses "score" and "features" inside, and other names outside, is renamed, not broken."""
    model = small_graph()
    for node in model.graph.node:
        node.input[:] = [{"features": "score", "logits": "bundle_id"}.get(name, name) for name in node.input]
        node.output[:] = [{"logits": "bundle_id", "probabilities": "features"}.get(name, name) for name in node.output]
    model.graph.input[0].name, model.graph.output[0].name = "score", "features"
    served = serve_graph(model, -5, bundle_digest="sha256:00")
    assert [value.name for value in served.graph.input] == ["features"]
    assert [value.name for value in served.graph.output] == ["probabilities", "score", "bundle_id"]
    from export.runtime import score_onnx

    answer = score_onnx(served.SerializeToString(), {"features": np.ones((3, 4), np.float32)})
    plain = score_onnx(GOOD, {"features": np.ones((3, 4), np.float32)})
    np.testing.assert_array_equal(answer["probabilities"], plain["probabilities"])
    assert answer["bundle_id"].tolist() == [[-5]] * 3
    assert onnx.load_model_from_string(GOOD) == small_graph()


def test_sparse_weights_are_refused() -> None:
    """A few bytes that stand for any number of zeros."""
    model = small_graph()
    values, indices = (numpy_helper.from_array(np.array([1], kind), "few") for kind in (np.float32, np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2**40]))
    with pytest.raises(UnsafeModelError, match="sparse"):
        parse_model(model.SerializeToString())


@pytest.mark.parametrize("op", ["If", "Loop"])
def test_branches_and_loops_are_refused(op: str) -> None:
    """A loop may run for ever, and a branch is checked by nobody who scores only one side of it."""
    inner = helper.make_graph([helper.make_node("Constant", [], ["inner"], value_int=1)], "inner", [], [])
    names = {"If": {"then_branch": inner, "else_branch": inner}, "Loop": {"body": inner}}[op]
    model = small_graph()
    model.graph.node.append(helper.make_node(op, ["features"], ["o"], **names))
    with pytest.raises(UnsafeModelError, match="branches or loops"):
        parse_model(model.SerializeToString())


@pytest.mark.parametrize(
    ("dims", "message"), [([2**40], "at most 134217728"), ([2**20, 2**20], "at most"), ([-1], "negative dimension")]
)
def test_a_tensor_that_claims_more_than_a_model_has_is_refused_before_it_is_filled(
    dims: list[int], message: str
) -> None:
    model = small_graph()
    model.graph.initializer.append(TensorProto(name="claims", data_type=TensorProto.FLOAT, dims=dims, raw_data=b""))
    with pytest.raises(UnsafeModelError, match=message):
        parse_model(model.SerializeToString())


def test_too_many_nodes_and_too_wide_a_row_are_refused() -> None:
    model = small_graph()
    model.graph.node.extend(helper.make_node("Identity", ["logits"], [f"copy{i}"]) for i in range(MAX_NODES))
    with pytest.raises(UnsafeModelError, match="too many nodes"):
        parse_model(model.SerializeToString())
    with pytest.raises(UnsafeModelError, match="too large an input"):
        parse_model(small_graph(shape=("batch", MAX_ROW_ELEMENTS + 1)).SerializeToString())


def test_a_graph_that_does_not_score_two_rows_is_refused_by_the_limited_process() -> None:
    """Its batch is declared dynamic and fixed at one inside: nothing before a call of it shows that."""
    model = small_graph()
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 4], np.int64), "one_row"))
    model.graph.node.insert(0, helper.make_node("Reshape", ["features", "one_row"], ["row"]))
    model.graph.node[1].input[0] = "row"
    parse_model(model.SerializeToString())
    with pytest.raises(UnsafeModelError, match="does not score rows of zeros"):
        read_model(model.SerializeToString())

"""Model files that are bad though every digest agrees, as whoever may write an unsigned repository could leave them.

The gates of export refuse them before they are published (tests/export/test_check_model.py); here they are in the
repository that the real server is to load. Numbers are the rows of the project's list of bad inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from serving.embedded import EmbeddedTriton
from serving.golden import check_golden
from tests.serving.conftest import ANY_PORTS, edit_config
from tickserve.errors import TickserveError
from tickserve.store import sha256_file


def agree(version: Path) -> None:
    """Write the digests of what is there now into the manifest, and the manifest's into config.pbtxt."""
    manifest = json.loads((version / "manifest.json").read_text())
    manifest["export"]["onnx_sha256"] = sha256_file(version / "model.onnx")
    (version / "manifest.json").write_text(json.dumps(manifest))
    digest, name = sha256_file(version / "manifest.json"), f"manifest.{version.name}"
    edit_config(version.parent, lambda config: config.parameters[name].__setattr__("string_value", digest))


def rewrite(change: Callable[[onnx.ModelProto], object]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        model = onnx.load_from_string(content)
        change(model)
        return bytes(model.SerializeToString())

    return changed


def weights_of(model: onnx.ModelProto) -> TensorProto:
    return next(item for item in model.graph.initializer if item.name == "weights")


def external(location: str) -> Callable[[onnx.ModelProto], object]:
    def change(model: onnx.ModelProto) -> None:
        weights = weights_of(model)
        weights.ClearField("raw_data")
        weights.data_location = TensorProto.EXTERNAL
        weights.external_data.add(key="location", value=location)

    return change


def custom(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("evil.example", 1))
    next(node for node in model.graph.node if node.op_type == "MatMul").domain = "evil.example"


def dynamic(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "columns"


def nan_weights(model: onnx.ModelProto) -> None:
    weights = weights_of(model)
    array = numpy_helper.to_array(weights).copy()
    array[0] = np.nan
    weights.CopyFrom(numpy_helper.from_array(array, "weights"))


def other_inputs(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 9


BAD: dict[str, Callable[[bytes], bytes]] = {
    "48 empty": lambda _: b"",
    "48 truncated": lambda content: content[: len(content) // 2],
    "48 random": lambda _: np.random.default_rng(48).bytes(4_096),
    "49 external data, up": rewrite(external("../../etc/passwd")),
    "49 external data, absolute": rewrite(external("/etc/passwd")),
    "49 external data, beside it": rewrite(external("golden.npz")),
    "50 custom operator": rewrite(custom),
    "52 another dynamic dimension": rewrite(dynamic),
    "53 NaN weights": rewrite(nan_weights),
    "57 a pickle": lambda _: b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
    "58 other inputs": rewrite(other_inputs),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_graph_whose_digests_agree_is_not_served(repository: Path, case: str) -> None:
    version = repository / "tiny" / "1"
    content = BAD[case]((version / "model.onnx").read_bytes())
    (version / "model.onnx").write_bytes(content)
    agree(version)
    server = EmbeddedTriton(repository, ANY_PORTS)
    with pytest.raises(TickserveError) as refused:
        server.start()
    assert not server.running
    said = str(refused.value)
    assert "tiny" in said
    assert "root:" not in said, "nothing of the file it names is shown"
    if server.log is not None:
        server.log.unlink()


def test_what_agrees_and_is_good_is_served(repository: Path) -> None:
    """The negative control of this file: the same rewriting of digests, of a graph that says the same."""
    version = repository / "tiny" / "1"
    content = rewrite(lambda model: setattr(model, "doc_string", "the same"))((version / "model.onnx").read_bytes())
    (version / "model.onnx").write_bytes(content)
    agree(version)
    with EmbeddedTriton(repository, ANY_PORTS) as server:
        check_golden(server.http_url, "tiny", 1, version)

"""`tickserve batching` on more than one table of features: a model with a state, and arrivals from a journal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from export import versions
from export.batching.arrivals import of_requests
from export.onnx_graph import serve_graph
from export.publish import Release, publish
from loadtest.open_loop import Feed, message
from tests.serving.conftest import FEATURES, manifest_of, publish_tiny
from tests.tickserve.test_journal_files import make_decision, tensor_of
from tickserve.cli.commands import app
from tickserve.config import ExportSettings
from tickserve.errors import TickserveError
from tickserve.journal import Journal
from tickserve.manifest import ExportRecord, Manifest
from tickserve.store import sha256_bytes

pytestmark = pytest.mark.system

HIDDEN = 2
NS = 1_000_000_000


def stepped_graph(weights: np.ndarray) -> ModelProto:
    """`softmax(x W + h V)` and `h + 1`: what the model answers and hands on needs both inputs."""
    nodes = [
        helper.make_node("MatMul", ["features", "weights"], ["from_features"]),
        helper.make_node("Squeeze", ["hidden", "axis"], ["flat"]),
        helper.make_node("MatMul", ["flat", "carried"], ["from_hidden"]),
        helper.make_node("Add", ["from_features", "from_hidden"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("Add", ["hidden", "one"], ["hidden_out"]),
    ]
    sides = (
        [("features", ["batch", FEATURES]), ("hidden", ["batch", 1, HIDDEN])],
        [("probabilities", ["batch", 3]), ("hidden_out", ["batch", 1, HIDDEN])],
    )
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in side] for side in sides
    )
    constants = {
        "weights": weights[:FEATURES],
        "carried": weights[FEATURES:],
        "axis": np.array([1], np.int64),
        "one": np.ones(1, np.float32),
    }
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    body = helper.make_graph(nodes, "stepped", inputs, outputs, held)
    imports = [helper.make_opsetid("", versions.OPSET)]
    return helper.make_model(body, opset_imports=imports, ir_version=versions.IR_VERSION)


def stepped_manifest() -> Manifest:
    state = {"tensors": [{"input": "hidden", "output": "hidden_out", "shape": [1, HIDDEN]}], "session_gap_ns": NS}
    plain = manifest_of("stepped", 4).stored()
    plain["family"] = "lstm"
    plain["inputs"] = [*plain["inputs"], {"name": "hidden", "dtype": "FP32", "shape": [1, HIDDEN]}]
    plain["outputs"] = [*plain["outputs"], {"name": "hidden_out", "dtype": "FP32", "shape": [1, HIDDEN]}]
    return Manifest.model_validate(plain | {"state": state | {"stride": 1}})


def publish_stepped(repository: Path) -> Path:
    random = np.random.default_rng(4)
    manifest, weights = stepped_manifest(), random.normal(size=(FEATURES + HIDDEN, 3)).astype(np.float32)
    assert manifest.state is not None
    features = random.normal(size=(8, FEATURES)).astype(np.float32)
    hidden = random.normal(size=(8, 1, HIDDEN)).astype(np.float32)
    powers = np.exp(np.concatenate([features, hidden[:, 0]], axis=1) @ weights)
    probabilities = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    golden = io.BytesIO()
    np.savez(
        golden,
        features=features,
        hidden=hidden,
        probabilities=probabilities,
        score=probabilities[:, 2:] - probabilities[:, :1],
        hidden_out=hidden + 1,
    )
    graph = serve_graph(
        stepped_graph(weights), manifest.bundle_id(), bundle_digest=manifest.digest(), state=manifest.state.tensors
    ).SerializeToString()
    settings = ExportSettings(max_batch=4, preferred_batch_rows=(4,))
    record = ExportRecord(
        bundle_digest=manifest.digest(),
        bundle_id=manifest.bundle_id(),
        onnx_sha256=sha256_bytes(graph),
        golden_sha256=sha256_bytes(golden.getvalue()),
        opset=versions.OPSET,
        ir_version=versions.IR_VERSION,
        gates=(),
        max_batch=settings.max_batch,
    )
    release = Release(manifest.model_copy(update={"export": record}), graph, golden.getvalue())
    return publish(release, repository, settings)[1]


def invoke(*arguments: str) -> tuple[int, Any]:
    """The exit code and the JSON of a command."""
    result = CliRunner().invoke(app, ["batching", *arguments, "--json"])
    code = result.exception.exit_code if isinstance(result.exception, TickserveError) else result.exit_code
    return code, json.loads(result.stdout) if result.stdout.strip() else None


def test_every_input_of_a_model_is_sent_with_its_rows() -> None:
    features, steps = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(2, dtype=np.int64)[:, None]
    sent = message(Feed("h:1", "m", {"features": features, "step": steps}, 10.0), 3, 1)
    _, _, body = sent.partition(b"\r\n\r\n")
    head, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    assert [(tensor["name"], tensor["shape"], tensor["datatype"]) for tensor in head["inputs"]] == [
        ("features", [3, 3], "FP32"),
        ("step", [3, 1], "INT64"),
    ]
    assert body[end:] == features[[0, 1, 0]].tobytes() + steps[[0, 1, 0]].tobytes()


def test_a_model_with_a_state_is_measured_and_verified_with_all_its_inputs(tmp_path: Path) -> None:
    repository, out, recorded = tmp_path / "models", tmp_path / "out", tmp_path / "arrivals.txt"
    publish_stepped(repository)
    recorded.write_text("\n".join(str(20_000_000 * index) for index in range(60)))
    common = ("--model", "stepped", "--repository", str(repository), "--out", str(out), "--arrivals", str(recorded))
    code, derived = invoke("derive", *common, "--deadline-ms", "900")
    assert code == 0
    assert set(derived["service"]["rows"]) == {"1", "2", "4"}
    assert derived["service"]["overhead_p99_us"] >= derived["service"]["overhead_us"] > 0
    code, verified = invoke("verify", *common)
    assert code in (0, 1)  # the machine may be too busy for the deadline
    # A request that lacks an input is refused by the server at once, with another outcome.
    assert set(verified["measured"]["outcomes"]) <= {
        "answered",
        "no answer by the deadline",
        "refused: waited too long",
    }
    assert verified["measured"]["outcomes"]["answered"] > 30


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """40 requests for `tiny`, 5 ms apart, of 1 and 3 rows; one that was refused, and as many for another model."""
    with Journal(tmp_path / "journal") as opened:
        for index in range(40):
            rows = tensor_of("features", np.zeros((1 + 2 * (index % 2), FEATURES), np.float32))
            opened.decided(make_decision(model="tiny", wall_ns=NS + index * 5_000_000, tensors=(rows,)))
            opened.decided(make_decision(model="other", wall_ns=NS + index * 5_000_000 + 1, tensors=(rows,)))
        opened.decided(make_decision(model="tiny", wall_ns=NS + 1, tensors=(), signal=None, error=None))
    return tmp_path / "journal"


def test_a_journal_gives_its_models_requests_with_their_rows(tmp_path: Path, journal: Path) -> None:
    repository, out = tmp_path / "models", tmp_path / "out"
    publish_tiny(repository, "tiny", 1, ExportSettings(max_batch=4, preferred_batch_rows=(4,)))
    common = ("--model", "tiny", "--repository", str(repository), "--out", str(out), "--arrivals", str(journal))
    code, derived = invoke("derive", *common, "--deadline-ms", "900")
    assert code == 0
    assert derived["peak"] == {"requests": 40, "rows": 80, "seconds": 0.195, "per_second": 205.128}
    # Two rows on average, so a batch cannot hold fewer.
    assert derived["chosen"]["predicted"]["mean_batch_rows"] >= 2
    code, verified = invoke("verify", *common)
    assert code in (0, 1)
    assert verified["measured"]["requests"] == 40


def test_a_journal_without_requests_for_the_model_is_said(tmp_path: Path, journal: Path) -> None:
    repository = tmp_path / "models"
    publish_tiny(repository, "unasked", 1)
    code, _ = invoke(
        "derive", "--model", "unasked", "--repository", str(repository), "--arrivals", str(journal), "--out",
        str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 3


def test_rows_stay_with_their_times_in_any_order() -> None:
    arrivals = of_requests(np.array([30, 10, 20]), np.array([3, 1, 2]))
    assert arrivals.times_ns.tolist() == [0, 10, 20]
    assert arrivals.rows.tolist() == [1, 2, 3]

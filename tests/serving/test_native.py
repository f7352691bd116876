"""The native backend: the Python one's bits in the server's own process, and refused where that one is."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_grpc
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2 as schema

from monitoring.triton_metrics import ModelCounts, scrape
from serving import native, triton_files, view
from serving.backends import served_version
from serving.embedded import EmbeddedTriton
from serving.golden import infer
from serving.memory_sentinel import Memory
from serving.supervisor import Supervisor
from serving.swap import rollback, swap
from tests.serving.conftest import ANY_PORTS, FEATURES, STUBS, publish_tiny
from tests.serving.test_swap import QUICK, ids_of, traffic
from tests.waiting import settled
from tickserve.config import ServeSettings
from tickserve.errors import ArtifactError, ComponentError, MissingExtraError, ServerStartError, UnsafeModelError
from tickserve.manifest import TensorSpec

SIZES = (1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EmbeddedTriton, EmbeddedTriton]]:
    folder = tmp_path_factory.mktemp("both")
    publish_tiny(folder, "tiny", 1)
    with EmbeddedTriton(folder, ANY_PORTS) as fast, EmbeddedTriton(folder, STUBS) as careful:
        yield fast, careful


def test_every_batch_size_gives_the_python_backends_bits(both: tuple[EmbeddedTriton, EmbeddedTriton]) -> None:
    random = np.random.default_rng(3)
    for size in SIZES:
        rows = random.normal(size=(size, FEATURES)).astype(np.float32)
        rows[0, 2] = np.nan
        answers = []
        for server in both:
            connection = http.client.HTTPConnection(server.http_url, timeout=10)
            answers.append(infer(connection, "tiny", 1, {"features": rows}))
            connection.close()
        fast, careful = answers
        assert fast.keys() == careful.keys()
        for name, array in fast.items():
            assert array.tobytes() == careful[name].tobytes(), (size, name)


def test_it_has_no_process_but_the_servers_and_counts_what_it_scores(
    both: tuple[EmbeddedTriton, EmbeddedTriton],
) -> None:
    fast, careful = both
    assert [len(psutil.Process(server.pid).children()) for server in both] == [0, 1]

    def counted() -> ModelCounts:
        return scrape(fast.metrics_url)["tiny", "1"]

    before = settled(counted)
    connection = http.client.HTTPConnection(fast.http_url, timeout=10)
    infer(connection, "tiny", 1, {"features": np.ones((5, FEATURES), np.float32)})
    connection.close()
    after = settled(
        counted,
        lambda now: (
            now.rows >= before.rows + 5 and now.executions > before.executions and now.requests_ok > before.requests_ok
        ),
    )
    assert (after.rows - before.rows, after.executions - before.executions) == (5, 1)
    assert after.requests_ok - before.requests_ok == 1
    assert careful.healthy
    assert fast.healthy


def test_only_the_outputs_that_were_asked_for_come(both: tuple[EmbeddedTriton, EmbeddedTriton]) -> None:
    fast, _ = both
    rows = np.ones((2, FEATURES), np.float32)
    tensor = triton_grpc.InferInput("features", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows)
    with triton_grpc.InferenceServerClient(fast.grpc_url) as client:
        wanted = [triton_grpc.InferRequestedOutput("score")]
        answer = client.infer("tiny", [tensor], outputs=wanted)
        assert [output.name for output in answer.get_response().outputs] == ["score"]
        every = client.infer("tiny", [tensor])
    assert answer.as_numpy("score").tobytes() == every.as_numpy("score").tobytes()


@pytest.mark.system
def test_nobody_notices_swaps_under_load(tmp_path: Path) -> None:
    """Faults 17 and 18, over both protocols at once, and the sentinel watches the server itself."""
    first = publish_tiny(tmp_path / "models", "paced", 1)
    other = publish_tiny(tmp_path / "models", "paced", 2, activate=False)
    truth = ids_of(first, other)
    with EmbeddedTriton(tmp_path / "models", ANY_PORTS) as server:
        urls = [server.http_url, f"grpc://{server.grpc_url}"]
        with (
            traffic(urls[0], tmp_path / "models", ["paced"], truth, rate=150, follow_ms=20) as some,
            traffic(urls[1], tmp_path / "models", ["paced"], truth, rate=150, follow_ms=20) as others,
        ):
            for _ in range(2):
                done = swap(server.target, "paced", 2, settings=QUICK)
                assert done.drained
                assert isinstance(done.memory, Memory)
                assert done.memory.version_mb == pytest.approx(done.memory.server_after_mb, abs=4)
                assert rollback(server.target, "paced", settings=QUICK).version == 1
        assert server.problem is None
    for seen in (some, others):
        assert (seen.errors, seen.wrong) == ([], [])
        assert {version for version, _ in seen.answers} == {1, 2}


HANDED = "served-version 1 threads 1 1 level 99 batch 64 inputs 1 outputs 1 graph 4"
TENSORS = "input features FP32 8\noutput score FP32 1"


def handing_over(graph: str) -> str:
    """A check that hands over `graph` and says that it has four bytes."""
    text = HANDED + "\n" + TENSORS + "\n\n" + graph
    return f"print({text!r}, end='')"


BROKEN_CHECKS = {
    "says something else": ("print('served-version 1 and more')", "something else than expected"),
    "says nothing": ("", "something else than expected"),
    "crashes": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"ended early, by signal 11"),
    "hangs": ("import time; time.sleep(60)", "says nothing more"),
    "is stopped": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "says nothing more"),
    "refuses": ("import sys; print('not this one'); sys.exit(1)", "not this one"),
    "half a graph": (handing_over("ha"), "something else than expected"),
    "no graph": (handing_over("none"), "cannot load model.onnx"),
}
ENDED_BY_ITS_LIMIT = ("hangs", "is stopped")


@pytest.mark.system
@pytest.mark.parametrize("case", BROKEN_CHECKS)
def test_nothing_is_served_that_the_check_did_not_hand_over(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    code, says = BROKEN_CHECKS[case]
    check = tmp_path / "served_version.py"
    check.write_text(code)
    monkeypatch.setattr(triton_files, "CHECK", check)
    # A tenth of it is left for the start's own steps when the check is ended by its limit.
    start_s = 15.0 if case in ENDED_BY_ITS_LIMIT else 5.0
    with pytest.raises(ServerStartError, match=says):
        EmbeddedTriton(repository, ANY_PORTS.model_copy(update={"start_timeout_s": start_s})).start()


@pytest.mark.parametrize("settings", [ANY_PORTS, STUBS], ids=["native", "python"])
@pytest.mark.parametrize("place", ["tiny", "tiny/1"])
@pytest.mark.parametrize("name", [native.LIBRARY_NAME, "libtriton_other.so.1", "model.py"])
def test_a_library_beside_a_model_is_not_loaded(
    repository: Path, settings: ServeSettings, place: str, name: str
) -> None:
    """Triton looks there first, before any check of ours runs, and no digest or signature covers it."""
    (repository / place / name).write_bytes(native.find_library().read_bytes())
    with pytest.raises(UnsafeModelError, match=name):
        EmbeddedTriton(repository, settings).start()


def test_the_server_is_shown_what_a_version_is_made_of_and_no_more(repository: Path, tmp_path: Path) -> None:
    (repository / "tiny" / "1" / "notes.txt").write_text("mine")
    view.show(repository / "tiny", tmp_path / "view" / "tiny", [1])
    shown = {path.name for path in (tmp_path / "view" / "tiny" / "1").iterdir()}
    assert shown == {"manifest.json", "model.onnx", "golden.npz", view.DIGEST_NAME}


def test_a_version_that_hangs_in_the_server_is_its_problem(
    both: tuple[EmbeddedTriton, EmbeddedTriton], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = both
    waiting = {("tiny", 1): (7.0, 2.0)}
    monkeypatch.setattr(Supervisor, "_requests", lambda _: waiting)
    watching = Supervisor(server.target, ["tiny"], server.metrics_url, 0.2, 5.0, has_processes=False)
    watching.start()
    try:
        until = time.monotonic() + 10
        while watching.problem is None and time.monotonic() < until:
            time.sleep(0.02)
        assert watching.problem == "model 'tiny' version 1 answered nothing for 0.2 s while requests waited"
        waiting["tiny", 1] = (8.0, 0.0)
        while watching.problem is not None and time.monotonic() < until:
            time.sleep(0.02)
        assert watching.problem is None
    finally:
        watching.stop()


def configured(repository: Path) -> bytes:
    config = text_format.Parse((repository / "tiny" / "config.pbtxt").read_text(), schema.ModelConfig())
    return json_format.MessageToJson(config, preserving_proto_field_name=True).encode()


def test_the_check_refuses_a_configuration_it_does_not_honour(repository: Path) -> None:
    config = json.loads(configured(repository))
    config["parameters"]["enable_mem_arena"] = {"string_value": "1"}
    answer = io.BytesIO()
    asked = io.BytesIO(json.dumps(config).encode())
    assert served_version.main([str(repository / "tiny"), "1"], asked, answer) == 1
    assert b"parameters.enable_mem_arena" in answer.getvalue()


def test_the_check_refuses_an_output_that_is_an_input(repository: Path) -> None:
    """ONNX Runtime leaves the buffer of such an output as it was: another caller's numbers."""
    config = json.loads(configured(repository))
    config["output"].append({**config["input"][0]})
    answer = io.BytesIO()
    asked = io.BytesIO(json.dumps(config).encode())
    assert served_version.main([str(repository / "tiny"), "1"], asked, answer) == 1
    assert b"names of their own" in answer.getvalue()


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [("a b", (1,), "without spaces"), ("x" * 256, (1,), "under 256 bytes"), ("x", (1,) * 8, "fewer than 8")],
)
def test_the_check_hands_over_no_tensor_there_is_no_room_for(name: str, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        served_version._line("input", TensorSpec(name=name, dtype="FP32", shape=shape))


def test_the_check_hands_over_the_bytes_it_verified(repository: Path) -> None:
    answer = io.BytesIO()
    assert served_version.main([str(repository / "tiny"), "1"], io.BytesIO(configured(repository)), answer) == 0
    lines, _, graph = answer.getvalue().partition(b"\n\n")
    assert graph == (repository / "tiny" / "1" / "model.onnx").read_bytes()
    assert lines.decode().splitlines() == [
        f"served-version 1 threads 1 1 level 99 batch 64 inputs 1 outputs 3 graph {len(graph)}",
        f"input features FP32 {FEATURES}",
        "output probabilities FP32 3",
        "output score FP32 1",
        "output bundle_id INT64 1",
    ]


@pytest.mark.parametrize("file", ["model.onnx", "golden.npz", "manifest.json"])
def test_the_check_refuses_a_changed_byte_of_each_file(repository: Path, file: str) -> None:
    path = repository / "tiny" / "1" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    answer = io.BytesIO()
    assert served_version.main([str(repository / "tiny"), "1"], io.BytesIO(configured(repository)), answer) == 1
    assert file.encode() in answer.getvalue()
    assert str(repository).encode() not in answer.getvalue()


def test_a_library_of_other_sources_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.find_library().is_file()
    for source in native.SOURCES.glob("*.[ch]"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / native.find_library().name).write_bytes(native.find_library().read_bytes())
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    assert native.find_library().parent == tmp_path
    with (tmp_path / "backend.c").open("a") as source:
        source.write("\n")
    with pytest.raises(ComponentError, match=r"not built.*make install"):
        native.find_library()


def test_without_a_compiler_the_build_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "COMPILER", "no_such_compiler")
    with pytest.raises(MissingExtraError, match="no_such_compiler"):
        native.build()


def test_a_server_that_dies_takes_its_models_along_and_is_told(repository: Path) -> None:
    """What a process per model would have kept apart: here the server is what is watched, and whoever runs it."""
    server = EmbeddedTriton(repository, ANY_PORTS)
    server.start()
    try:
        os.kill(server.pid, signal.SIGSEGV)
        until = time.monotonic() + 10
        while server.problem is None and time.monotonic() < until:
            time.sleep(0.02)
        assert str(server.problem).startswith("the server ended by itself")
    finally:
        server.stop()
    assert server.log is not None
    server.log.unlink()


def test_the_environment_names_the_check_and_one_onnxruntime(tmp_path: Path) -> None:
    found = native.environment(tmp_path / "check.py", 54.0)
    assert found["TICKSERVE_BACKEND_CHECK_LIMIT_S"] == "54"
    assert found["TICKSERVE_BACKEND_PYTHON"] == sys.executable
    assert json.dumps(found)
    assert Path(found["TICKSERVE_BACKEND_ONNXRUNTIME"]).is_file()

"""`local://`: the same version, the same numbers and the same contract as behind the server, in this process."""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tickserve import Client
from tickserve.client._local import TRUSTED_KEYS_ENV, LocalModel
from tickserve.client._transport import Tensor
from tickserve.errors import (
    ArtifactError,
    DeadlineExceededError,
    DigestMismatchError,
    GateRefusedError,
    InputRejectedError,
    MissingExtraError,
    ModelNotFoundError,
    ServerRejectedError,
    SignatureError,
    UsageError,
)
from tickserve.manifest import load_manifest, write_manifest
from tickserve.runtimes import RuntimeRecord
from tickserve.signing import generate_key, sign_version, write_key
from tickserve.store import sha256_file

MODEL = "hand-l1-gbdt"


@pytest.fixture
def repository(triton: Any, tmp_path: Path) -> Path:
    """A copy of what Triton serves, for a test to break."""
    return Path(shutil.copytree(triton.repository, tmp_path / "model_repository", symlinks=True))


def redo_digests(folder: Path) -> None:
    """Make the manifest name the files as they are now: what is wrong then is no digest."""
    manifest = load_manifest(folder)
    assert manifest.export
    found = {"onnx_sha256": sha256_file(folder / "model.onnx"), "golden_sha256": sha256_file(folder / "golden.npz")}
    write_manifest(folder, manifest.model_copy(update={"export": manifest.export.model_copy(update=found)}))


def test_the_same_bits_as_the_server(triton: Any) -> None:
    golden = np.load(triton.folder / "golden.npz")["features"]
    with (
        Client(f"local://{triton.repository}", deadline_ms=5_000) as local,
        Client(triton.http, manifest=triton.repository, deadline_ms=5_000) as served,
    ):
        for rows in (golden[:1], golden[:3], golden[:8], golden[8:16]):
            here, there = local.score(MODEL, rows), served.score(MODEL, rows)
            assert here.status == "OK"
            assert (here.model, here.version, here.bundle_digest) == (there.model, there.version, there.bundle_digest)
            assert here.decision == there.decision
            np.testing.assert_array_equal(here.probabilities, there.probabilities)
            np.testing.assert_array_equal(here.score, there.score)


def test_a_signal_keeps_its_numbers_when_the_next_is_made(repository: Path, rows: np.ndarray) -> None:
    with Client(f"local://{repository}") as client:
        first = client.score(MODEL, rows[:1])
        assert first.probabilities is not None
        before = first.probabilities.copy()
        client.score(MODEL, rows[1:])
        np.testing.assert_array_equal(first.probabilities, before)


def test_more_rows_than_are_bound_give_the_same_numbers(repository: Path) -> None:
    model = LocalModel(repository / MODEL / "1")
    rows = np.random.default_rng(1).normal(size=(40, 4)).astype(np.float32)

    def run(part: np.ndarray) -> np.ndarray:
        return model.run([Tensor("features", "FP32", part.shape, part.tobytes())])["probabilities"]

    alone = np.concatenate([run(rows[i : i + 1]) for i in range(len(rows))])
    np.testing.assert_allclose(run(rows), alone, rtol=1e-5, atol=1e-7)


def test_threads_get_their_own_answers(repository: Path) -> None:
    rows = np.random.default_rng(2).normal(size=(64, 1, 4)).astype(np.float32)
    with Client(f"local://{repository}", deadline_ms=20_000) as client, ThreadPoolExecutor(8) as pool:
        alone = [client.score(MODEL, row).score for row in rows]
        together = list(pool.map(lambda row: client.score(MODEL, row).score, np.concatenate([rows] * 8)))
    np.testing.assert_array_equal(together, alone * 8)


def test_a_forked_child_gets_the_same_numbers(repository: Path, rows: np.ndarray) -> None:
    with Client(f"local://{repository}") as client:
        expected = client.score(MODEL, rows).score
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if np.array_equal(client.score(MODEL, rows).score, expected) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_contract_holds_here_too(repository: Path, rows: np.ndarray) -> None:
    with Client(f"local://{repository}") as client:
        with pytest.raises(InputRejectedError, match="wrong dtype"):
            client.score(MODEL, rows.astype(np.float64))
        with pytest.raises(ModelNotFoundError):
            client.score(MODEL, rows, version=7)
        with pytest.raises(DeadlineExceededError):
            client.score(MODEL, rows, deadline_ms=0.000_001)
    with pytest.raises(UsageError, match="closed"):
        client.score(MODEL, rows)


def test_a_version_that_is_asked_for_is_verified_and_loaded(repository: Path, rows: np.ndarray) -> None:
    shutil.copytree(repository / MODEL / "1", repository / MODEL / "2")
    (repository / MODEL / "3").mkdir()
    with Client(f"local://{repository}") as client:
        assert client.score(MODEL, rows).version == 2
        assert client.score(MODEL, rows, version=1).version == 1
        (repository / MODEL / "4").mkdir()
        for name in ("manifest.json", "golden.npz"):
            shutil.copy(repository / MODEL / "1" / name, repository / MODEL / "4" / name)
        (repository / MODEL / "4" / "model.onnx").write_bytes(b"not the graph")
        with pytest.raises(DigestMismatchError, match=r"model\.onnx"):
            client.score(MODEL, rows, version=4)
        assert client.score(MODEL, rows).version == 2


def test_one_version_folder(repository: Path, rows: np.ndarray) -> None:
    with Client(f"local://{repository / MODEL / '1'}") as client:
        assert client.score(MODEL, rows).version == 1
        with pytest.raises(ModelNotFoundError):
            client.score(MODEL, rows, version=2)


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
def test_changed_bytes_are_refused(repository: Path, name: str) -> None:
    path = repository / MODEL / "1" / name
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DigestMismatchError, match=name):
        Client(f"local://{repository}")


def test_a_graph_that_gives_other_numbers_is_refused(repository: Path) -> None:
    folder = repository / MODEL / "1"
    golden = dict(np.load(folder / "golden.npz"))
    golden["probabilities"][2] = golden["probabilities"][2][::-1]
    np.savez(folder / "golden.npz", **golden)
    redo_digests(folder)
    with pytest.raises(GateRefusedError, match=r"row 2.*not research's"):
        Client(f"local://{repository}")


@pytest.mark.parametrize(("threads", "level", "expected"), [(1, 0, "ORT_ENABLE_ALL"), (2, 2, "ORT_DISABLE_ALL")])
def test_it_runs_as_the_server_was_configured(repository: Path, threads: int, level: int, expected: str) -> None:
    folder = repository / MODEL / "1"
    manifest = load_manifest(folder)
    assert manifest.export
    runtime = RuntimeRecord(
        effort="quick",
        chosen="measured",
        threads=threads,
        graph_level=level,
        kind="KIND_CPU",
        reason="a test",
        machine="",
        candidates=(),
    )
    export = manifest.export.model_copy(update={"runtime": runtime})
    write_manifest(folder, manifest.model_copy(update={"export": export}))
    options = LocalModel(folder)._session.get_session_options()
    assert options.intra_op_num_threads == threads
    assert options.graph_optimization_level.name == expected


def test_what_is_no_graph_is_refused(repository: Path) -> None:
    folder = repository / MODEL / "1"
    (folder / "model.onnx").write_bytes(b"no graph at all")
    redo_digests(folder)
    with pytest.raises(ArtifactError, match="does not load"):
        Client(f"local://{repository}")


def test_a_bundle_is_no_version(repository: Path) -> None:
    folder = repository / MODEL / "1"
    write_manifest(folder, load_manifest(folder).model_copy(update={"export": None}))
    with pytest.raises(ArtifactError, match="export"):
        LocalModel(folder)


def test_with_trusted_keys_only_what_they_signed_is_loaded(
    repository: Path, rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, stranger = generate_key(), generate_key()
    monkeypatch.setenv(TRUSTED_KEYS_ENV, str(write_key(key, tmp_path / "key.pem")))
    with pytest.raises(SignatureError, match="unsigned"):
        Client(f"local://{repository}")
    folder = repository / MODEL / "1"
    sign_version(folder, 1, stranger)
    with pytest.raises(SignatureError, match="not trusted"):
        Client(f"local://{repository}")
    sign_version(folder, 1, key)
    with Client(f"local://{repository}") as client:
        assert client.score(MODEL, rows).ok


@pytest.mark.parametrize("url", ["local://", "local:///no/such/folder", "local://a\0b"])
def test_folders_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        Client(url)


def test_local_takes_no_transport(repository: Path) -> None:
    with pytest.raises(UsageError, match="transport"):
        Client(f"local://{repository}", transport="http")


def test_without_onnxruntime_the_extra_is_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"tickserve\[inprocess\]"):
        Client(f"local://{repository}")


def test_what_is_answered_is_read_only_and_its_own(repository: Path, rows: np.ndarray) -> None:
    model = LocalModel(repository / MODEL / "1")
    given = [Tensor("features", "FP32", (2, 4), rows.tobytes())]
    first = model.run(given)
    before = {name: array.copy() for name, array in first.items()}
    second = model.run([Tensor("features", "FP32", (2, 4), rows[::-1].tobytes())])
    for name, array in first.items():
        np.testing.assert_array_equal(array, before[name])
        np.testing.assert_array_equal(array[::-1], second[name])
        assert not array.flags.writeable
        assert array.flags.aligned
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.setflags(write=True)


def test_a_runtime_without_the_bare_call_is_run_its_public_way(
    repository: Path, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as ort

    with Client(f"local://{repository}") as client:
        expected = client.score(MODEL, rows)
    runs, public = [], ort.InferenceSession.run_with_iobinding

    class Older:
        """A binding that keeps its own to itself."""

        def __init__(self, binding: Any) -> None:
            self.binding = binding
            self.bind_input, self.bind_output = binding.bind_input, binding.bind_output

    def run(session: Any, older: Older) -> None:
        runs.append(older)
        public(session, older.binding)

    bind = ort.InferenceSession.io_binding
    monkeypatch.setattr(ort.InferenceSession, "io_binding", lambda session: Older(bind(session)))
    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", run)
    with Client(f"local://{repository}") as client:
        signal = client.score(MODEL, rows)
    np.testing.assert_array_equal(signal.probabilities, expected.probabilities)
    assert runs


def test_what_onnxruntime_cannot_score_is_typed(repository: Path) -> None:
    model = LocalModel(repository / MODEL / "1")
    for rows in (2, 20):
        with pytest.raises(ServerRejectedError, match="ONNX Runtime cannot"):
            model.run([Tensor("features", "FP32", (rows, 3), bytes(rows * 12))])
    assert model.run([Tensor("features", "FP32", (2, 4), bytes(32))])["score"].shape == (2, 1)

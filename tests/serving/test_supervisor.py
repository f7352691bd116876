"""A process that scores a model is killed, stopped, or hangs: only its version is unready, and it comes back."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from serving import stubs, supervisor, triton_files
from serving.embedded import EmbeddedTriton
from serving.golden import check_golden
from tests.serving.conftest import FEATURES, STUBS, publish_tiny
from tests.waiting import wait_until
from tickserve.client import Client
from tickserve.errors import RequestError, ServerStartError

ROWS = np.ones((1, FEATURES), np.float32)

# The real backend, except that a row of sevens never ends.
HANGING = """
exec(compile(open({real!r}).read(), {real!r}, "exec"), globals())
Honest = TritonPythonModel

class TritonPythonModel(Honest):
    def run(self, inputs):
        while (inputs[0] == 7).all():
            pass
        return super().run(inputs)
"""


def stub_of(server: EmbeddedTriton, model: str, version: int) -> int:
    (pid,) = [s.pid for s in stubs.stubs_of(server.pid).values() if (s.model, s.version) == (model, version)]
    return pid


@contextmanager
def others_answer(server: EmbeddedTriton, repository: Path, *folders: str) -> Iterator[None]:
    """What is not ill answers all the while."""
    errors: list[str] = []
    done = threading.Event()

    def call(folder: str) -> None:
        with Client(server.http_url, manifest=repository / folder, deadline_ms=2_000) as client:
            while not done.wait(0.01):
                try:
                    assert client.score(folder.split("/")[0], ROWS).ok
                except RequestError as error:
                    errors.append(f"{folder}: {error}")

    callers = [threading.Thread(target=call, args=(folder,)) for folder in folders]
    for caller in callers:
        caller.start()
    try:
        yield
    finally:
        done.set()
        for caller in callers:
            caller.join()
    assert errors == []


@pytest.fixture(scope="module")
def ill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EmbeddedTriton, Path]]:
    folder = tmp_path_factory.mktemp("ill")
    spoilt, repository = folder / "model.py", folder / "models"
    spoilt.write_text(HANGING.format(real=str(triton_files.OUR_BACKEND)))
    for seed in (1, 2):
        publish_tiny(repository, "tiny", seed)
    publish_tiny(repository, "other", 3)
    settings = STUBS.model_copy(update={"hang_s": 2.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_files, "OUR_BACKEND", spoilt)
        with EmbeddedTriton(repository, settings, log=folder / "triton.log") as server:
            yield server, repository


@pytest.mark.parametrize(
    ("harm", "model", "version", "well"),
    [
        (signal.SIGKILL, "tiny", 2, ("tiny/1", "other/1")),
        (signal.SIGSEGV, "other", 1, ("tiny/2",)),
        (signal.SIGSTOP, "other", 1, ("tiny/2",)),
    ],
)
def test_a_process_that_is_gone_or_stopped_comes_back(
    ill: tuple[EmbeddedTriton, Path],
    caplog: pytest.LogCaptureFixture,
    harm: signal.Signals,
    model: str,
    version: int,
    well: tuple[str, ...],
) -> None:
    """Fault 12. `tiny` has another version that serves on; `other` has one alone."""
    server, repository = ill
    before, victim = len(server.revived), stub_of(server, model, version)
    with caplog.at_level(logging.WARNING, "tickserve.serve"), others_answer(server, repository, *well):
        os.kill(victim, harm)
        assert wait_until(lambda: len(server.revived) > before)
    assert server.revived[before:] == [(model, version)]
    check_golden(server.http_url, model, version, repository / model / str(version))
    assert stub_of(server, model, version) != victim
    (line,) = [record.getMessage() for record in caplog.records if record.name == "tickserve.serve"]
    reason = "was stopped" if harm == signal.SIGSTOP else "lost its process"
    assert line.startswith(f"model {model!r} version {version} {reason}; it serves again after ")
    assert server.healthy
    assert wait_until(lambda: len(stubs.stubs_of(server.pid)) == 3)


def test_a_process_that_hangs_comes_back(ill: tuple[EmbeddedTriton, Path]) -> None:
    """It lives and answers nothing: noticed by the requests that wait while none ends."""
    server, repository = ill
    before, victim = len(server.revived), stub_of(server, "tiny", 1)
    with Client(server.http_url, manifest=repository / "tiny" / "1", deadline_ms=200) as client:
        for rows in (7 * ROWS, ROWS, ROWS):
            with pytest.raises(RequestError):
                client.score("tiny", rows)
        with others_answer(server, repository, "tiny/2", "other/1"):
            assert wait_until(lambda: len(server.revived) > before)
        assert server.revived[before:] == [("tiny", 1)]
        assert wait_until(lambda: stub_of(server, "tiny", 1) != victim)
        assert client.score("tiny", ROWS, deadline_ms=2_000).ok
    assert server.healthy


@pytest.mark.system
def test_a_version_that_does_not_come_back_is_a_problem(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_WAIT_S", 0.01)
    publish_tiny(repository, "other", 2)
    server = EmbeddedTriton(repository, STUBS)
    server.start()
    try:
        (repository / "tiny" / "1" / "model.onnx").write_bytes(b"")
        os.kill(stub_of(server, "tiny", 1), signal.SIGKILL)
        assert wait_until(lambda: server.problem is not None)
        assert server.problem is not None
        assert server.problem.startswith("model 'tiny' version 1 does not come back: ")
        assert "model.onnx" in server.problem
        check_golden(server.http_url, "other", 1, repository / "other" / "1")
    finally:
        server.stop()
    assert server.log is not None, "the log is kept when it ended badly"
    server.log.unlink()
    with pytest.raises(ServerStartError):
        _ = server.target

"""When a part is bad: the good versions serve, the bad ones are named, and a server that lost a part says so."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from serving import folders
from serving.embedded import EmbeddedTriton
from serving.golden import check_golden, read_golden
from tests.serving.conftest import ANY_PORTS, publish_tiny
from tests.waiting import wait_until
from tickserve.errors import ArtifactError, DigestMismatchError
from tickserve.manifest import load_manifest


def corrupt(version: Path) -> None:
    (version / "model.onnx").write_bytes((version / "model.onnx").read_bytes()[:-1])


def unreadable(version: Path) -> None:
    (version / "manifest.json").write_text("{")


def no_version(version: Path) -> None:
    shutil.rmtree(version)
    version.mkdir()


def a_file(version: Path) -> None:
    shutil.rmtree(version)
    version.touch()


@pytest.mark.parametrize("damage", [corrupt, unreadable, no_version, a_file])
def test_the_old_version_serves_when_the_new_one_is_bad(repository: Path, damage: Callable[[Path], None]) -> None:
    publish_tiny(repository, "tiny", 2)
    damage(repository / "tiny" / "2")
    with EmbeddedTriton(repository, ANY_PORTS) as server:
        assert server.versions == {"tiny": (1,)}
        assert list(server.refused) == ["tiny"]
        (reason,) = server.refused["tiny"].values()
        assert "model.onnx" in reason or "manifest" in reason
        assert server.healthy
        check_golden(server.http_url, "tiny", 1, repository / "tiny" / "1")


def test_a_model_without_a_good_version_is_named_with_what_to_do(repository: Path) -> None:
    publish_tiny(repository, "other", 2)
    corrupt(repository / "tiny" / "1")
    with pytest.raises(DigestMismatchError, match=r"model 'tiny' version 1: model\.onnx.*--model") as refused:
        EmbeddedTriton(repository, ANY_PORTS).start()
    assert refused.value.field == "model.onnx"
    with EmbeddedTriton(repository, ANY_PORTS, models=["other"]) as server:
        assert (list(server.models), server.refused) == (["other"], {})


def test_a_server_that_ends_by_itself_keeps_its_log(repository: Path) -> None:
    server = EmbeddedTriton(repository, ANY_PORTS)
    server.start()
    os.kill(server.pid, signal.SIGKILL)
    assert wait_until(lambda: not server.healthy, 5)
    assert server.problem == "the server ended by itself (signal 9)"
    server.stop()
    assert server.log is not None
    server.log.unlink()
    server.start()
    server.stop()
    assert server.log is None


def test_the_command_ends_when_its_server_does(repository: Path, root: Path) -> None:
    ports = ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    command = [str(Path(sys.executable).with_name("tickserve")), "serve", "--repository", str(repository), *ports]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert any(line.startswith("http ") for line in process.stdout)
        (server,) = psutil.Process(process.pid).children()
        os.kill(server.pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 4
    assert "ended by itself" in errors
    assert "HTTPService" in errors, "the last lines of the log"
    kept = next(Path(word) for word in errors.replace(")", " ").split() if word.endswith(".log"))
    assert kept.stat().st_size
    kept.unlink()


@pytest.fixture
def gone() -> int:
    """The id of a process that is not there any more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def owned(folder: Path, signed: str | None, age_s: float = 0) -> Path:
    """A folder as a server that was killed leaves it."""
    (folder / "backends").mkdir(parents=True)
    if signed is not None:
        (folder / folders.LOCK_NAME).write_text(signed)
    os.utime(folder, (time.time() - age_s,) * 2)
    return folder


def test_folders_of_dead_owners_are_swept(gone: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    here, parent = folders.started_ticks(os.getpid()), folders.started_ticks(os.getppid())
    later = 2 * folders.SIGNED_WITHIN_S
    # By a process id that is nobody's; by our own, that an earlier process had, as in a container that is started anew.
    owned(tmp_path / f"{folders.PREFIX}{gone}-signed", "1")
    owned(tmp_path / f"{folders.PREFIX}{gone}-unsigned", None, later)
    owned(tmp_path / f"{folders.PREFIX}{os.getpid()}-reused", str(here - 1))
    kept = [
        owned(tmp_path / f"{folders.PREFIX}{os.getpid()}-lives", str(here)),
        owned(tmp_path / f"{folders.PREFIX}{os.getppid()}-lives", str(parent), later),
        owned(tmp_path / f"{folders.PREFIX}{os.getppid()}-before", None, later),  # as versions up to now left them
        owned(tmp_path / f"{folders.PREFIX}{gone}-unsigned-yet", None),
        owned(tmp_path / f"{folders.PREFIX}{gone}-empty-yet", ""),
        owned(tmp_path / f"{folders.PREFIX}x-abc", "1", later),
    ]
    link = tmp_path / f"{folders.PREFIX}{gone}-link"
    link.symlink_to(tmp_path)
    mine = folders.OwnedFolder()
    # Its owner is in another container, so its process id is nobody's here: the lock alone says that it lives.
    hidden = mine.path.rename(tmp_path / f"{folders.PREFIX}{gone}-held")
    folders.sweep()
    assert sorted(tmp_path.glob(f"{folders.PREFIX}*")) == sorted([*kept, hidden, link])
    mine.path = hidden
    mine.remove()
    assert not hidden.exists()


def test_a_folder_of_another_user_is_left_alone(gone: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    theirs = owned(tmp_path / f"{folders.PREFIX}{gone}-theirs", "1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: theirs.stat().st_uid + 1)
        folders.sweep()
    assert theirs.is_dir()
    folders.sweep()
    assert not theirs.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"text"])
def test_golden_pairs_that_are_none_are_a_typed_error(repository: Path, content: bytes) -> None:
    version = repository / "tiny" / "1"
    manifest = load_manifest(version)
    (version / "golden.npz").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"golden\.npz"):
        read_golden(version, manifest)

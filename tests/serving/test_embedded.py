"""Starting and stopping: what cannot be trusted never starts, and nothing is ever left behind."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from serving import embedded, folders, ports, triton_files
from serving.embedded import EmbeddedTriton
from serving.golden import check_golden
from serving.ports import reserved
from serving.repository import survey
from tests.serving.conftest import ANY_PORTS, STUBS, Running, edit_config, publish_tiny
from tickserve.config import ExportSettings
from tickserve.errors import (
    ArtifactError,
    ComponentError,
    DigestMismatchError,
    MissingExtraError,
    PortInUseError,
    ServerStartError,
    UnsupportedPlatformError,
    UsageError,
)
from tickserve.store import sha256_file

SHARED_MEMORY = Path("/dev/shm")


def family(pid: int) -> list[psutil.Process]:
    """The server and its stubs."""
    server = psutil.Process(pid)
    return [server, *server.children(recursive=True)]


def all_gone(processes: list[psutil.Process], within_s: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def ours() -> set[psutil.Process]:
    """The servers and stubs this process started: each names its shared memory on its command line."""
    mark = f"tickserve-{os.getpid()}-"
    return {
        process
        for process in psutil.process_iter(["cmdline"])
        if any(mark in part for part in process.info["cmdline"] or ()) and "triton" in process.name()
    }


BEFORE: set[psutil.Process] = set()


@pytest.fixture(autouse=True)
def _before() -> None:
    """The shared server may be running already."""
    BEFORE.clear()
    BEFORE.update(ours())


def left_running() -> set[psutil.Process]:
    """Servers and stubs that this test started and that are still there."""
    return ours() - BEFORE


def our_shared_memory(pid: int | None = None) -> list[Path]:
    return list(SHARED_MEMORY.glob(f"tickserve-{pid or os.getpid()}-*"))


def listening_addresses(pid: int) -> set[str]:
    found = psutil.Process(pid).net_connections("tcp")
    # gRPC listens on a dual socket and shows the same address in IPv6's way of writing it.
    return {item.laddr.ip.removeprefix("::ffff:") for item in found if item.status == psutil.CONN_LISTEN}


def test_ready_means_every_model_answers(running: Running) -> None:
    server = running.server
    assert server.running
    assert set(server.models) == {"tiny", "other"}
    assert server.models["tiny"] == running.tiny.manifest
    assert server.versions == {"tiny": (1,), "other": (1,)}
    assert any("Started HTTPService" in line for line in server.tail(200))


def test_it_listens_on_loopback_only(running: Running) -> None:
    assert listening_addresses(running.server.pid) == {"127.0.0.1"}


def test_chosen_models_only_and_stop_leaves_nothing(repository: Path, tmp_path: Path) -> None:
    publish_tiny(repository, "other", 2)
    shared = set(our_shared_memory())
    temporary = set(Path(tempfile.gettempdir()).glob("tickserve-triton-*"))
    server = EmbeddedTriton(repository, STUBS, models=["other"], log=tmp_path / "logs" / "triton.log")
    with server:
        processes = family(server.pid)
        assert len(processes) == 2, "one server, one stub"
        assert list(server.models) == ["other"]
        assert set(our_shared_memory()) > shared
        with pytest.raises(ServerStartError, match="already"):
            server.start()
    assert all_gone(processes, within_s=0)
    assert set(our_shared_memory()) == shared
    assert set(Path(tempfile.gettempdir()).glob("tickserve-triton-*")) <= temporary
    assert (tmp_path / "logs" / "triton.log").stat().st_size
    assert server.tail(5)
    assert not server.running
    server.stop()


@pytest.mark.system
def test_a_server_can_be_started_again_and_serves_what_was_published_since(repository: Path) -> None:
    server = EmbeddedTriton(repository, ANY_PORTS)
    server.start()
    server.stop()
    second = publish_tiny(repository, "tiny", 9)
    third = publish_tiny(repository, "tiny", 10)
    with server:
        # The configuration keeps the newest two.
        assert server.versions == {"tiny": (2, 3)}
        assert server.models["tiny"].bundle_id() == third.manifest.bundle_id()
        assert second.path.name == "2"


def test_stubs_that_outlive_a_killed_server_are_ended(repository: Path) -> None:
    with EmbeddedTriton(repository, STUBS) as server:
        processes = family(server.pid)
        os.kill(server.pid, signal.SIGKILL)
        assert all_gone(processes, within_s=10)
        deadline = time.monotonic() + 5
        while server.running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not server.running


def test_a_program_that_reaps_its_children_itself_sees_the_end_too(repository: Path) -> None:
    with EmbeddedTriton(repository, STUBS) as server:
        processes = family(server.pid)
        for process in processes:
            process.suspend()
        os.kill(server.pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # whoever comes first, the keeper or this
            os.waitpid(server.pid, 0)
        assert all_gone(processes[1:], within_s=10)
        deadline = time.monotonic() + 5
        while server.running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not server.running
        assert str(server.problem).startswith("the server ended by itself")
    assert server.log is not None
    server.log.unlink()


def test_a_server_that_ignores_its_end_is_killed(repository: Path) -> None:
    settings = ANY_PORTS.model_copy(update={"stop_timeout_s": 0.5})
    server = EmbeddedTriton(repository, settings)
    server.start()
    processes = family(server.pid)
    for process in processes:
        process.suspend()
    server.stop()
    assert all_gone(processes, within_s=5)


PARENT = """
import os, signal, sys, threading, time
from pathlib import Path
from serving.embedded import EmbeddedTriton
from tickserve.config import ServeSettings
server = EmbeddedTriton(Path(sys.argv[1]), ServeSettings(http_port=0, grpc_port=0, metrics_port=0, backend="python"))
# From a thread that ends: the server must live on as long as the process does, not as the thread.
starter = threading.Thread(target=server.start)
starter.start(); starter.join()
time.sleep(0.5)
print(server.pid, server.running, flush=True)
time.sleep(60)
"""


@pytest.mark.system
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_parent(repository: Path, root: Path, end: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(repository)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        pid, running = parent.stdout.readline().split()
        assert running == "True"
        processes = family(int(pid))
        assert len(processes) == 2
    finally:
        parent.send_signal(end)
        parent.communicate()
    assert all_gone(processes, within_s=15)
    (left,) = Path(tempfile.gettempdir()).glob(f"{folders.PREFIX}{parent.pid}-*")
    folders.sweep()  # as the next start does
    assert not left.exists()


@pytest.mark.parametrize("field", ["http_port", "grpc_port", "metrics_port"])
def test_taken_port_is_named_before_anything_starts(repository: Path, field: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = ANY_PORTS.model_copy(update={field: port})
        with pytest.raises(PortInUseError, match=rf"{port}.*--{field.replace('_', '-')}") as caught:
            EmbeddedTriton(repository, settings).start()
    assert f"serve.{field}" in str(caught.value)
    assert not left_running()


def test_a_port_that_is_held_for_a_server_refuses_at_once(repository: Path) -> None:
    """An engine that calls a server while it starts must not wait for its deadline."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with reserved(ANY_PORTS.model_copy(update={"http_port": port})) as ports:
        assert ports.http == port
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_given_port_is_taken_by_its_server(repository: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ANY_PORTS.model_copy(update={"http_port": port})
    with EmbeddedTriton(repository, settings) as server:
        assert server.http_url == f"127.0.0.1:{port}"
        with pytest.raises(PortInUseError):
            EmbeddedTriton(repository, settings).start()
        check_golden(server.http_url, "tiny", 1, repository / "tiny" / "1")


def test_one_port_for_two_things_is_refused(repository: Path) -> None:
    settings = ANY_PORTS.model_copy(update={"http_port": 18_765, "grpc_port": 18_765})
    with pytest.raises(UsageError, match=r"grpc_port.*another port than serve\.http_port"):
        EmbeddedTriton(repository, settings).start()


@pytest.mark.system
def test_a_port_lost_in_the_race_is_replaced(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody listens on a free port right after it was chosen: the next attempt takes others."""
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", 0))
        thief.listen()
        lost = ports.Ports(thief.getsockname()[1], 0, 0)
        real, calls = EmbeddedTriton._launch, []

        def launch(self: EmbeddedTriton, *arguments: object) -> None:
            calls.append(self._ports)
            if len(calls) == 1:
                assert self._ports is not None
                self._ports = self._ports._replace(http=lost.http)
            real(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(EmbeddedTriton, "_launch", launch)
        with EmbeddedTriton(repository, ANY_PORTS) as server:
            assert len(calls) == 2
            assert server.running


def truncate(version: Path) -> None:
    data = (version / "model.onnx").read_bytes()
    (version / "model.onnx").write_bytes(data[: len(data) // 2])


def remove(name: str) -> Callable[[Path], None]:
    return lambda version: (version / name).unlink()


def swap_golden(version: Path) -> None:
    data = bytearray((version / "golden.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (version / "golden.npz").write_bytes(bytes(data))


def link_model(version: Path) -> None:
    shutil.move(version / "model.onnx", version.parents[2] / "elsewhere.onnx")
    (version / "model.onnx").symlink_to(version.parents[2] / "elsewhere.onnx")


BROKEN: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "48 truncated model": (truncate, DigestMismatchError, "model.onnx"),
    "48 empty model": (lambda v: (v / "model.onnx").write_bytes(b""), DigestMismatchError, "model.onnx"),
    "49 link": (link_model, ArtifactError, "model.onnx"),
    "60 wrong golden": (swap_golden, DigestMismatchError, "golden.npz"),
    "60 no manifest": (remove("manifest.json"), ArtifactError, "manifest"),
    "60 no golden": (remove("golden.npz"), ArtifactError, "golden.npz"),
    "60 no model": (remove("model.onnx"), ArtifactError, "model.onnx"),
    "60 manifest is not JSON": (lambda v: (v / "manifest.json").write_text("{"), ArtifactError, "manifest"),
    "60 manifest edited": (
        lambda v: (v / "manifest.json").write_text((v / "manifest.json").read_text() + " "),
        DigestMismatchError,
        "manifest.1",
    ),
    "another largest batch": (
        lambda v: edit_config(v.parent, lambda config: setattr(config, "max_batch_size", 4096)),
        ArtifactError,
        "max_batch_size",
    ),
    "answers from a cache": (
        lambda v: edit_config(v.parent, lambda config: setattr(config.response_cache, "enable", True)),
        ArtifactError,
        "response_cache",
    ),
    "a configuration that is not text": (
        lambda v: (v.parent / "config.pbtxt").write_bytes(b"\xff\xfe"),
        ArtifactError,
        "config.pbtxt",
    ),
    "no versions": (shutil.rmtree, ArtifactError, "version"),
    "58 configuration lost": (lambda v: (v.parent / "config.pbtxt").unlink(), ArtifactError, "model"),
    "58 configuration of other tensors": (
        lambda v: edit_config(v.parent, lambda config: config.input[0].dims.__setitem__(0, 9)),
        ArtifactError,
        "features",
    ),
}


@pytest.mark.system
def test_the_shared_baseline_sees_a_server(repository: Path) -> None:
    """Without this, `left_running` could be empty for the wrong reason."""
    with EmbeddedTriton(repository, STUBS):
        assert len(left_running()) == 2
    assert not left_running()
    with EmbeddedTriton(repository, ANY_PORTS):
        assert len(left_running()) == 1
    assert not left_running()


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_trusted_does_not_start(repository: Path, case: str) -> None:
    damage, error, named = BROKEN[case]
    damage(repository / "tiny" / "1")
    with pytest.raises(error, match=named):
        EmbeddedTriton(repository, ANY_PORTS).start()
    assert not left_running()


def republish(repository: Path, change: Callable[[Path], None]) -> None:
    """Change a version and make every digest agree again, as somebody who means it would."""
    import json

    version = repository / "tiny" / "1"
    change(version)
    manifest = json.loads((version / "manifest.json").read_text())
    manifest["export"]["golden_sha256"] = sha256_file(version / "golden.npz")
    (version / "manifest.json").write_text(json.dumps(manifest))
    digest = sha256_file(version / "manifest.json")
    edit_config(version.parent, lambda config: config.parameters["manifest.1"].__setattr__("string_value", digest))


def test_numbers_that_are_not_researchs_never_become_ready(repository: Path, tmp_path: Path) -> None:
    """Every digest agrees, yet the graph does not give the golden numbers: the backend refuses at load."""
    other = publish_tiny(tmp_path / "elsewhere", "tiny", 5)
    republish(repository, lambda version: shutil.copy(other.path / "golden.npz", version / "golden.npz"))
    server = EmbeddedTriton(repository, ANY_PORTS)
    with pytest.raises(ServerStartError, match=r"golden probabilities, row .*expected research's number"):
        server.start()
    assert not left_running()
    assert not server.running
    assert any("golden" in line for line in server.tail(200))


def test_a_parameter_that_is_not_honoured_is_refused(repository: Path) -> None:
    change = lambda config: config.parameters["enable_mem_arena"].__setattr__("string_value", "1")  # noqa: E731
    edit_config(repository / "tiny", change)
    with pytest.raises(ArtifactError, match="enable_mem_arena"):
        EmbeddedTriton(repository, ANY_PORTS).start()


def test_the_backend_refuses_by_itself(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check before the start (a `load` while it runs has none), the backend still refuses."""
    real = survey(repository / "tiny")
    monkeypatch.setattr(embedded, "survey", lambda folder, trusted: real)
    change = lambda config: config.parameters["enable_mem_arena"].__setattr__("string_value", "1")  # noqa: E731
    edit_config(repository / "tiny", change)
    with pytest.raises(ServerStartError, match="enable_mem_arena: a parameter this backend does not honour"):
        EmbeddedTriton(repository, ANY_PORTS).start()
    assert not left_running()


def test_a_server_that_takes_too_long_is_ended(repository: Path) -> None:
    settings = ANY_PORTS.model_copy(update={"start_timeout_s": 0.001})
    with pytest.raises(ServerStartError, match="not ready after"):
        EmbeddedTriton(repository, settings).start()
    assert not left_running()


@pytest.mark.parametrize("models", [["nobody"], ["tiny", "../tiny"], [], [""]])
def test_unknown_models_are_refused(repository: Path, models: list[str]) -> None:
    with pytest.raises(ArtifactError, match="model"):
        EmbeddedTriton(repository, ANY_PORTS, models=models).start()


def test_an_empty_or_missing_repository_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match="no model in the repository"):
            EmbeddedTriton(folder, ANY_PORTS).start()


def test_a_log_that_cannot_be_written_is_a_typed_error(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ComponentError, match="cannot write"):
        EmbeddedTriton(repository, ANY_PORTS, log=tmp_path / "file" / "triton.log").start()


def test_before_start_there_is_no_address(repository: Path) -> None:
    server = EmbeddedTriton(repository, ANY_PORTS)
    server.stop()
    assert server.tail() == []
    for name in ("pid", "http_url", "grpc_url", "metrics_url"):
        with pytest.raises(ServerStartError, match="not started"):
            getattr(server, name)


@pytest.mark.parametrize(("name", "value"), [("system", "Darwin"), ("machine", "aarch64"), ("libc_ver", ("", ""))])
def test_other_platforms_are_told_so(
    monkeypatch: pytest.MonkeyPatch, repository: Path, name: str, value: object
) -> None:
    monkeypatch.setattr(platform, name, lambda: value)
    with pytest.raises(UnsupportedPlatformError, match="expected Linux x86_64 glibc, was"):
        EmbeddedTriton(repository, ANY_PORTS).start()


def test_a_python_without_a_stub_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_files, "_python_version", lambda: "3.99")
    with pytest.raises(UnsupportedPlatformError, match=r"expected Python .*3\.11.*, was 3\.99"):
        triton_files.find_triton()


@pytest.mark.parametrize("missing", ["pytriton", "onnxruntime"])
def test_a_missing_wheel_names_its_extra(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real = triton_files.find_spec
    monkeypatch.setattr(triton_files, "find_spec", lambda name: None if name == missing else real(name))
    with pytest.raises(MissingExtraError, match=r"tickserve\[triton\]"):
        triton_files.find_triton()


def test_numpy_2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_files.metadata, "version", lambda name: "2.1.0")
    with pytest.raises(ComponentError, match=r"numpy.*expected < 2, was 2\.1\.0"):
        triton_files.find_triton()


def test_keep_versions_are_chosen_as_triton_chooses(repository: Path) -> None:
    for seed in (2, 3):
        publish_tiny(repository, "tiny", seed, ExportSettings(max_batch=64, preferred_batch_rows=(8,)))
    folder = repository / "tiny"
    assert list(survey(folder).served) == [2, 3]
    edit_config(folder, lambda config: config.version_policy.all.SetInParent())
    assert list(survey(folder).served) == [1, 2, 3]
    edit_config(folder, lambda config: config.version_policy.specific.versions.append(2))
    assert list(survey(folder).served) == [2]
    edit_config(folder, lambda config: config.ClearField("version_policy"))
    assert list(survey(folder).served) == [3]
    edit_config(folder, lambda config: config.version_policy.specific.versions.append(7))
    with pytest.raises(ArtifactError, match="no version to serve"):
        survey(folder)

"""Shared memory with the real server: the same numbers, and nothing left behind however a call or a process ends."""

from __future__ import annotations

import http.client
import json
import os
import signal as signals
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import runfile
from serving.embedded import EmbeddedTriton
from tests.cli.conftest import tickserve_in
from tickserve.client import AsyncClient, Client, local_credential
from tickserve.client._region import Region, places
from tickserve.client._transport import Tensor
from tickserve.config import ServeSettings
from tickserve.errors import (
    ComponentError,
    DeadlineExceededError,
    ServerRejectedError,
    TransportError,
    UsageError,
)
from tickserve.journal import Journal

SHARED = Path("/dev/shm")
MODEL = "hand-l1-gbdt"
SECONDS_MS = 5_000


@pytest.fixture(scope="module")
def server(triton: Any) -> Iterator[EmbeddedTriton]:
    """A server of this module's own: the session's server tells nobody its credential."""
    with EmbeddedTriton(triton.repository, ServeSettings(http_port=0, grpc_port=0, metrics_port=0)) as running:
        yield running


@pytest.fixture
def client(server: EmbeddedTriton, triton: Any) -> Iterator[Client]:
    with opened(server, triton) as shared:
        yield shared


def opened(server: EmbeddedTriton, triton: Any, **changes: Any) -> Client:
    options: dict[str, Any] = {"deadline_ms": SECONDS_MS, "credential": server.credential} | changes
    return Client(server.http_url, manifest=triton.folder, transport="shm", **options)


def regions(server: EmbeddedTriton) -> set[str]:
    """The regions of clients that the server knows."""
    host, _, port = server.http_url.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=5)
    connection.request("GET", "/v2/systemsharedmemory/status", headers=dict([server.credential]))
    known = json.loads(connection.getresponse().read())
    connection.close()
    return {each["name"] for each in known}


def transport_of(client: Client) -> Any:
    return client._transport._transport  # type: ignore[union-attr]


@pytest.fixture(autouse=True)
def no_file_is_left() -> Iterator[None]:
    """Other processes of this machine may have regions too: only one that stays is left behind."""
    before = files()
    yield
    until = time.monotonic() + 2
    while (left := files() - before) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left


def files() -> set[str]:
    return {path.name for path in SHARED.iterdir() if path.name.startswith("tickserve-") and len(path.name) == 42}


def test_the_same_bits_as_over_the_wire(server: EmbeddedTriton, triton: Any, client: Client) -> None:
    rows = np.random.default_rng(7).uniform(-4, 4, (8, 4)).astype(np.float32)
    with Client(server.http_url, manifest=triton.folder, deadline_ms=SECONDS_MS) as wire:
        for batch in (1, 8, 3, 1, 8):
            shared, plain = client.score(MODEL, rows[:batch]), wire.score(MODEL, rows[:batch])
            assert np.array_equal(shared.probabilities, plain.probabilities)
            assert np.array_equal(shared.score, plain.score)
            assert shared.decision == plain.decision
    assert len(transport_of(client)._idle) == 1


def test_an_answer_is_not_overwritten_by_the_next(client: Client, rows: np.ndarray) -> None:
    first = client.score(MODEL, rows)
    kept = first.probabilities.copy()
    client.score(MODEL, -rows)
    assert np.array_equal(first.probabilities, kept)
    assert not first.probabilities.flags.writeable


def test_threads_have_regions_of_their_own(server: EmbeddedTriton, triton: Any) -> None:
    inputs, before = np.random.default_rng(7).uniform(-4, 4, (16, 4)).astype(np.float32), regions(server)
    with opened(server, triton) as client:
        alone = [client.score(MODEL, row[np.newaxis]).probabilities for row in inputs]

        def score(index: int) -> bool:
            answers = [client.score(MODEL, inputs[index : index + 1]).probabilities for _ in range(20)]
            return all(np.allclose(answer, alone[index], atol=1e-6) for answer in answers)

        with ThreadPoolExecutor(16) as threads:
            assert all(threads.map(score, range(16)))
        assert 1 < len(regions(server) - before) <= 16
    assert regions(server) == before


def test_nothing_is_left_after_close_and_no_name_while_open(
    server: EmbeddedTriton, triton: Any, rows: np.ndarray
) -> None:
    before = regions(server)  # a client that was killed leaves its own
    with opened(server, triton) as client:
        assert client.score(MODEL, rows).ok
        assert len(regions(server) - before) == 1
        assert not any((SHARED / name).exists() for name in regions(server))
    assert regions(server) == before


def test_a_late_call_keeps_its_region_from_all_others(server: EmbeddedTriton, triton: Any, rows: np.ndarray) -> None:
    known = regions(server)
    with opened(server, triton) as client:
        assert client.score(MODEL, rows).ok
        (before,) = regions(server) - known
        os.kill(server.pid, signals.SIGSTOP)
        try:
            with pytest.raises(DeadlineExceededError):
                client.score(MODEL, rows, deadline_ms=100)
        finally:
            os.kill(server.pid, signals.SIGCONT)
        signal = client.score(MODEL, rows)
        assert signal.ok
        assert all(region.name != before for region in transport_of(client)._idle)
        for _ in range(5):
            assert client.score(MODEL, rows).ok
        assert before not in regions(server)  # forgotten once the server no longer uses it


@pytest.mark.system
def test_a_server_that_was_started_anew_is_shown_the_memory_again(
    triton: Any, rows: np.ndarray, runtime_folder: Path
) -> None:
    """It has another secret then, which the client finds by itself."""
    with EmbeddedTriton(triton.repository, ServeSettings(http_port=0, grpc_port=0, metrics_port=0)) as first:
        port, grpc = int(first.http_url.rpartition(":")[2]), int(first.grpc_url.rpartition(":")[2])
        client, before = opened(first, triton, credential=None), first.credential
        with announced(first):
            assert client.score(MODEL, rows).ok
        first.stop()
        with pytest.raises(TransportError):
            client.score(MODEL, rows)
        ports = ServeSettings(http_port=port, grpc_port=grpc, metrics_port=0)
        with EmbeddedTriton(triton.repository, ports) as second, announced(second):
            assert second.credential != before
            until = time.monotonic() + 10  # the breaker's
            while time.monotonic() < until:
                try:
                    assert client.score(MODEL, rows).ok
                    break
                except TransportError:
                    time.sleep(0.1)
            assert client.score(MODEL, rows).ok
        client.close()


def test_memory_the_server_was_told_to_forget_is_shown_again(
    server: EmbeddedTriton, client: Client, rows: np.ndarray
) -> None:
    assert client.score(MODEL, rows).ok
    before = regions(server)
    host, _, port = server.http_url.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=5)
    connection.request("POST", "/v2/systemsharedmemory/unregister", headers=dict([server.credential]))
    assert connection.getresponse().status == 200
    connection.close()
    assert client.score(MODEL, rows).ok
    assert regions(server)
    assert not regions(server) & before


CHILD = """
import os, sys
from pathlib import Path
import numpy as np
from tickserve.client import Client

url, folder, name, value, how = sys.argv[1:]
rows = np.zeros((1, 4), np.float32)
client = Client(url, manifest=Path(folder), transport="shm", credential=(name, value), deadline_ms=5_000)
assert client.score("hand-l1-gbdt", rows).ok
if how == "fork":
    child = os.fork()
    if not child:
        ok = not client._transport._transport._idle and client.score("hand-l1-gbdt", rows).ok
        client.close()
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert client.score("hand-l1-gbdt", rows).ok
    client.close()
else:
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("how", "code", "left"), [("fork", 0, 0), ("kill", -9, 1)])
def test_a_fork_and_a_killed_process_leave_no_file(
    server: EmbeddedTriton, triton: Any, how: str, code: int, left: int
) -> None:
    before = regions(server)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, server.http_url, str(triton.folder), *server.credential, how],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert len(regions(server) - before) == left  # the server alone still knows what a killed client never took back


@pytest.fixture
def runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where run files of this test are: in nobody's way."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "tickserve"


def announced(server: EmbeddedTriton) -> AbstractContextManager[Path]:
    """The run file of `tickserve serve`, as that command writes it."""
    return runfile.announced(server.target, server.metrics_url)


def test_the_wrong_credential_and_no_credential_are_refused(
    server: EmbeddedTriton, triton: Any, rows: np.ndarray, runtime_folder: Path
) -> None:
    with (
        announced(server),
        opened(server, triton, credential=("tickserve-closed", "guess")) as client,
        pytest.raises(ServerRejectedError, match=r"shared memory.*is credential= its own"),
    ):
        client.score(MODEL, rows)
    with opened(server, triton, credential=None) as client:
        with pytest.raises(ServerRejectedError, match=r"shared memory.*no run file names a server at") as caught:
            client.score(MODEL, rows)
        assert "tickserve serve" in str(caught.value)
        assert str(runtime_folder.parent) not in str(caught.value)


def test_the_credential_of_this_users_server_is_found(
    server: EmbeddedTriton, triton: Any, rows: np.ndarray, runtime_folder: Path
) -> None:
    with announced(server), opened(server, triton, credential=None) as client:
        assert client.score(MODEL, rows).ok
        assert len(transport_of(client)._idle) == 1
        port = server.http_url.rpartition(":")[2]
        for url in (server.http_url, f"localhost:{port}", f"http://LOCALHOST:{port}/", f"[::1]:{port}"):
            assert local_credential(url) == server.credential


@pytest.mark.system
def test_the_commands_that_score_share_memory_when_the_configuration_says_so(
    server: EmbeddedTriton, triton: Any, rows: np.ndarray, runtime_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "desk.toml").write_text("[client]\ntransport = 'shm'\n")
    with (
        Journal(tmp_path / "journal") as journal,
        Client(server.http_url, manifest=triton.folder, observer=journal) as client,
    ):
        assert client.score(MODEL, rows, deadline_ms=SECONDS_MS).ok
    run = tickserve_in(tmp_path)
    asked = ["--url", server.http_url, "--config", "desk.toml"]
    commands = (["predict", MODEL, "--repository", triton.repository, *asked], ["replay", tmp_path / "journal", *asked])
    for command in commands:
        refused = run(*command)
        assert refused.returncode == 4, refused.stderr
        assert "no run file names a server" in refused.stdout + refused.stderr
    with announced(server):
        for command in commands:
            done = run(*command)
            assert done.returncode == 0, done.stderr
            assert server.credential[1] not in done.stdout + done.stderr


PORT = "127.0.0.1:4711"


def told(folder: Path, **changes: Any) -> Path:
    """A run file of this process, with other fields where given."""
    folder.mkdir(mode=0o700, exist_ok=True)
    fields = {"pid": os.getpid(), "started": runfile.started_ticks(os.getpid()), "http": PORT, "credential": ["h", "s"]}
    path = folder / f"{os.getpid()}.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(fields | changes))
    return path


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_run_file_that_others_may_touch_is_refused(runtime_folder: Path, mode: int) -> None:
    told(runtime_folder).chmod(mode)
    with pytest.raises(ComponentError, match="open to others") as caught:
        local_credential(PORT)
    assert (caught.value.field, caught.value.was) == ("credential", f"mode {mode:o}")
    told(runtime_folder).chmod(0o600)
    assert local_credential(PORT) == ("h", "s")


def test_a_run_file_of_another_user_is_refused(runtime_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(runtime_folder)
    monkeypatch.setattr("tickserve.runfile.check_folder", lambda found: None)
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(ComponentError, match="another user's"):
        local_credential(PORT)


def test_a_run_folder_open_to_others_is_not_believed(runtime_folder: Path) -> None:
    told(runtime_folder)
    runtime_folder.chmod(0o755)
    with pytest.raises(ComponentError, match="XDG_RUNTIME_DIR: the runtime folder is open to others"):
        local_credential(PORT)
    runtime_folder.rename(runtime_folder.with_name("elsewhere"))
    runtime_folder.symlink_to("elsewhere")
    with pytest.raises(ComponentError, match="open to others"):
        local_credential(PORT)


@pytest.mark.parametrize(
    "changes",
    [{"started": 1}, {"pid": 2**30}, {"pid": None}, {"credential": "text"}, {"credential": ["h"]}, {"http": ""}],
)
def test_a_file_that_names_no_running_server_is_none_and_stays(runtime_folder: Path, changes: dict[str, Any]) -> None:
    path = told(runtime_folder, **changes)
    with pytest.raises(ComponentError, match="no run file names a server"):
        local_credential(PORT)
    assert path.exists(), "a client removes nothing"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_run_file_is_none(runtime_folder: Path, data: bytes) -> None:
    told(runtime_folder).write_bytes(data)
    with pytest.raises(ComponentError, match="no run file names a server"):
        local_credential(PORT)


def test_neither_a_link_nor_a_pipe_is_read(runtime_folder: Path) -> None:
    path = told(runtime_folder)
    path.rename(runtime_folder / "elsewhere")
    path.symlink_to("elsewhere")
    os.mkfifo(runtime_folder / "1.json", 0o600)
    with pytest.raises(ComponentError, match="no run file names a server"):
        local_credential(PORT)


def test_no_server_of_this_user_is_told_from_another_one(runtime_folder: Path) -> None:
    with pytest.raises(ComponentError, match="was none"):
        local_credential(PORT)
    assert not runtime_folder.exists(), "a client makes nothing"
    told(runtime_folder)
    with pytest.raises(ComponentError, match=f"at 127.0.0.1:1: .*was servers at {PORT}"):
        local_credential("127.0.0.1:1")
    for url in (f"grpc://{PORT}", f"https://{PORT}", "local://models", "host", 7):
        with pytest.raises(UsageError):
            local_credential(url)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "credential", ["text", ("name",), ("name", 1), ("na:me", "value"), ("name", "va\r\nlue"), ("", "value"), ("ü", "v")]
)
def test_what_is_no_credential_is_refused_at_once(triton: Any, credential: Any) -> None:
    with pytest.raises(UsageError, match="credential"):
        Client(triton.http, manifest=triton.folder, transport="shm", credential=credential)


def test_where_shared_memory_does_not_go(triton: Any) -> None:
    with pytest.raises(UsageError, match="credential"):
        Client(triton.http, manifest=triton.folder, credential=("name", "value"))
    for url in (f"https://{triton.http}", f"grpc://{triton.grpc}"):
        with pytest.raises(UsageError, match="transport"):
            Client(url, manifest=triton.folder, transport="shm", credential=("name", "value"))
    with pytest.raises(UsageError, match="transport"):
        AsyncClient(triton.http, manifest=triton.folder, transport="shm")


def test_a_region_is_the_users_own_and_gone_from_the_file_system() -> None:
    seen: list[tuple[str, int]] = []

    def register(name: str, key: str, size: int) -> None:
        path = SHARED / key.removeprefix("/")
        seen.append((name, path.stat().st_mode & 0o777))
        assert path.stat().st_size == size

    first, second = Region(100, register), Region(100, register)
    assert first.name != second.name
    assert [mode for _, mode in seen] == [0o600, 0o600]
    assert not any((SHARED / name).exists() for name, _ in seen)
    where, end = places([("a", 3), ("b", 70), ("c", 1)])
    assert [place.offset for place in where] == [0, 64, 192]
    assert end == 256
    first.write(tuple(Tensor(name, "FP32", (1,), name.encode() * size) for name, _, size in where), where)
    assert [first.read(place) for place in where] == [b"aaa", b"b" * 70, b"c"]
    for region in (first, second):
        region.close()
        region.close()


def test_no_memory_left_is_a_typed_error_and_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TransportError, match="No space left"):
        Region(100, lambda name, key, size: None)

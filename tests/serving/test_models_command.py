"""`tickserve models` against the server that `tickserve serve` runs, and the file through which it finds it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from export.repository.places import Local
from export.repository.sign import sign
from serving import runfile
from serving.remote import read_credential, remote_target
from tests.serving.conftest import publish_tiny
from tickserve.cli.commands import app
from tickserve.config import SwapSettings
from tickserve.errors import ComponentError, ConfigError, TickserveError, UsageError
from tickserve.signing import generate_key

COMMAND = str(Path(sys.executable).with_name("tickserve"))
FAST = {"TICKSERVE_SWAP__MEMORY_REQUESTS": "16", "TICKSERVE_SWAP__DRAIN_QUIET_MS": "100"}


@dataclass(frozen=True)
class Done:
    stdout: str
    stderr: str


def run(*arguments: str, environ: dict[str, str], code: int = 0) -> Done:
    """The command in this process: its start would take longer than all it does."""
    done = CliRunner().invoke(app, ["models", *arguments], env=environ)
    error = done.exception
    if isinstance(error, TickserveError):
        assert error.exit_code == code, error
        return Done(done.stdout, str(error))
    assert done.exit_code == code, done.output
    return Done(done.stdout, "")


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("runtime")
    folder.chmod(0o700)
    return os.environ | FAST | {"XDG_RUNTIME_DIR": str(folder)}


@pytest.fixture(scope="module")
def serving(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    repository = tmp_path_factory.mktemp("command") / "models"
    publish_tiny(repository, "tiny", 1)
    publish_tiny(repository, "tiny", 2, activate=False)
    ports = ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    command = [COMMAND, "serve", "--repository", str(repository), *ports]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("http "))
        yield {"process": process, "repository": repository, "http": line.split()[1], "grpc": line.split()[3]}
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 0
    assert not list(Path(environ["XDG_RUNTIME_DIR"]).rglob("*.json")), "the file goes with the server"


def test_the_file_is_for_its_owner_alone(serving: dict[str, Any], environ: dict[str, str]) -> None:
    (path,) = Path(environ["XDG_RUNTIME_DIR"]).rglob("*.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert json.loads(path.read_text())["pid"] == serving["process"].pid


def test_list_swap_and_rollback(serving: dict[str, Any], environ: dict[str, str]) -> None:
    row = {"model": "tiny", "loaded": [1], "in_force": 1, "newest": 2}
    assert json.loads(run("list", "--json", environ=environ).stdout) == [row]
    done = json.loads(run("swap", "tiny", "--json", environ=environ).stdout)
    assert (done["version"], done["previous"], done["drained"]) == (2, 1, True)
    assert json.loads(run("list", "--json", environ=environ).stdout) == [row | {"loaded": [2], "in_force": 2}]
    told = run("rollback", "tiny", environ=environ).stdout
    assert told.startswith("tiny: version 1 serves (was 2)")
    assert "memory" in told
    refused = run("swap", "tiny", "--version", "9", environ=environ, code=3)
    assert "version 9 refused at step 'verify'" in refused.stderr
    assert "version 1 serves as before" in refused.stderr
    credential = json.loads(next(Path(environ["XDG_RUNTIME_DIR"]).rglob("*.json")).read_text())["credential"][1]
    assert credential not in told + refused.stderr


def test_a_command_without_keys_does_not_open_a_server_that_has_them(
    environ: dict[str, str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    repository, key = tmp_path / "models", generate_key()
    publish_tiny(repository, "tiny", 1)
    sign(Local(repository), key, model="tiny", version=None)
    publish_tiny(repository, "tiny", 2, activate=False)
    keys = tmp_path / "keys"
    keys.write_text(key.public_line())
    own = tmp_path_factory.mktemp("trusting")
    own.chmod(0o700)
    mine = environ | {"XDG_RUNTIME_DIR": str(own)}
    command = [COMMAND, "serve", "--repository", str(repository), "--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    trusting = mine | {"TICKSERVE_REPOSITORY__TRUSTED_KEYS_FILE": str(keys)}
    process = subprocess.Popen(command, env=trusting, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        http = next(line for line in process.stdout if line.startswith("http ")).split()[1]
        unsigned = f"unsigned: expected a signature by key {key.key_id}"
        assert unsigned in run("swap", "tiny", environ=mine, code=3).stderr
        for url in (http, http.replace("127.0.0.1", "localhost")):
            where = ["--url", url, "--repository", str(repository)]
            assert unsigned in run("swap", "tiny", *where, environ=mine, code=3).stderr
        # Without its file nobody knows of the keys: then the server itself refuses, for want of the credential.
        assert "refused at step 'load'" in run("swap", "tiny", *where, environ=environ, code=4).stderr
        keys.write_text(generate_key().public_line())
        assert "refused at step 'verify'" in run("swap", "tiny", environ=trusting, code=3).stderr
        sign(Local(repository), key, model="tiny", version=2)
        assert json.loads(run("swap", "tiny", "--json", environ=mine).stdout)["version"] == 2
        unknown = run("list", "--pid", "1", environ=mine, code=4).stderr
        assert "no server of this user with that process id" in unknown
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


def test_a_server_elsewhere(serving: dict[str, Any], environ: dict[str, str], tmp_path: Path) -> None:
    where = ["--url", serving["http"], "--grpc-url", serving["grpc"], "--repository", str(serving["repository"])]
    closed = run("swap", "tiny", *where, "--version", "2", environ=environ, code=4)
    assert "refused at step 'load'" in closed.stderr
    assert "restricted" in closed.stderr
    found = json.loads(next(Path(environ["XDG_RUNTIME_DIR"]).rglob("*.json")).read_text())
    secret = tmp_path / "credential"
    secret.write_text("=".join(found["credential"]) + "\n")
    wrong = environ | {"TICKSERVE_CREDENTIAL": "tickserve-closed=guess"}
    assert "restricted" in run("swap", "tiny", *where, "--version", "2", environ=wrong, code=4).stderr
    opened = environ | {"TICKSERVE_CREDENTIAL": secret.read_text().strip()}
    assert json.loads(run("list", *where[:2], *where[4:], "--json", environ=opened).stdout)[0]["loaded"] == [1]
    done = json.loads(run("swap", "tiny", *where, "--version", "1", "--json", environ=opened).stdout)
    assert done["memory"].startswith("not measured")


@pytest.mark.parametrize(
    "options", [["--grpc-url", "h:1"], ["--repository", "elsewhere"], ["--url", "h:1", "--pid", "1"]]
)
def test_an_option_without_effect_is_refused(environ: dict[str, str], options: list[str]) -> None:
    refused = run("swap", "tiny", *options, environ=environ, code=2).stderr
    assert "--url" in refused


def test_no_server_and_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ComponentError, match="no server of this user runs here"):
        runfile.only()
    here = runfile.started_ticks(os.getpid())
    common = {"grpc": None, "metrics": "m", "credential": ("h", "v"), "repository": "r", "view": "v"}
    ours = runfile.Run(pid=os.getpid(), server_pid=1, http="a:1", started=here, **common)  # type: ignore[arg-type]
    runfile.write(ours)
    assert runfile.only() == ours
    parent = os.getppid()
    other = runfile.Run(
        pid=parent,
        server_pid=1,
        http="b:1",
        started=runfile.started_ticks(parent),
        **common,  # type: ignore[arg-type]
    )
    runfile.write(other)
    with pytest.raises(UsageError, match="several servers run"):
        runfile.only()
    assert runfile.only(parent) == other


def test_a_server_here_is_known_by_its_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    here, key = runfile.started_ticks(os.getpid()), generate_key()
    keys = {key.key_id: key.public().hex()}
    ours = runfile.Run(os.getpid(), 1, "127.0.0.1:80", None, "m", ("h", "v"), "r", "v", started=here, trusted=keys)
    runfile.write(ours)
    for url in ("127.0.0.1:80", "localhost:80", "LOCALHOST:80", "[::1]:80"):
        assert remote_target(url, None, Path(), SwapSettings(), {}).trusted == {key.key_id: key.public()}
    for url in ("127.0.0.1:81", "triton:80"):
        assert remote_target(url, None, Path(), SwapSettings(), {}).trusted is None
    tmp_path.joinpath("tickserve").chmod(0o755)
    assert remote_target("127.0.0.1:80", None, Path(), SwapSettings(), {}).trusted is None


@pytest.mark.parametrize("left", ["{", "[]", '{"pid": 1}', '{"credential": 1}', ""])
def test_what_a_dead_server_left_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left: str) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = runfile.runtime_folder() / "1.json"
    path.write_text(left)
    assert runfile.running() == []
    assert not path.exists()


def test_another_process_with_the_same_id_is_no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    runfile.write(runfile.Run(os.getpid(), 1, "a:1", None, "m", ("h", "v"), "r", "v", started=1))
    assert runfile.running() == []


def test_a_runtime_folder_open_to_others_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "tickserve").mkdir(mode=0o755)
    (tmp_path / "tickserve").chmod(0o755)
    with pytest.raises(ComponentError, match="open to others"):
        runfile.runtime_folder()


@pytest.mark.parametrize("text", ["nothing", "=value", "header=", "two words=value", "a=b\nc=d"])
def test_a_credential_that_is_none_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    file = tmp_path / "credential"
    file.write_text(text)
    for settings, environ in (
        (SwapSettings(credential_file=str(file)), {}),
        (SwapSettings(), {"TICKSERVE_CREDENTIAL": text}),
    ):
        with pytest.raises(ConfigError) as refused:
            read_credential(settings, environ)
        assert text not in str(refused.value).replace("header=value", "")
    with pytest.raises(ConfigError, match="cannot read"):
        read_credential(SwapSettings(credential_file=str(tmp_path / "nowhere")), {})
    assert read_credential(SwapSettings(), {}) is None


@pytest.mark.parametrize("url", ["nowhere", "http://host:80", ":80", "host:"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="expected host:port"):
        remote_target(url, None, Path(), SwapSettings(), {})

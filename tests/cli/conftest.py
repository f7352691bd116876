"""The command as a user runs it: its own process, its exit code, what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tickserve.cli.commands import app
from tickserve.errors import TickserveError

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def environment_with(settings: dict[str, str]) -> dict[str, str]:
    """The environment without what it sets of Tickserve, and with `settings`."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("TICKSERVE_")}
    return clean | {"COLUMNS": "200"} | settings


def tickserve_in(folder: Path) -> Run:
    """Run `tickserve ...` in a folder; keyword arguments are environment variables."""

    def run(*arguments: object, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tickserve.cli", *map(str, arguments)],
            cwd=folder,
            env=environment_with(environment),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def tickserve(tmp_path: Path) -> Run:
    """Run `tickserve ...` in a scratch folder."""
    return tickserve_in(tmp_path)


CALENDAR = """
[prescale]
replicas = 5
[freeze]
[[market]]
exchange = "XNYS"
"""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A scratch folder with a published model, its derived table, and a calendar."""
    from tests.export.deployment.conftest import times, write_table
    from tests.serving.conftest import publish_tiny

    tiny = publish_tiny(tmp_path / "model_repository", "tiny", 1)
    largest = tiny.manifest.export.max_batch if tiny.manifest.export else 0
    service = times(300, r1=200, **{f"r{largest}": 2_000})
    peak = {"requests": 1_000, "rows": 1_000, "seconds": 0.1, "per_second": 10_000.0}
    write_table(tmp_path / "runs/batching", "tiny", service, 10_000, **peak)
    (tmp_path / "cal.toml").write_text(CALENDAR)
    return tmp_path


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Deploy = Callable[..., Done]


@pytest.fixture
def deploy(published: Path, monkeypatch: pytest.MonkeyPatch) -> Deploy:
    """Run `tickserve deploy ...` in that folder and in this process: what it needs is imported once for all tests."""
    monkeypatch.chdir(published)

    def run(*arguments: object, **environment: str) -> Done:
        done = CliRunner().invoke(app, ["deploy", *map(str, arguments)], env=environment)
        if isinstance(done.exception, TickserveError):  # `main` makes this line and this exit code of it
            return Done(done.exception.exit_code, done.stdout, f"{done.stderr}error: {done.exception}\n")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Done(done.exit_code, done.stdout, done.stderr)

    return run

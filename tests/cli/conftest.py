"""The command as a user runs it: its own process, its exit code, what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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

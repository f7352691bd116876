"""The command as a user runs it: its own process, its exit code, what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def tickserve(tmp_path: Path, root: Path) -> Run:
    """Run `tickserve ...` in a scratch folder; keyword arguments are environment variables."""

    def run(*arguments: object, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("TICKSERVE_")}
        return subprocess.run(
            [sys.executable, "-m", "tickserve.cli", *map(str, arguments)],
            cwd=tmp_path,
            env=clean | {"COLUMNS": "200"} | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run

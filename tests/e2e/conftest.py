"""One demo run on a real recording, and one server over what it published, shared by the tests of this folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

RECORDING = "binance_l2_stream/usdm_btcusdt_20230404.us.jsonl.gz"
COMMAND = [sys.executable, "-m", "tickserve.cli"]
# The set-up counts, and of whichever test comes first it is a whole demo.
SETS_UP_A_DEMO = pytest.mark.timeout(1_200)


@dataclass(frozen=True)
class DemoRun:
    """What a demo left behind: its working folder, its JSON result and its standard error."""

    folder: Path
    result: dict[str, Any]
    says: str

    @property
    def repository(self) -> Path:
        return self.folder / "model_repository"

    @property
    def run(self) -> Path:
        return self.folder / "runs" / self.result["run"]


@dataclass(frozen=True)
class Served:
    """A running `tickserve serve`."""

    http: str
    grpc: str
    metrics: str
    repository: Path


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("TICKSERVE_")}


def run_demo(folder: Path, *arguments: object, timeout: float = 900) -> DemoRun:
    command = [*COMMAND, "demo", "--json", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return DemoRun(folder, json.loads(done.stdout), done.stderr)


@pytest.fixture(scope="session")
def demo_run(market_data: Path, tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    return run_demo(tmp_path_factory.mktemp("demo"), "--data", market_data / RECORDING)


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """`tickserve serve` in `folder` on free ports, stopped by its own process id."""
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    process = subprocess.Popen(
        [*COMMAND, "serve", *ports], cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.match(r"http (\S+)\s+grpc (\S+)\s+metrics (\S+)", line)
            if found:
                yield Served(*found.groups(), folder / "model_repository")
                break
        else:
            pytest.fail("the server ended before it was ready")
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=30)
        process.stdout.close()
        assert code == 0


@pytest.fixture(scope="session")
def served(demo_run: DemoRun) -> Iterator[Served]:
    with serving(demo_run.folder) as running:
        yield running

"""The memory sentinel: what counts as a process's own memory, what is a leak, and what it cannot see."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from serving import memory_sentinel, stubs
from serving.target import Target
from tests.serving.conftest import FEATURES, Running
from tickserve.config import SwapSettings
from tickserve.errors import GateRefusedError

SIZE = 32 * 2**20
ROWS, FEW = {"features": np.zeros((1, FEATURES), np.float32)}, SwapSettings(memory_requests=64)
# A process that touches every page of what it maps or allocates when it is told to, and says so.
TAKES = """
import mmap, sys
kind, path, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
if kind == "file":
    with open(path, "rb") as file:
        held = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
    sum(held[at] for at in range(0, size, mmap.PAGESIZE))
elif kind == "shared":
    held = mmap.mmap(-1, size)
    held.write(bytes([1]) * size)
else:
    held = bytearray([1]) * size
print("taken", flush=True)
sys.stdin.readline()
"""


@contextmanager
def taking(kind: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", TAKES, kind, str(path), str(SIZE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "ready\n"
            yield running
        finally:
            running.kill()


def take(running: subprocess.Popen[str]) -> None:
    assert running.stdin is not None
    assert running.stdout is not None
    running.stdin.write("\n")
    running.stdin.flush()
    assert running.stdout.readline() == "taken\n"


@pytest.mark.parametrize(("kind", "counted"), [("file", False), ("private", True), ("shared", True)])
def test_what_a_process_allocates_is_counted_and_no_page_of_a_file(tmp_path: Path, kind: str, counted: bool) -> None:
    path = tmp_path / "library"
    path.write_bytes(bytes(SIZE))
    with taking(kind, path) as running:
        before, resident = stubs.allocated_bytes([running.pid]), stubs.resident_bytes([running.pid])
        take(running)
        grown = stubs.allocated_bytes([running.pid]) - before
        assert stubs.resident_bytes([running.pid]) - resident > 0.9 * SIZE
    assert (grown > 0.9 * SIZE) if counted else (grown < 0.1 * SIZE)


def test_a_kernel_that_tells_no_kinds_apart_gives_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_text("Name:\tserver\nVmPeak:\t   99 kB\nVmRSS:\t   12 kB\n")
    monkeypatch.setattr(stubs, "PROC", tmp_path)
    assert stubs.allocated_bytes([7]) == 12 * 1024


def test_a_process_that_has_ended_counts_nothing() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert stubs.allocated_bytes([ended.pid]) == 0
    assert stubs.allocated_bytes([os.getpid(), ended.pid]) > 0


STEADY = [0.0] * 8
GROWTH: dict[str, tuple[list[float], bool]] = {
    "none": (STEADY, False),
    "the first round's": ([5.0, *STEADY[1:]], False),
    "once, within the limit": ([0.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0], False),
    "a page now and then": ([0.0, 0.01, 0.0, 0.02, 0.0, 0.01, 0.0, 0.0], False),
    "beyond the limit": ([0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0], True),
    "a little in every round": ([0.0, *[0.1] * 7], True),
    "freed and taken again": ([0.0, 9.0, -9.0, 9.0, -9.0, 9.0, -9.0, 0.0], False),
}


@pytest.mark.parametrize("case", GROWTH)
def test_what_is_a_leak(case: str) -> None:
    """Megabytes more after each round of 8 batches; the default limit is 8 MB."""
    steps, leaks = GROWTH[case]
    sizes = [int(size * memory_sentinel.MB) for size in 100 + np.cumsum(steps)]
    refused = pytest.raises(GateRefusedError, match="memory grows") if leaks else nullcontext()
    with refused:
        memory_sentinel.hold(sizes, 64, SwapSettings())


def test_the_sentinel_measures_no_process_it_cannot_see(running: Running) -> None:
    here = running.server.target
    away = Target(here.http_url, here.grpc_url, here.credential, here.repository)
    assert "another machine" in str(memory_sentinel.watch(away, 1, running.tiny.manifest, ROWS, FEW))


def test_code_that_is_read_in_meanwhile_is_no_leak(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter(range(0, 10**12, 100 * memory_sentinel.MB))
    monkeypatch.setattr(stubs, "resident_bytes", lambda _: next(sizes))
    seen = memory_sentinel.watch(running.server.target, 1, running.tiny.manifest, ROWS, FEW)
    assert isinstance(seen, memory_sentinel.Memory)
    assert seen.growth_mb < 100

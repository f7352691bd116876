"""What a server with its models takes: processor time for a request, and memory while it is as busy as it can be.

Processor time is what the system charged the server for requests of a few callers, so whoever else uses the machine,
and whatever a request waits, is not in it. For memory every instance of every served version scores full batches at the
same time, and the highest resident size since the start is read. Both are of the server and of the processes beside it
that score (their shared pages count in each).
"""

from __future__ import annotations

import http.client
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from serving import stubs, view
from serving.embedded import EmbeddedTriton
from serving.golden import infer, read_golden
from tickserve.errors import ComponentError, ServerRejectedError
from tickserve.manifest import load_manifest
from tickserve.model_config import served_rows

PROC = Path("/proc")
# Full batches that each instance scores: the allocator's pools are full well before the last.
BATCHES = 8
# The system counts in hundredths of a second; of the rounds the median is taken.
CALLERS, ROUNDS, ROUND_S = 4, 3, 0.7
KB = 1_024


@dataclass(frozen=True)
class Footprint:
    """Highest resident bytes, what was scored for it, how many versions were loaded; processor time by model."""

    peak_bytes: int
    batches: int
    versions: int
    cpu_us: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)


def measure(
    server: EmbeddedTriton, repository: Path, rows: Mapping[str, int], batches: int = BATCHES, round_s: float = ROUND_S
) -> Footprint:
    """Measure requests of `rows[model]` rows of each model, then `batches` full batches on every instance at once.

    Raises ComponentError when a request is not answered, or the system does not say what the server took.
    """
    cpu_us = {name: _cpu_us(server, repository, name, count, round_s) for name, count in rows.items()}
    jobs = []
    loaded = 0
    for name, versions in server.versions.items():
        for version in versions:
            full = _rows(repository / name / str(version), None)
            jobs += [(name, version, full)] * view.instances(repository / name)
            loaded += 1
    _together([partial(_ask, server, *job, lambda done: done < batches) for job in jobs])
    peak = sum(_peak_bytes(pid) for pid in _pids(server))
    if not peak:
        raise ComponentError("the server's size cannot be read", field="memory")
    return Footprint(peak, batches * len(jobs), loaded, cpu_us)


def _cpu_us(server: EmbeddedTriton, repository: Path, name: str, count: int, round_s: float) -> float:
    """Processor time of the server for a request of `count` rows, in microseconds, `CALLERS` of them at a time."""
    version = max(server.versions[name])
    rows = _rows(repository / name / str(version), count)
    _ask(server, name, version, rows, lambda done: done < CALLERS)
    rounds = []
    for _ in range(ROUNDS):
        before, until = _cpu_seconds(server), _until(time.monotonic() + round_s)
        answered = _together([partial(_ask, server, name, version, rows, until)] * CALLERS)
        rounds.append((_cpu_seconds(server) - before) / max(answered, 1) * 1e6)
    if min(rounds) <= 0:
        raise ComponentError("the server's processor time cannot be read", field="cpu")
    return round(float(np.median(rounds)), 1)


def _until(moment: float) -> Callable[[int], bool]:
    return lambda _: time.monotonic() < moment


def _together(asking: list[Callable[[], int]]) -> int:
    """Run all at once; the number of answers. Raises ComponentError for the first that failed."""
    answers: list[int] = []
    failed: list[Exception] = []

    def run(one: Callable[[], int]) -> None:
        try:
            answers.append(one())
        except Exception as error:  # raised again by whoever waits for the thread
            failed.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in asking]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise ComponentError(f"a request was not answered: {failed[0]}", field="footprint") from failed[0]
    return sum(answers)


def _rows(folder: Path, count: int | None) -> dict[str, Any]:
    """The golden inputs, repeated to `count` rows; for None to the largest batch."""
    manifest = load_manifest(folder)
    golden = read_golden(folder, manifest)
    wanted = count or served_rows(folder, manifest) or 1
    return {
        tensor.name: np.resize(golden[tensor.name], (wanted, *golden[tensor.name].shape[1:]))
        for tensor in manifest.inputs
    }


def _ask(server: EmbeddedTriton, model: str, version: int, rows: dict[str, Any], more: Callable[[int], bool]) -> int:
    """Ask for `rows` again and again while `more(asked)`; the number of answers."""
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    asked = answered = 0
    try:
        while more(asked):
            asked += 1
            with suppress(ServerRejectedError):  # a bounded queue may refuse
                infer(connection, model, version, rows)
                answered += 1
    finally:
        connection.close()
    return answered


def _pids(server: EmbeddedTriton) -> list[int]:
    return [server.pid, *stubs.stubs_of(server.pid)]


def _cpu_seconds(server: EmbeddedTriton) -> float:
    """What the server's processes were charged since their start."""
    ticks = 0
    for pid in _pids(server):
        with suppress(OSError, ValueError, IndexError):
            # "pid (name) state ...": user and system time are the 14th and 15th field.
            fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _peak_bytes(pid: int) -> int:
    """VmHWM: the highest resident size of a process; 0 when it has ended."""
    with suppress(OSError, ValueError, IndexError):
        for line in (PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KB
    return 0

"""The memory sentinel: does a version that is about to serve give back what each request takes?

The processes that score the new version get nothing but our requests, so the memory of their own
(`stubs.allocated_bytes`) says it: after a first round, which fills the allocator's pools, it has to stay. Growth beyond
the limit, or growth in every single round, is a leak. What grows by less than a page in a round's requests is not seen.
The native backend has no such processes: there it is the server's own, with whatever else it serves meanwhile.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serving import stubs
from serving.golden import infer
from serving.target import Target
from tickserve.config import SwapSettings
from tickserve.errors import ComponentError, GateRefusedError
from tickserve.manifest import Manifest

ROUNDS = 8
# How long it rests after each request, in times of the request: the cores belong to the version that serves meanwhile.
REST = 3
# Growth of one round that is no growth: a few pages, which the allocator and Python's own caches take now and then.
STILL_BYTES = 32 * 1024
MB = 2**20

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Memory:
    """What the sentinel saw, in megabytes: of the processes that score the new version, and of the server with all.

    With the native backend `version_mb` is the server's own. None counts the pages of mapped files, as code is.
    """

    requests: int
    version_mb: float
    growth_mb: float
    server_before_mb: float
    server_after_mb: float

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def watch(target: Target, version: int, manifest: Manifest, rows: Arrays, settings: SwapSettings) -> Memory | str:
    """Score `rows` (the inputs [B, ...] of one batch) `settings.memory_requests` times and watch what it takes.

    Gives a reason in place of a measurement where the server's processes are not this machine's to see. Raises
    GateRefusedError naming the growth when the version leaks, and ComponentError when its process is gone.
    """
    pid = target.pid
    if pid is None:
        return "not measured: the server's processes are on another machine; watch its container's memory there"
    living = stubs.stubs_of(pid)
    scoring = [stub.pid for stub in living.values() if (stub.model, stub.version) == (manifest.name, version)]
    if living and not scoring:
        raise ComponentError("the version's process has ended", field="swap.memory")
    scoring = scoring or [pid]  # the native backend scores in the server itself
    before = stubs.allocated_bytes([pid, *stubs.stubs_of(pid)])
    sizes, done = _rounds(target, version, manifest, rows, settings, lambda: stubs.allocated_bytes(scoring))
    after = stubs.allocated_bytes([pid, *stubs.stubs_of(pid)])
    growth = sizes[-1] - sizes[0]
    hold(sizes, done, settings)
    return Memory(done, *(round(size / MB, 2) for size in (sizes[-1], growth, before, after)))


def _rounds(
    target: Target, version: int, manifest: Manifest, rows: Arrays, settings: SwapSettings, size: Callable[[], int]
) -> tuple[list[int], int]:
    """The size after each round, and how many requests there were."""
    each = max(1, settings.memory_requests // ROUNDS)
    connection = http.client.HTTPConnection(target.http_url, timeout=settings.load_timeout_s)
    sizes = []
    try:
        for _ in range(ROUNDS):
            for _ in range(each):
                began = time.monotonic()
                infer(connection, manifest.name, version, rows, target.control.headers)
                time.sleep(REST * (time.monotonic() - began))
            sizes.append(size())
    finally:
        connection.close()
    return sizes, ROUNDS * each


def hold(sizes: list[int], requests: int, settings: SwapSettings) -> None:
    """Raises GateRefusedError for sizes of a leak."""
    growth, steps = sizes[-1] - sizes[0], np.diff(sizes)
    counted = requests - requests // len(sizes)
    if growth > settings.memory_growth_mb * MB:
        limit = f"at most {settings.memory_growth_mb:g} MB more after {counted} requests"
    elif (steps > STILL_BYTES).all():
        limit = f"a size that settles within {counted} requests"
    else:
        return
    raise GateRefusedError(
        "the version's memory grows", field="swap.memory", expected=limit, was=f"{growth / MB:.1f} MB more"
    )

"""What a server with its models takes in memory while it is as busy as it can be.

Every instance of every served version scores full batches at the same time, and the highest resident size since the
start is read: of the server, and of the processes beside it that score (their shared pages count in each).
"""

from __future__ import annotations

import http.client
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving import stubs, view
from serving.embedded import EmbeddedTriton
from serving.golden import infer, read_golden
from tickserve.errors import ComponentError, ServerRejectedError
from tickserve.manifest import Manifest, load_manifest

PROC = Path("/proc")
# Full batches that each instance scores: the allocator's pools are full well before the last.
BATCHES = 8
KB = 1_024


@dataclass(frozen=True)
class Footprint:
    """Highest resident bytes, what was scored for it, and how many versions were loaded."""

    peak_bytes: int
    batches: int
    versions: int

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)


def measure(server: EmbeddedTriton, repository: Path, batches: int = BATCHES) -> Footprint:
    """Score `batches` full batches on each instance of each version at once, and read the peak.

    Raises ComponentError when a batch is not answered or the size cannot be read.
    """
    jobs = []
    loaded = 0
    for name, versions in server.versions.items():
        instances = view.instances(repository / name)
        for version in versions:
            folder = repository / name / str(version)
            rows = _full(folder, load_manifest(folder))
            jobs += [(name, version, rows)] * instances
            loaded += 1
    failed: list[Exception] = []
    threads = [threading.Thread(target=_ask, args=(server, *job, batches, failed)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise ComponentError(f"a full batch was not answered: {failed[0]}", field="memory") from failed[0]
    peak = sum(_peak_bytes(pid) for pid in (server.pid, *stubs.stubs_of(server.pid)))
    if not peak:
        raise ComponentError("the server's size cannot be read", field="memory")
    return Footprint(peak, batches * len(jobs), loaded)


def _full(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The golden inputs, repeated to the largest batch."""
    golden = read_golden(folder, manifest)
    count = manifest.export.max_batch if manifest.export else 1
    return {
        tensor.name: np.resize(golden[tensor.name], (count, *golden[tensor.name].shape[1:]))
        for tensor in manifest.inputs
    }


def _ask(
    server: EmbeddedTriton, model: str, version: int, rows: dict[str, Any], batches: int, failed: list[Exception]
) -> None:
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    try:
        for _ in range(batches):
            with suppress(ServerRejectedError):  # a bounded queue may refuse; whoever is executed fills the memory
                infer(connection, model, version, rows)
    except Exception as error:  # raised again by whoever waits for the thread
        failed.append(error)
    finally:
        connection.close()


def _peak_bytes(pid: int) -> int:
    """VmHWM: the highest resident size of a process; 0 when it has ended."""
    with suppress(OSError, ValueError, IndexError):
        for line in (PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KB
    return 0

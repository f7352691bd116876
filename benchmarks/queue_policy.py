"""How often the embedded Triton overlooks a request: queue policies and instance counts, in a closed loop.

    python -m benchmarks.queue_policy --repository model_repository [--instances-from 3]

For each setting the model is served from a copy, and 1, 2, 4 and 8 callers ask for one row after the other. Any answer
later than `STALL_MS` is counted: this build's batcher, when nobody wakes it, looks again after 500 ms.
"""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as schema

from benchmarks.harness import Subject, options, subject, told_apart
from loadtest.open_loop import Feed, message
from serving.embedded import EmbeddedTriton
from tickserve.config import ServeSettings
from tickserve.model_config import CONFIG_NAME
from tickserve.pipeline import golden_inputs

STALL_MS = 100.0
CALLERS = (1, 2, 4, 8)
FREE = ServeSettings(http_port=0, grpc_port=0, metrics_port=0)
# Queue policy, lanes, delay in microseconds, instances. `empty` is what export writes to say that there is no bound.
SETTINGS = (
    ("none", False, 0, 1),
    ("empty", False, 0, 1),
    ("size", False, 0, 1),
    ("reject", False, 0, 1),
    ("none", True, 0, 1),
    ("reject", False, 500, 1),
    ("reject", False, 0, 2),
    ("reject", True, 0, 2),
    ("reject", False, 0, 3),
    ("reject", True, 0, 3),
    ("reject", False, 0, 4),
    ("reject", False, 500, 3),
)


def configure(path: Path, policy: str, lanes: bool, delay_us: int, instances: int) -> None:
    """Write one setting into a copy's config.pbtxt; also those that the rules of this project refuse."""
    config = text_format.Parse(path.read_text("utf-8"), schema.ModelConfig())
    batching = config.dynamic_batching
    batching.ClearField("default_queue_policy")
    batching.max_queue_delay_microseconds = delay_us
    if policy == "empty":
        batching.default_queue_policy.SetInParent()
    elif policy != "none":
        batching.default_queue_policy.max_queue_size = 64
    if policy == "reject":
        batching.default_queue_policy.default_timeout_microseconds = 250_000
        batching.default_queue_policy.allow_timeout_override = True
    if lanes:
        batching.priority_levels, batching.default_priority_level = 2, 1
    config.instance_group[0].count = instances
    path.write_text(text_format.MessageToString(config), "utf-8")


def closed_loop(feed: Feed, callers: int, seconds: float) -> tuple[list[float], int]:
    """Milliseconds of every call, and how many were refused."""
    taken: list[float] = []
    refused: list[int] = []
    stop = time.monotonic() + seconds

    def ask() -> None:
        host, _, port = feed.authority.rpartition(":")
        request = message(feed, 1, 1)
        with socket.create_connection((host, int(port))) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while time.monotonic() < stop:
                start = time.perf_counter()
                wire.sendall(request)
                answer = wire.recv(65_536)
                taken.append((time.perf_counter() - start) * 1e3)
                if not answer.startswith(b"HTTP/1.1 200"):
                    refused.append(1)

    threads = [threading.Thread(target=ask) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken, len(refused)


def main() -> None:
    """Print one line for each setting and number of callers."""
    parser = options(__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--instances-from", type=int, default=1, help="only settings with so many instances or more")
    chosen = parser.parse_args()
    with told_apart(chosen.json):
        rows = measured(subject(chosen.repository, chosen.model), chosen.seconds, chosen.instances_from)
    if chosen.json:
        print(json.dumps({"rows": rows}))


def measured(model: Subject, seconds: float, fewest: int) -> list[dict[str, Any]]:
    """A row for each setting of `fewest` instances or more and number of callers, printed as it comes."""
    rows: list[dict[str, Any]] = []
    name, inputs = model.manifest.name, golden_inputs(model.folder, model.manifest)[0]
    print("policy  lanes  delay_us  instances  callers   calls  p50_ms  p99_ms  max_ms  stalls  refused")
    for setting in [row for row in SETTINGS if row[3] >= fewest]:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "models"
            shutil.copytree(model.repository / name, copy / name)
            configure(copy / name / CONFIG_NAME, *setting)
            with EmbeddedTriton(copy, FREE) as server:
                feed = Feed(server.http_url, name, inputs, 200.0)
                for callers in CALLERS:
                    taken, refused = closed_loop(feed, callers, seconds)
                    p50, p99 = np.percentile(taken, [50, 99])
                    stalls = sum(ms > STALL_MS for ms in taken)
                    policy, lanes, delay_us, instances = setting
                    print(
                        f"{policy:<7} {lanes!s:<6} {delay_us:>8} {instances:>10} {callers:>8} {len(taken):>7} "
                        f"{p50:>7.2f} {p99:>7.2f} {max(taken):>7.0f} {stalls:>7} {refused:>8}",
                        flush=True,
                    )
                    row = f"{policy}{', lanes' if lanes else ''}, {delay_us} us, x{instances}, {callers} callers"
                    told = {"calls": len(taken), "p50_ms": float(p50), "p99_ms": float(p99), "max_ms": max(taken)}
                    rows.append({"setting": row, **told, "stalls": stalls, "refused": refused})
    return rows


if __name__ == "__main__":
    main()

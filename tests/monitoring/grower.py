"""A process whose memory grows while a file is there; it serves its resident size as any process exporter does.

Run as `python grower.py <file>`; prints its port.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

if __name__ == "__main__":
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    server, _ = start_http_server(0, addr="127.0.0.1", registry=registry)
    print(server.server_address[1], flush=True)
    held: list[bytearray] = []
    while True:
        if Path(sys.argv[1]).exists() and len(held) < 400:
            held.append(bytearray(b"\1" * 1_000_000))
        time.sleep(0.05)

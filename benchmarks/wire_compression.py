"""What compression on the wire would cost: zlib at level 1 over rows of features, beside sending them as they are.

    python -m benchmarks.wire_compression [--data RECORDING ...] [--seconds 2]

The rows are float32 features of an order book, one row after the other as a request holds them: 4 kB and 1 MB. "sent"
is the time from the first byte to the peer's answer of one byte over a TCP connection on loopback; "break-even" is the
bandwidth below which packing, sending less and unpacking would be sooner. Rows that had come before are counted too:
what a cache of answers could hit.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.features import read
from benchmarks.harness import machine
from market.readers import open_source
from market.simulator import SimulatedSource
from tickserve.features.engine import FeatureEngine
from tickserve.features.spec import default_book_spec

SIZES = {"4 kB": 4_096, "1 MB": 1_048_576}
LEVEL = 1
EVENTS = 80_000


def rows(data: list[Path] | None) -> npt.NDArray[np.float32]:
    """Feature rows past the features' warm-up, [N, F], at least as many as the largest size takes."""
    spec = default_book_spec(5)
    wanted = -(-max(SIZES.values()) // (4 * len(spec.columns)))
    source = open_source(data) if data else SimulatedSource(seed=7, events=EVENTS)
    found = FeatureEngine(spec).batch(read(source, EVENTS))
    whole = found[np.isfinite(found).all(axis=1)]
    if len(whole) < wanted:
        raise SystemExit(f"--data: expected at least {wanted} rows without a hole, was {len(whole)}")
    return np.ascontiguousarray(whole, np.float32)


class Peer:
    """The other end of a connection on loopback: it reads a message of known length and answers one byte."""

    def __init__(self, length: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._near = socket.create_connection(server.getsockname())
            self._far, _ = server.accept()
        for end in (self._near, self._far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._thread = threading.Thread(target=self._answer, args=(length,), daemon=True)
        self._thread.start()

    def _answer(self, length: int) -> None:
        room = memoryview(bytearray(length))
        while True:
            read = 0
            while read < length:
                got = self._far.recv_into(room[read:])
                if not got:
                    return
                read += got
            self._far.sendall(b"\x01")

    def send(self, data: bytes) -> None:
        """Send it all and wait for the answer."""
        self._near.sendall(data)
        self._near.recv(1)

    def close(self) -> None:
        """Both ends."""
        self._near.close()
        self._thread.join(5)
        self._far.close()


def median_us(call: Callable[[], Any], seconds: float) -> float:
    """The median time of a call, over `seconds` or 20 calls."""
    taken: list[int] = []
    until = time.perf_counter() + seconds
    while len(taken) < 20 or time.perf_counter() < until:
        start = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - start)
    return float(np.median(taken)) / 1e3


def measured(name: str, data: bytes, seconds: float) -> dict[str, Any]:
    """One size: times in us, and how much smaller it gets."""
    packed = zlib.compress(data, LEVEL)
    with ExitStack() as stack:
        peer = Peer(len(data))
        stack.callback(peer.close)
        sent = median_us(lambda: peer.send(data), seconds)
    pack, unpack = (
        median_us(call, seconds) for call in (lambda: zlib.compress(data, LEVEL), lambda: zlib.decompress(packed))
    )
    saved = len(data) - len(packed)
    return {
        "size": name,
        "pack_us": pack,
        "unpack_us": unpack,
        "sent_us": sent,
        "share": len(packed) / len(data),
        # Bits saved over the time it takes to save them.
        "break_even_mbit_s": max(0.0, saved * 8 / (pack + unpack)),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", help="an order-book recording of 5 levels (default: simulated)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each of the three times of a size")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    every = rows(chosen.data)
    data = every.tobytes()
    found = [measured(name, data[:size], chosen.seconds) for name, size in SIZES.items()]
    repeated = len(every) - len({row.tobytes() for row in every})
    about = machine()
    if chosen.json:
        print(json.dumps({"machine": about, "rows": found, "feature_rows": len(every), "repeated": repeated}))
        return 0
    print(
        f"{about}\nfeature rows of {'a recording' if chosen.data else 'the simulator'}, zlib level {LEVEL}, medians\n"
    )
    print(f"{'size':<8}{'pack us':>10}{'unpack us':>11}{'sent us':>10}{'packed to':>11}{'break-even':>15}")
    for row in found:
        print(
            f"{row['size']:<8}{row['pack_us']:>10.0f}{row['unpack_us']:>11.0f}{row['sent_us']:>10.0f}"
            f"{row['share']:>11.0%}{row['break_even_mbit_s']:>9.0f} Mbit/s"
        )
    print(f"\n{repeated:,} of {len(every):,} rows had come before")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

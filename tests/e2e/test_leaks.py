"""A soak of one client of each transport and the server, errors mixed in: what it held at first it holds at the end.

The check is `settled`, and it has negative controls: clients that keep an array or a connection of each call, and a
server whose model keeps some bytes of each request, go through the same soak and fail it.
"""

from __future__ import annotations

import ctypes
import gc
import http.client
import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from serving import stubs, triton_files
from serving.embedded import EmbeddedTriton
from tests.serving.conftest import ANY_PORTS, FEATURES, STUBS, Tiny, publish_tiny
from tickserve.client import Client
from tickserve.config import ServeSettings
from tickserve.errors import RequestError

pytestmark = pytest.mark.system

TRANSPORTS = ("http", "grpc", "shm")
ROWS = np.random.default_rng(5).normal(size=(8, FEATURES)).astype(np.float32)
ROUNDS, WARM = 8, 2  # the first rounds fill pools and caches
CALLS = 2_500  # of one round; 20 000 in all
LOOKS, LOOK_S = 5, 0.01
KEPT = 4_096  # bytes of each call that the leaking ones keep
# What may be held more than after the warm rounds. The memory is 1.2 kB for each of the 5 000 calls that follow, the
# mappings are a few libraries that are loaded late.
MEMORY, DESCRIPTORS, THREADS, MAPPED = 6 * 2**20, 4, 1, 16


@dataclass(frozen=True)
class Held:
    """What a group of processes holds: bytes that it allocated, open descriptors, threads, mappings of files."""

    memory: int
    descriptors: int
    threads: int
    mapped: int

    @classmethod
    def of(cls, *pids: int) -> Held:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would hide what this one keeps
        each = [psutil.Process(pid) for pid in pids]
        looks = []
        for _ in range(LOOKS):
            # The collection held up the threads that watch this process's servers: now each opens what it looks at,
            # all at once, and closes it again. What is held is there at every look.
            looks.append(sum(one.num_fds() for one in each))
            time.sleep(LOOK_S)
        descriptors = min(looks)
        threads = sum(one.num_threads() for one in each)
        return cls(stubs.allocated_bytes(list(pids)), descriptors, threads, sum(map(mapped_files, pids)))


def mapped_files(pid: int) -> int:
    """How often this process has a file, or a part of one, in its memory."""
    return sum(line.split()[4] != "0" for line in Path(f"/proc/{pid}/maps").read_text().splitlines())


def settled(seen: list[Held]) -> list[str]:
    """What grew beyond its bound from the warm rounds to the last; nothing for a sound build."""
    first, last = seen[WARM - 1], seen[-1]
    bounds = {"memory": MEMORY, "descriptors": DESCRIPTORS, "threads": THREADS, "mapped": MAPPED}
    grown = {name: getattr(last, name) - getattr(first, name) for name in bounds}
    return [
        f"{name}: {grown[name]} more, {bound} allowed: {[getattr(each, name) for each in seen]}"
        for name, bound in bounds.items()
        if grown[name] > bound
    ]


@dataclass(frozen=True)
class Stage:
    """One server and its model."""

    server: EmbeddedTriton
    tiny: Tiny

    def client(self, transport: str) -> Client:
        url = f"grpc://{self.server.grpc_url}" if transport == "grpc" else self.server.http_url
        more: dict[str, Any] = {"transport": "shm", "credential": self.server.credential} if transport == "shm" else {}
        return Client(url, manifest=self.tiny.path, deadline_ms=5_000, **more)

    def pids(self) -> tuple[int, ...]:
        return (self.server.pid, *stubs.stubs_of(self.server.pid))


@contextmanager
def staged(folder: Path, settings: ServeSettings) -> Iterator[Stage]:
    tiny = publish_tiny(folder / "models", "tiny", 1)
    with EmbeddedTriton(folder / "models", settings, log=folder / "triton.log") as server:
        yield Stage(server, tiny)


@pytest.fixture(scope="module", params=[ANY_PORTS, STUBS], ids=["native", "python"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("soak"), request.param) as opened:
        yield opened


Call = Callable[[Client, int], None]


def one_call(client: Client, number: int) -> None:
    """A right answer; every eighth call is a mistake, of five kinds in turn."""
    mistake = number // 8 % 5 if number % 8 == 7 else None
    wrong: list[dict[str, Any]] = [
        {"inputs": np.full((1, FEATURES), np.inf, np.float32)},
        {"version": 9},
        {"deadline_ms": 0.001},
        {"model": "nobody"},
        {"inputs": np.full((1, FEATURES), 3e38, np.float32)},
    ]
    if mistake is None:
        assert client.score("tiny", ROWS[: number % 8 + 1]).ok
        return
    with pytest.raises(RequestError):
        client.score(**{"model": "tiny", "inputs": ROWS, **wrong[mistake]})


def soak(stage: Stage, transport: str, call: Call = one_call, rounds: int = ROUNDS) -> tuple[list[Held], list[Held]]:
    """What this process and the server's processes held after each round of a third of `CALLS`."""
    ours, theirs, number = [], [], 0
    with stage.client(transport) as client:
        for _ in range(rounds):
            for _ in range(CALLS // len(TRANSPORTS)):
                call(client, number)
                number += 1
            ours.append(Held.of(os.getpid()))
            theirs.append(Held.of(*stage.pids()))
    return ours, theirs


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nothing_grows_with_the_calls(stage: Stage, transport: str) -> None:
    ours, theirs = soak(stage, transport)
    assert settled(ours) == []
    assert settled(theirs) == []


def regions(stage: Stage) -> list[str]:
    """The clients' shared memory that the server still knows."""
    connection = http.client.HTTPConnection(stage.server.http_url, timeout=10)
    connection.request("GET", "/v2/systemsharedmemory/status", headers=dict([stage.server.credential]))
    known = json.loads(connection.getresponse().read())
    connection.close()
    return [each["name"] for each in known]


def test_clients_that_come_and_go_leave_nothing(stage: Stage) -> None:
    """Fifty-six of each transport, with calls from four threads, one of them a mistake."""
    seen: list[Held] = []
    theirs: list[Held] = []
    for _ in range(ROUNDS):
        for number in range(7 * len(TRANSPORTS)):
            with stage.client(TRANSPORTS[number % 3]) as client:
                callers = [threading.Thread(target=one_call, args=(client, 8 * number + n)) for n in (0, 3, 5, 7)]
                for caller in callers:
                    caller.start()
                for caller in callers:
                    caller.join()
        time.sleep(0.2)  # the server learns of a closed connection by itself
        seen.append(Held.of(os.getpid()))
        theirs.append(Held.of(*stage.pids()))
    assert settled(seen) == []
    assert settled(theirs) == []
    assert regions(stage) == []


def keeping_arrays(kept: list[Any]) -> Call:
    def call(client: Client, number: int) -> None:
        kept.append(np.ones(KEPT, np.uint8))
        one_call(client, number)

    return call


def keeping_connections(stage: Stage, kept: list[Any]) -> Call:
    def call(client: Client, number: int) -> None:
        one_call(client, number)
        if number % 50 == 0:  # a wrapper that opens a client for each burst of calls and closes none
            kept.append(stage.client("http"))
            one_call(kept[-1], number)

    return call


def keeping_mapped_files(kept: list[Any]) -> Call:
    def call(client: Client, number: int) -> None:
        one_call(client, number)
        if number % 50 == 0:
            with Path(__file__).open("rb") as file:
                kept.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))

    return call


def keeping_threads(kept: list[Any]) -> Call:
    done = threading.Event()
    kept.append(done)

    def call(client: Client, number: int) -> None:
        one_call(client, number)
        if number % 500 == 0:
            threading.Thread(target=done.wait, daemon=True).start()

    return call


@pytest.mark.parametrize("what", ["memory", "descriptors", "threads", "mapped"])
def test_a_client_that_leaks_fails_the_same_check(stage: Stage, what: str) -> None:
    """The negative control, on our side."""
    kept: list[Any] = []
    leaking = {
        "memory": keeping_arrays(kept),
        "descriptors": keeping_connections(stage, kept),
        "threads": keeping_threads(kept),
        "mapped": keeping_mapped_files(kept),
    }
    try:
        ours, _ = soak(stage, "http", leaking[what], ROUNDS if what == "memory" else ROUNDS // 2)
        assert what in {said.partition(":")[0] for said in settled(ours)}
    finally:
        for one in kept:
            getattr(one, "close", getattr(one, "set", lambda: None))()


# The real backend, except that it keeps some bytes of every request.
LEAKING = """
exec(compile(open({real!r}).read(), {real!r}, "exec"), globals())
Honest = TritonPythonModel

class TritonPythonModel(Honest):
    def execute(self, requests):
        self.__dict__.setdefault("kept", []).extend(bytearray({kept}) for _ in requests)
        return super().execute(requests)
"""


def test_a_server_that_leaks_fails_the_same_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control, on the server's side."""
    spoilt = tmp_path / "model.py"
    spoilt.write_text(LEAKING.format(real=str(triton_files.OUR_BACKEND), kept=KEPT))
    monkeypatch.setattr(triton_files, "OUR_BACKEND", spoilt)
    with staged(tmp_path, STUBS) as leaking:
        ours, theirs = soak(leaking, "http")
    assert [said.partition(":")[0] for said in settled(theirs)] == ["memory"]
    assert settled(ours) == []

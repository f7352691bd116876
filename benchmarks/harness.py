"""What the benchmarks share: a repository to measure on, contestants that take turns, the machine they ran on."""

from __future__ import annotations

import argparse
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from tickserve.client import Client, Decision, newest_versions
from tickserve.client._check import Inputs
from tickserve.client._observer import Observer
from tickserve.config import BackendKind, JournalSettings, MetricsSettings, ServeSettings
from tickserve.errors import TickserveError
from tickserve.manifest import GOLDEN_NAME, Manifest, load_manifest

Call = Callable[[], object]
Times = npt.NDArray[np.float64]
QUANTILES = (50, 90, 99, 99.9)
WARM_UP = 50
HAND_OVERS = 4_000
SPIN_NS = 200_000  # the rest of a wait is spent awake: an engine that sleeps is woken late


Feed = dict[str, npt.NDArray[np.float32]]


class Subject(NamedTuple):
    """One published model, and real rows to score: float32 [B, ...]."""

    repository: Path
    folder: Path
    manifest: Manifest
    rows: npt.NDArray[np.float32]


def options(
    doc: str | None,
    *,
    rounds: int | None = None,
    turn_s: float | None = None,
    model: str = "the first model of the repository",
) -> argparse.ArgumentParser:
    """The options that benchmarks of published models share; `rounds` for those whose contestants take turns.

    Turns are of so many seconds (`turn_s`), or of so many calls.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="published models")
    parser.add_argument("--model", help=f"default: {model}")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds)
        if turn_s is None:
            parser.add_argument("--block", type=int, default=100, help="calls a turn")
        else:
            parser.add_argument("--turn", type=float, default=turn_s, help=f"seconds a turn (default: {turn_s:g})")
    parser.add_argument("--json", action="store_true")
    return parser


def subject(repository: Path, model: str | None = None) -> Subject:
    """The chosen model of `repository`, by default its first; a quick demo makes one where there is none."""
    if not any(repository.glob("*/config.pbtxt")):
        print(f"no model in {repository}: running the quick demo first", file=sys.stderr)
        demo = [sys.executable, "-m", "tickserve.cli", "demo", "--profile", "quick", "--repository", str(repository)]
        subprocess.run(demo, check=True, stdout=subprocess.DEVNULL)
    folders = newest_versions(repository)
    folder = folders[model or next(iter(folders))]
    manifest = load_manifest(folder)
    spec = manifest.inputs[0]
    with np.load(folder / GOLDEN_NAME, allow_pickle=False) as arrays:
        return Subject(repository, folder, manifest, np.ascontiguousarray(arrays[spec.name], np.float32))


def one_row(folder: Path, manifest: Manifest) -> Feed:
    """The first golden row of the version in `folder`, by the names of the model's inputs: float32 [1, ...] each."""
    with np.load(folder / GOLDEN_NAME, allow_pickle=False) as golden:
        return {spec.name: np.ascontiguousarray(golden[spec.name][:1]) for spec in manifest.inputs}


def as_inputs(feed: Feed) -> Inputs:
    """`feed` as an engine gives it: the array where there is one input."""
    return next(iter(feed.values())) if len(feed) == 1 else feed


def told_apart(as_json: bool) -> AbstractContextManager[Any]:
    """With `as_json` what the block prints for a person goes to standard error: standard output is the JSON's alone."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


@contextmanager
def served(repository: Path, models: Sequence[str] | None = None, backend: BackendKind = "native") -> Iterator[Any]:
    """An EmbeddedTriton over `models` of `repository`, on free ports."""
    from serving.embedded import EmbeddedTriton

    ports = ServeSettings(http_port=0, grpc_port=0, metrics_port=0, backend=backend)
    with EmbeddedTriton(repository, ports, models=models) as server:
        yield server


def measure(calls: dict[str, Call], rounds: int, block: int) -> dict[str, Times]:
    """Microseconds of every call, by contestant; blocks are interleaved, their order drawn anew each round.

    A slow spell of the machine meets all of them, and nobody always follows the same neighbour and finds its caches.
    """
    names = list(calls)
    times: dict[str, list[int]] = {name: [] for name in names}
    for name in names:
        for _ in range(WARM_UP):
            calls[name]()
    order = random.Random(7)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            call, taken = calls[name], times[name]
            call()  # the first of a block finds cold caches
            for _ in range(block):
                start = time.perf_counter_ns()
                call()
                taken.append(time.perf_counter_ns() - start)
    return {name: np.array(taken) / 1e3 for name, taken in times.items()}


# What a turn left behind has ended so long after it, but for the journal's wait for the disk, once a second.
SETTLE_S = 1.5e-3 * max(JournalSettings().flush_ms, MetricsSettings().flush_ms)


def sustained(calls: dict[str, Call], rounds: int, turn_s: float, rate: float | None = None) -> dict[str, list[Times]]:
    """Microseconds of every call, by contestant and turn, where observers put work off: each turn pays for its own.

    A turn begins with calls that are not counted, until that work has begun, and ends with a silence in which it
    ends. Calls are back to back, or `rate` a second.
    """
    names = list(calls)
    times: dict[str, list[Times]] = {name: [] for name in names}
    order = random.Random(7)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            turn(calls[name], SETTLE_S, rate)
            times[name].append(turn(calls[name], turn_s, rate))
            time.sleep(SETTLE_S)
    return times


def turn(call: Call, seconds: float, rate: float | None) -> Times:
    """Microseconds of each call of about `seconds`, back to back or `rate` a second."""
    taken = list[int]()
    due = time.monotonic_ns()
    end = due + int(seconds * 1e9)
    while due < end:
        if rate is not None:
            wait_until(due)
        start = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - start)
        due = time.monotonic_ns() if rate is None else max(due + int(1e9 / rate), time.monotonic_ns())
    return np.array(taken) / 1e3


def wait_until(due_ns: int) -> None:
    """Sleep most of the way, and look at the clock for the rest."""
    remaining = due_ns - time.monotonic_ns()
    if remaining > SPIN_NS:
        time.sleep((remaining - SPIN_NS) / 1e9)
    while time.monotonic_ns() < due_ns:
        pass


class _Clocked:
    """An observer that hands on to another and keeps how long that took."""

    def __init__(self, observer: Observer) -> None:
        self._decided, self.taken, self.last = observer.decided, list[int](), list[Decision]()

    def decided(self, decision: Decision) -> None:
        """Time the hand-over."""
        start = time.perf_counter_ns()
        self._decided(decision)
        self.taken.append(time.perf_counter_ns() - start)
        self.last[:] = [decision]


def hand_overs(
    url: str, manifest: Manifest, row: npt.NDArray[np.float32], observer: Observer
) -> tuple[Times, Decision]:
    """Microseconds of each `decided` of `observer` alone, over calls back to back, and the last decision."""
    clocked = _Clocked(observer)
    with Client(url, manifest=manifest, deadline_ms=5_000, observer=clocked) as client:
        for _ in range(HAND_OVERS):
            client.score(manifest.name, row)
    return np.array(clocked.taken) / 1e3, clocked.last[0]


def joined(turns: dict[str, list[Times]]) -> dict[str, Times]:
    """All turns of each contestant as one."""
    return {name: np.concatenate(taken) for name, taken in turns.items()}


def quantiles(times: Times) -> dict[str, float]:
    """p50, p90, p99 and p99.9, in microseconds."""
    return {f"p{quantile:g}_us": float(np.percentile(times, quantile)) for quantile in QUANTILES}


PUBLISH_FIRST = " (publish a model first: make demo)"


def as_command(main: Callable[[list[str]], int], hint: str = "") -> NoReturn:
    """Run a benchmark with the command's arguments; a typed error is one line, with `hint`."""
    try:
        sys.exit(main(sys.argv[1:]))
    except TickserveError as error:
        sys.exit(f"error: {error}{hint}")


def machine(*packages: str) -> str:
    """The machine and the versions behind the numbers."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    known = ", ".join(f"{name} {version(name)}" for name in ("tickserve", "numpy", *packages))
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, {known}"

"""A paced load of golden rows on one client, every answer held against its golden number."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tickserve.client import Client
from tickserve.errors import RequestError

Rows = npt.NDArray[np.float32]


class Outcome(NamedTuple):
    """One call: when it was meant to begin and how long it took (ns, monotonic), and how it ended."""

    began_ns: int
    taken_ns: int
    deadline_ns: int
    status: str  # a signal's status, or the type of the error
    wrong: bool  # an OK signal whose numbers are not the golden ones


@dataclass
class PacedLoad:
    """`rate_hz` calls a second, from `threads` threads in turn, of one golden row each, until it is stopped."""

    client: Client
    model: str
    rows: Rows  # [N, ...]
    golden: Rows  # [N, K]
    bundle_id: int
    rate_hz: float = 200.0
    deadline_ms: float = 100.0
    threads: int = 4
    outcomes: list[Outcome] = field(default_factory=list)
    stalls: list[tuple[int, int]] = field(default_factory=list)  # (when, how late a 1 ms sleep came back), in ns

    def __enter__(self) -> PacedLoad:
        self._stop = threading.Event()
        start = time.monotonic_ns() + 10_000_000
        self._workers = [
            threading.Thread(target=self._work, args=(start, number), daemon=True) for number in range(self.threads)
        ]
        self._workers.append(threading.Thread(target=self._pulse, daemon=True))
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for worker in self._workers:
            worker.join(60)

    def _work(self, start_ns: int, number: int) -> None:
        step = int(1e9 / self.rate_hz)
        turn = number
        while not self._stop.is_set():
            due = start_ns + turn * step
            wait = (due - time.monotonic_ns()) / 1e9
            if wait > 0 and self._stop.wait(wait):
                return
            self.outcomes.append(self._call(turn % len(self.rows)))
            behind = (time.monotonic_ns() - start_ns) // step - turn
            turn += self.threads * max(1, behind // self.threads)  # a call that took long is followed by the next due

    def _pulse(self) -> None:
        """How long this machine keeps a thread waiting that only wants to run: no client is to blame for that."""
        while not self._stop.is_set():
            began = time.monotonic_ns()
            time.sleep(0.001)
            self.stalls.append((began, time.monotonic_ns() - began - 1_000_000))

    def _call(self, place: int) -> Outcome:
        began = time.monotonic_ns()
        wrong = False
        try:
            signal = self.client.score(self.model, self.rows[place : place + 1], deadline_ms=self.deadline_ms)
            status: str = signal.status
            if status == "OK":
                near = signal.probabilities is not None and np.allclose(
                    signal.probabilities, self.golden[place : place + 1], rtol=1e-4, atol=1e-5
                )
                wrong = not near or signal.bundle_id != self.bundle_id
        except RequestError as error:
            status = type(error).__name__
        return Outcome(began, time.monotonic_ns() - began, int(self.deadline_ms * 1e6), status, wrong)


@dataclass(frozen=True)
class Figures:
    """What a span of a load looked like."""

    calls: int
    statuses: dict[str, int]
    wrong: int
    p50_ms: float
    p99_ms: float
    overrun_ms: float  # the worst by which a call came back after its deadline; 0 when none did
    stall_ms: float  # the worst by which a thread that only slept came back late

    @property
    def failed(self) -> int:
        """Calls without an OK signal."""
        return self.calls - self.statuses.get("OK", 0)


def figures(load: PacedLoad, since_ns: int, until_ns: int) -> Figures:
    """Of the calls that began in [since_ns, until_ns)."""
    chosen = [outcome for outcome in load.outcomes if since_ns <= outcome.began_ns < until_ns]
    taken = np.array([outcome.taken_ns for outcome in chosen] or [0]) / 1e6
    over = max((outcome.taken_ns - outcome.deadline_ns for outcome in chosen), default=0) / 1e6
    return Figures(
        len(chosen),
        dict(Counter(outcome.status for outcome in chosen)),
        sum(outcome.wrong for outcome in chosen),
        float(np.percentile(taken, 50)),
        float(np.percentile(taken, 99)),
        max(0.0, over),
        max((late for when, late in load.stalls if since_ns <= when < until_ns), default=0) / 1e6,
    )


def until_true(condition: Callable[[], bool], timeout_s: float) -> float | None:
    """Seconds until `condition` held; None when it did not within `timeout_s`."""
    began = time.monotonic()
    while time.monotonic() - began < timeout_s:
        if condition():
            return time.monotonic() - began
        time.sleep(0.005)
    return None

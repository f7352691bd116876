"""Calls in processes of this machine: one that prepares and `workers` that train, each with a pipe to this one.

A process is started when it is first needed and kept; where it dies, only the call it was at is lost, and the next
call gets a new one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

from tickserve.errors import ComponentError
from tickserve.meter import Meter
from training.universe.engine import Lane, Say, thread_environment
from training.universe.tasks import Answer, Call, answer, told

STOP_S = 3.0


def _leave(number: int, _: FrameType | None) -> None:
    """Leave through the `finally` blocks, so that what was staged is removed."""
    sys.exit(128 + number)


def serve(connection: Connection) -> None:
    """A process's life: calls come in, lines and one answer each go out, until nobody is there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this one
    signal.signal(signal.SIGTERM, _leave)
    with suppress(EOFError, BrokenPipeError):
        while True:
            call = connection.recv()
            connection.send(answer(call, connection.send))


class Worker:
    """One process and the call it is at."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), name="tickserve-universe")
        with _environment(thread_environment(threads)):
            self._process.start()
        theirs.close()
        self.call: Call | None = None

    def start(self, call: Call) -> None:
        """Send a call. Of a process that has gone, `take` says so."""
        self.call = call
        with suppress(BrokenPipeError):
            self.connection.send(call)

    def take(self, say: Say) -> Answer | None:
        """The answer, where it is there; lines are passed on. A process that died is an answer too."""
        try:
            while self.connection.poll():
                given = self.connection.recv()
                if isinstance(given, Answer):
                    return given
                say(given)
        except (EOFError, ConnectionResetError):
            self._process.join()
            return Answer(0.0, error=told(_died(self._process.exitcode)))
        return None

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.is_alive()

    def stop(self) -> None:
        """End the process, gently at first."""
        self.connection.close()
        self._process.terminate()
        self._process.join(STOP_S)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._process.close()


def _died(exitcode: int | None) -> ComponentError:
    was = f"signal {-exitcode}" if exitcode is not None and exitcode < 0 else f"exit code {exitcode}"
    hint = "signal 9 is what a machine out of memory sends" if exitcode == -signal.SIGKILL else None
    return ComponentError("the process ended in the middle of its work", expected="an answer", was=was, hint=hint)


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Variables that a process started in the block inherits."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


class LocalEngine:
    """The engine of one machine."""

    def __init__(self, lanes: dict[Lane, int], threads: int, meter: Meter, say: Say) -> None:
        self.lanes = lanes
        self._threads, self._meter, self._say = threads, meter, say
        self._workers: dict[Lane, list[Worker]] = {"prepare": [], "train": []}

    def start(self, lane: Lane, call: Call) -> None:
        """Give the call to an idle process of the lane, or to a new one."""
        idle = [worker for worker in self._workers[lane] if worker.call is None]
        if not idle:
            idle = [Worker(self._threads)]
            self._workers[lane] += idle
        idle[0].start(call)

    def busy(self, lane: Lane) -> list[Call]:
        """The calls that are running."""
        return [worker.call for worker in self._workers[lane] if worker.call is not None]

    def finished(self, timeout_s: float) -> list[tuple[Lane, Call, Answer]]:
        """What was answered; waits for something to come in."""
        atwork: list[Any] = [each.connection for _, each in self._each() if each.call is not None]
        wait(atwork, timeout_s)
        found = []
        for lane, worker in self._each():
            answered = worker.take(self._say) if worker.call is not None else None
            if answered is not None and worker.call is not None:
                found.append((lane, worker.call, answered))
                worker.call = None
                if not worker.alive:
                    self._remove(lane, worker)
        return found

    def _each(self) -> list[tuple[Lane, Worker]]:
        return [(lane, worker) for lane, workers in self._workers.items() for worker in workers]

    def memory_mb(self) -> float:
        """What this process and all its children take."""
        return self._meter.memory_mb()

    def spare(self) -> bool:
        """End idle processes."""
        idle = [(lane, worker) for lane, worker in self._each() if worker.call is None]
        for lane, worker in idle:
            self._remove(lane, worker)
        return bool(idle)

    def stop(self, lane: Lane, call: Call) -> None:
        """End the process that is at `call`."""
        for worker in [each for each in self._workers[lane] if each.call is call]:
            self._remove(lane, worker)

    def _remove(self, lane: Lane, worker: Worker) -> None:
        self._workers[lane].remove(worker)
        worker.stop()

    def close(self) -> None:
        """End all processes."""
        for lane, worker in self._each():
            self._remove(lane, worker)

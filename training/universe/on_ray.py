"""Calls as tasks of a Ray cluster: the same calls, on whichever machine has a free processor.

Files are not sent: the data, `features.store`, `universe.folder` and the code have to be at the same paths on every
machine (a shared volume, one image). Ray looks after machines and processes that die: a task is tried twice.
"""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from market.build import code_version
from tickserve.errors import ComponentError
from tickserve.stages import checkout_root
from training.universe.engine import Lane, Say, thread_environment
from training.universe.tasks import Answer, Call, answer, told

# Ray's own switch for reporting usage to its makers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
RETRIES = 1
CONNECT_S = 5.0


def perform(call: Call, code: str) -> tuple[Answer, list[str]]:
    """Run a call on a machine of the cluster; the answer and the lines it said."""
    said: list[str] = []
    if code_version() != code:
        error = ComponentError("another version of the code on a machine of the cluster", expected=code)
        return Answer(0.0, error=told(error)), said
    return answer(call, said.append), said


@dataclass(frozen=True)
class _Running:
    lane: Lane
    call: Call


class RayEngine:
    """The engine of a cluster, or of a Ray of the run's own where no address is given.

    Raises ComponentError when no cluster answers at the address.
    """

    def __init__(self, address: str, workers: int, threads: int, say: Say) -> None:
        self.lanes: dict[Lane, int] = {"prepare": workers, "train": workers}
        self._say, self._threads, self._code = say, threads, code_version()
        self._running: dict[Any, _Running] = {}
        _connect(address, workers * threads + 1, threads)
        _refuse_too_small(threads)
        self._perform = ray.remote(perform)

    def start(self, lane: Lane, call: Call) -> None:
        """Hand the call to Ray."""
        cpus = self._threads if lane == "train" else 1
        task = self._perform.options(num_cpus=cpus, max_retries=RETRIES, name=f"{lane} {call.subject}")
        self._running[task.remote(call, self._code)] = _Running(lane, call)

    def busy(self, lane: Lane) -> list[Call]:
        """The calls that Ray has, running or waiting for a processor."""
        return [each.call for each in self._running.values() if each.lane == lane]

    def finished(self, timeout_s: float) -> list[tuple[Lane, Call, Answer]]:
        """What was answered; waits for one."""
        if not self._running:
            return []
        done, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        return [(at.lane, at.call, self._got(reference)) for reference in done for at in [self._running.pop(reference)]]

    def _got(self, reference: Any) -> Answer:
        try:
            answered: Answer
            answered, said = ray.get(reference)
        except ray.exceptions.RayError as error:
            met = ComponentError("Ray lost the task", expected="an answer", was=type(error).__name__)
            return Answer(0.0, error=told(met))
        for line in said:
            self._say(line)
        return answered

    def memory_mb(self) -> None:
        """Unknown: the machines are others. Ray ends tasks of a machine that runs out."""
        return

    def spare(self) -> bool:
        """Nothing: Ray keeps its processes."""
        return False

    def stop(self, lane: Lane, call: Call) -> None:
        """End the task of `call`."""
        for reference in [ref for ref, at in self._running.items() if at == _Running(lane, call)]:
            ray.cancel(reference, force=True)
            del self._running[reference]

    def close(self) -> None:
        """Leave the cluster, which ends the tasks of this run; a Ray of the run's own is ended."""
        ray.shutdown()


def _refuse_too_small(threads: int) -> None:
    """Ray would wait for a bigger machine for ever."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    largest = max((node["Resources"].get("CPU", 0) for node in nodes if node["Alive"]), default=0)
    if largest < threads:
        ray.shutdown()
        raise ComponentError(
            "no machine of the cluster is big enough",
            field="universe.workers",
            expected=f"one with {threads} processors",
            was=f"{largest:g}",
            hint="more workers share the threads out, or lower gbdt.threads",
        )


def _connect(address: str, cpus: int, threads: int) -> None:
    """Join the cluster, or start one here. Ray's handler of SIGTERM does not stay."""
    environment = {"PYTHONPATH": str(checkout_root()), **thread_environment(threads)}
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": environment},
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    if not address:
        options |= {"num_cpus": cpus, "include_dashboard": False}
    else:
        _refuse_silent(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise _no_cluster(reason) from error
    finally:
        signal.signal(signal.SIGTERM, handler)


def _refuse_silent(address: str) -> None:
    """Ask the port first: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto", or a name that Ray knows
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(f"{address}: {error}") from error


def _no_cluster(reason: str) -> ComponentError:
    return ComponentError(
        f"no Ray cluster answers: {reason}",
        field="universe.ray_address",
        hint="start one with 'ray start --head', or leave the key empty for one of the run's own",
    )

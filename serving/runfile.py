"""How a command finds the server that `tickserve serve` runs: a file in this user's runtime folder, for no one else.

It holds the server's addresses and the credential of its closed APIs, so its mode is 0600 and its folder's 0700. It is
removed when the server stops; one that a killed server left behind names a process that is gone, and is removed too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.folders import runtime_folder
from serving.folders import started_ticks as started_ticks
from serving.target import Target
from tickserve.errors import ComponentError, UsageError
from tickserve.runfile import FILE_MODE, same_server
from tickserve.signing import TrustedKeys
from tickserve.store import unwritable


@dataclass(frozen=True)
class Run:
    """One running `tickserve serve`: `pid` is the command's process, `server_pid` Triton's.

    `trusted` are the public keys it was started with, by id, in hex.
    """

    pid: int
    server_pid: int
    http: str
    grpc: str | None
    metrics: str
    credential: tuple[str, str]
    repository: str
    view: str
    started: int
    trusted: dict[str, str] | None = None

    @property
    def keys(self) -> TrustedKeys | None:
        """`trusted` as keys."""
        return None if self.trusted is None else {key: bytes.fromhex(raw) for key, raw in self.trusted.items()}


def write(run: Run) -> Path:
    """Write the file of this process. Raises ComponentError when the folder cannot be written."""
    path = runtime_folder() / f"{run.pid}.json"
    try:
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        with os.fdopen(descriptor, "w") as file:
            json.dump(vars(run), file)
    except OSError as error:
        raise unwritable(path, error) from error
    return path


@contextmanager
def announced(target: Target, metrics_url: str) -> Iterator[Path]:
    """Hold this process's file, for the server `target`, while the block runs. Raises ComponentError."""
    assert target.pid is not None and target.view is not None and target.credential is not None  # noqa: S101, PT018
    path = write(
        Run(
            pid=os.getpid(),
            server_pid=target.pid,
            http=target.http_url,
            grpc=target.grpc_url,
            metrics=metrics_url,
            credential=target.credential,
            repository=str(target.repository.resolve()),
            view=str(target.view),
            started=started_ticks(os.getpid()),
            trusted=None if target.trusted is None else {key: raw.hex() for key, raw in target.trusted.items()},
        )
    )
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def running() -> list[Run]:
    """The servers of this user that run, oldest first; files that a killed one left are removed."""
    found = []
    for path in runtime_folder().glob("*.json"):
        run = _read(path)
        if run is not None and started_ticks(run.pid) == run.started != 0:
            found.append(run)
        else:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda run: run.started)


def serving(repository: Path) -> list[Run]:
    """The servers of this user that serve the models of this folder, oldest first."""
    return [run for run in running() if Path(run.repository) == repository.resolve()]


def only(pid: int | None = None) -> Run:
    """The one server that runs, or that of process `pid`. Raises ComponentError and UsageError."""
    runs = running()
    if pid is not None:
        runs = [run for run in runs if run.pid == pid]
    if not runs:
        if pid is not None and running():
            raise ComponentError("no server of this user with that process id", field="--pid", was=str(pid))
        raise ComponentError("no server of this user runs here", hint="tickserve serve, or name one with --url")
    if len(runs) > 1:
        listed = ", ".join(f"{run.pid} ({Path(run.repository).name}, http {run.http})" for run in runs)
        raise UsageError("several servers run", field="--pid", expected="the process id of one", was=listed)
    return runs[0]


def at(http_url: str) -> Run | None:
    """The server that runs here and answers HTTP at this address ("host:port"), by whatever name of this machine's."""
    return next((run for run in running() if same_server(run.http, http_url)), None)


def _read(path: Path) -> Run | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text("utf-8"))
        name, secret = value.pop("credential")
        return Run(credential=(str(name), str(secret)), **value)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None

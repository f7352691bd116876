"""Running another program as a child that never outlives this process."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

STOP_S = 10.0


@dataclass(frozen=True)
class Ended:
    """How a child ended; `output` is what it wrote to its standard output where that was caught."""

    exit_code: int
    output: str


def run_child(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    pass_fds: Sequence[int] = (),
) -> Ended:
    """Run `command` to its end, with this process's input.

    A child ended by a signal has 128 and the signal's number as exit code. `stdout` and `stderr` are as for
    `subprocess.Popen`. When this process is told to end, so is the child.
    """
    process = subprocess.Popen(
        command, env=environment, stdout=stdout, stderr=stderr, pass_fds=pass_fds, text=True, encoding="utf-8"
    )
    try:
        output, _ = process.communicate()
    except KeyboardInterrupt:  # the terminal has sent it to the child too: what that still has to say is waited for
        output, _ = _ended_alike(process)
    finally:
        end(process)
    code = process.returncode
    return Ended(128 - code if code < 0 else code, output or "")


def _ended_alike(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=STOP_S)
    except subprocess.TimeoutExpired as error:
        raise KeyboardInterrupt from error


def end(process: subprocess.Popen[Any], patience_s: float = STOP_S) -> None:
    """Ask a process to end, and end it if it has not after `patience_s` seconds."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

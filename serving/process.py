"""One tritonserver process: started in a session of its own, gone when this process is, and nothing left behind it.

A thread keeps watch over the process for as long as it runs. Linux sends the parent-death signal when the *thread* that
started a child ends, so the process is started from that thread and not from whichever one called `start`; and when
the server ends, for whatever reason, the same thread ends the stubs and removes their shared memory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tickserve.errors import ServerStartError

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lives; nothing is written here
KILL_WAIT_S = 5.0
# This build reads JSON by recursion: a body of 100,000 nested lists overruns the usual 8 MB stack and kills the server.
# Reserved per thread, used only when something recurses into it. A deeper body still kills it: one more reason for it
# to stay on loopback.
STACK_BYTES = 64 * 1024 * 1024
# Runs in the child, before it becomes the server: preexec_fn would do the same, but may deadlock beside threads.
# PR_SET_PDEATHSIG is 1; the signal survives the exec. A parent that is gone already can no longer die.
LAUNCH = (
    "import ctypes, os, resource, sys\n"
    "soft, hard = resource.getrlimit(resource.RLIMIT_STACK)\n"
    f"wanted = {STACK_BYTES} if hard == resource.RLIM_INFINITY else min({STACK_BYTES}, hard)\n"
    "resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))\n"
    f"ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)})\n"
    "if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])\n"
)


class ServerProcess:
    """A server that runs from `start` to `stop`.

    `shm_prefix` names the shared memory that belongs to it and is removed with it. `folder` is where it runs: an empty
    one, because its Python processes import from there before anywhere else.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], log: Path, shm_prefix: str, folder: Path
    ) -> None:
        self._log, self._shm_prefix, self._runs_in = log.absolute(), shm_prefix, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._started, self._ended = threading.Event(), threading.Event()
        self._failure: OSError | None = None
        # A daemon: an interpreter that exits without stop() must not wait here; the death signal ends the server then.
        self._keeper = threading.Thread(target=self._keep, args=(command, env), name="triton-keeper", daemon=True)
        self._wanted = False

    def start(self) -> None:
        """Start it; whatever this raises (Ctrl-C too), `stop` ends what was started. Raises ServerStartError."""
        self._wanted = True
        self._keeper.start()
        self._started.wait()
        if self._process is None:
            raise ServerStartError(f"cannot start the server: {self._failure}") from self._failure

    @property
    def pid(self) -> int:
        """Process id of the server, which also leads its process group."""
        assert self._process is not None  # noqa: S101 - held by `start`
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server is still there."""
        return not self._ended.is_set()

    @property
    def exit_code(self) -> int | None:
        """How it ended (minus the signal's number when killed); None while it runs."""
        return self._process.returncode if self._process and self._ended.is_set() else None

    def wait(self, timeout_s: float) -> bool:
        """Wait for the server's end; False when it still runs."""
        return self._ended.wait(timeout_s)

    def stop(self, timeout_s: float) -> None:
        """Ask the server to end, then end its process group. Returns when every process of it is gone."""
        if self._wanted:
            self._started.wait(KILL_WAIT_S)
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            if self.running:
                os.kill(self.pid, signal.SIGTERM)
        if not self._ended.wait(timeout_s):
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._ended.wait(KILL_WAIT_S)
        self._keeper.join(KILL_WAIT_S)

    def _keep(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCH, str(os.getpid()), *command]
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    launcher,
                    env=dict(env),
                    cwd=self._runs_in,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            self._failure = error
            return
        finally:
            self._started.set()
        pid = self._process.pid
        # Not reaped yet: until then the group's id cannot be another's, and killing the group hits stubs only.
        # Unless the program reaps its children wholesale: then the server is gone, and how it ended is not known.
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        self._process.wait()
        remove_shared_memory(self._shm_prefix)
        self._ended.set()


def remove_shared_memory(prefix: str) -> None:
    """Remove what a killed server left in shared memory."""
    for path in SHARED_MEMORY.glob(f"{prefix}*"):
        path.unlink(missing_ok=True)

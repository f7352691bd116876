"""Starts the process that scores a model anew when it was killed, crashed, was stopped, or answers nothing any more.

Triton does none of that: it goes on calling such a version ready, and each request to it ends with an error after a
second, or never. Only the version whose process is gone is loaded again; the others serve on. One line in the log.
"""

from __future__ import annotations

import http.client
import logging
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from serving import stubs, view
from serving.golden import check_golden
from serving.loading import Loader
from serving.target import Target
from tickserve.errors import TickserveError

POLL_S = 0.25
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0
# A version that could not be brought back so often in a row is reported as a problem of the server.
TRIES = 3
METRIC = re.compile(
    r'nv_inference_(request_success|request_failure|pending_request_count)\{[^}]*model="([^"]+)"[^}]*version="(\d+)"[^}]*\}'
    r" ([0-9.e+]+)"
)
log = logging.getLogger("tickserve.serve")

Served = tuple[str, int]


class Supervisor:
    """Watches the stubs of one server from a thread of its own, from `start` to `stop`.

    With the native backend there are none (`has_processes` False); a version that hangs is then the server's problem.
    """

    def __init__(
        self,
        target: Target,
        models: Iterable[str],
        metrics_url: str,
        hang_s: float,
        timeout_s: float,
        *,
        has_processes: bool = True,
    ) -> None:
        self._target, self._models, self._metrics_url = target, list(models), metrics_url
        self._hang_s, self._timeout_s, self._has_processes = hang_s, timeout_s, has_processes
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="triton-supervisor", daemon=True)
        self._suspects: dict[Served, int] = {}
        self._failures: dict[Served, tuple[int, float, str]] = {}
        self._progress: dict[Served, tuple[float, float]] = {}
        self._hanging: dict[Served, str] = {}
        self.revived: list[Served] = []

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End watching; returns when nothing is being loaded any more."""
        self._stopped.set()
        self._thread.join(self._timeout_s)

    @property
    def problem(self) -> str | None:
        """The version that does not come back, in words; None when all is well."""
        for (model, version), (count, _, reason) in list(self._failures.items()):
            if count >= TRIES:
                return f"model {model!r} version {version} does not come back: {reason}"
        for (model, version), reason in [] if self._has_processes else list(self._hanging.items()):
            return f"model {model!r} version {version} {reason}"
        return None

    def _watch(self) -> None:
        checked = time.monotonic()
        while not self._stopped.wait(POLL_S):
            with suppress(OSError, ValueError, http.client.HTTPException):
                if self._hang_s and time.monotonic() - checked >= 1:
                    checked, self._hanging = time.monotonic(), self._hung()
                if self._has_processes:
                    self._look()

    def _look(self) -> None:
        assert self._target.view is not None and self._target.pid is not None  # noqa: S101, PT018 - an embedded server
        living = list(stubs.stubs_of(self._target.pid).values())
        for model in self._models:
            folder = self._target.view / model
            for version in view.shown(folder):
                mine = [stub for stub in living if (stub.model, stub.version) == (model, version)]
                reason = self._hanging.get((model, version)) or _ailment(mine, view.instances(folder))
                self._suspect((model, version), reason, mine)

    def _suspect(self, served: Served, reason: str | None, mine: list[stubs.Stub]) -> None:
        """Twice the same finding in a row, or it may be a load that is under way."""
        seen = self._suspects[served] = 0 if reason is None else self._suspects.get(served, 0) + 1
        count, since, _ = self._failures.get(served, (0, 0.0, ""))
        wait = 0.0 if not count else min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**count)
        if reason is None or seen < 2 or time.monotonic() - since < wait:
            return
        try:
            with self._target.locked(served[0]):
                self._revive(served, reason, mine)
        except TickserveError as error:
            if "under way" not in str(error):  # a swap: it looks after the version itself
                self._failures[served] = (count + 1, time.monotonic(), str(error))
        else:
            self._failures.pop(served, None)

    def _revive(self, served: Served, reason: str, mine: list[stubs.Stub]) -> None:
        model, version = served
        if version not in view.shown(self._folder(model)) or self._stopped.is_set():
            return
        began = time.monotonic()
        for stub in mine:
            # Triton waits for a stub it has to end; one that is stopped or hangs never does.
            with suppress(ProcessLookupError):
                os.kill(stub.pid, signal.SIGKILL)
        Loader(self._target, model, self._timeout_s).reload(version)
        path = self._folder(model) / str(version)
        check_golden(self._target.http_url, model, version, path, headers=self._target.control.headers)
        self._suspects[served] = 0
        self._progress.pop(served, None)
        self._hanging.pop(served, None)
        self.revived.append(served)
        log.warning(
            "model %r version %d %s; it serves again after %.1f s", model, version, reason, time.monotonic() - began
        )

    def _folder(self, model: str) -> Path:
        assert self._target.view is not None  # noqa: S101 - an embedded server
        return self._target.view / model

    def _hung(self) -> dict[Served, str]:
        """The versions for which requests have been waiting for `hang_s` while none ended."""
        now, found = time.monotonic(), {}
        for served, (ended, waiting) in self._requests().items():
            before, since = self._progress.get(served, (-1.0, now))
            if ended != before or not waiting:
                before, since = ended, now
            self._progress[served] = (before, since)
            if now - since >= self._hang_s:
                found[served] = f"answered nothing for {self._hang_s:g} s while requests waited"
        return found

    def _requests(self) -> dict[Served, tuple[float, float]]:
        """For each version how many requests have ended, and how many wait."""
        with urllib.request.urlopen(self._metrics_url, timeout=5) as answer:  # noqa: S310 - our own server's http address
            text = answer.read().decode("utf-8", "replace")
        counts: dict[Served, tuple[float, float]] = {}
        for kind, model, version, value in METRIC.findall(text):
            ended, waiting = counts.get((model, int(version)), (0.0, 0.0))
            if kind == "pending_request_count":
                waiting += float(value)
            else:
                ended += float(value)
            counts[model, int(version)] = (ended, waiting)
        return counts


def _ailment(mine: list[stubs.Stub], wanted: int) -> str | None:
    """What is wrong with the stubs of one version; None when all of them live."""
    if any(stub.stopped for stub in mine):
        return "was stopped"
    return "lost its process" if len(mine) < wanted else None

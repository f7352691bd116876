"""What monitoring asks of a model's signals: the action file, watched from a thread, looked up by a call.

A call reads what is known in memory. The thread alone touches the file, so that a file system that hangs costs no call
anything: what is known then grows old, and a call sees that by the clock that never jumps.

Unknown is what no fresh and whole file says: missing, damaged, older than `max_age_s`, from the future, or silent about
the model. The last action known then holds (what asked for caution may have been right), every signal says
`drift_unknown`, and `on_unknown="flat"` takes no position instead.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tickserve.client._arguments import shown
from tickserve.client._fork import renew_after_fork
from tickserve.client._report import REPORTER
from tickserve.errors import TickserveError, UsageError
from tickserve.risk import ACTIONS, Action, ActionFile, ModelAction, read_actions

DRIFT, UNKNOWN, SIZE = "drift", "drift_unknown", "size_factor"
AHEAD_NS = 5_000_000_000  # clocks of two machines may differ so much; what is further ahead is from the future
NS_PER_S = 1_000_000_000
LATEST_S = 86_400.0
Mark = tuple[int, int, int]


@dataclass(frozen=True)
class RiskActions:
    """Which action file a client obeys, and how. Raises UsageError.

    - `max_age_s`: a file written longer ago is no news; three times what the exporter needs to write it again.
    - `on_unknown`: `"keep"` the last action known, or `"flat"`; each such signal carries the flag `drift_unknown`.
    - `look_ms`: how often the file is looked at.
    """

    path: str | os.PathLike[str]
    max_age_s: float = 60.0
    on_unknown: Literal["keep", "flat"] = "keep"
    look_ms: float = 100.0

    def __post_init__(self) -> None:
        for name, value, most in (("max_age_s", self.max_age_s, LATEST_S), ("look_ms", self.look_ms, LATEST_S)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise UsageError("not a time", field=name, expected=f"above 0, at most {most:g}", was=shown(value))
        if self.on_unknown not in ("keep", "flat"):
            raise UsageError("unknown", field="on_unknown", expected="'keep' or 'flat'", was=shown(self.on_unknown))
        if not isinstance(self.path, str | os.PathLike) or not Path(self.path).parent.is_dir():
            raise UsageError("no such folder", field="risk_actions", expected="a file in a folder that is there")


class Risk(NamedTuple):
    """What a call does about one model: `factor` goes into the signal, and `flags` with it."""

    action: Action
    factor: float
    flags: tuple[str, ...]
    reason: str


def risk_of(asked: ModelAction, *, known: bool = True, least: Action = "none") -> Risk | None:
    """The action as a call obeys it, at `least` so much; None: nothing is asked."""
    flags: tuple[str, ...] = () if known else (UNKNOWN,)
    if "flat" in (asked.action, least):
        if asked.action == "flat":
            return Risk("flat", 0.0, (DRIFT, *flags), asked.reason)
        return Risk("flat", 0.0, flags, f"unknown: {asked.reason or 'no fresh action file'}")
    if asked.action == "none":
        return None if known else Risk("none", 1.0, flags, asked.reason)
    if asked.action == "label":
        return Risk("label", 1.0, (DRIFT, *flags), asked.reason)
    return Risk("shrink", asked.factor, (DRIFT, f"{SIZE}:{asked.factor:g}", *flags), asked.reason)


def without_risk(flags: tuple[str, ...]) -> tuple[str, ...]:
    """Flags of an earlier signal without what was asked of that one."""
    return tuple([flag for flag in flags if flag.partition(":")[0] not in (DRIFT, UNKNOWN, SIZE)])


def choose_risk(given: object) -> RiskWatch | None:
    """The watch that a client's argument names: a path, `RiskActions` or None. Raises UsageError."""
    if given is None:
        return None
    if isinstance(given, str | os.PathLike):
        given = RiskActions(given)
    if not isinstance(given, RiskActions):
        raise UsageError("not an action file", field="risk_actions", expected="a path or RiskActions", was=shown(given))
    return RiskWatch(given)


class RiskWatch:
    """The file, looked at every `look_ms` by a thread. Safe for threads; a forked child looks for itself."""

    def __init__(self, settings: RiskActions) -> None:
        self._path, self._settings = Path(settings.path), settings
        self._max_age_ns = int(settings.max_age_s * NS_PER_S)
        self._mark: Mark | None = None
        self._asked: dict[str, ModelAction] = {}  # the last known of each model
        self._written_ns = self._fresh_until_ns = 0
        self._problem = ""
        self._known: Mapping[str, Risk | None] = {}
        self._unknown: Mapping[str, Risk | None] = {}
        self._otherwise = self._doubt(ModelAction(reason="nothing is known of this model"))
        self._closed = threading.Event()
        self.look()
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """The parent's thread is not here: the next call starts one."""
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def of(self, model: str, now_ns: int) -> Risk | None:
        """What is asked of `model`'s signals at `now_ns` of the monotonic clock; None: nothing."""
        if self._thread is None:
            self._start()
        table = self._known if now_ns < self._fresh_until_ns else self._unknown
        return table.get(model, self._otherwise)

    def close(self) -> None:
        """Stop looking; idempotent."""
        self._closed.set()

    def look(self) -> None:
        """Take what the file says by now. What cannot be trusted is told once, and what is known holds."""
        try:
            found = self._path.stat()
            mark = (found.st_mtime_ns, found.st_ino, found.st_size)
            if mark == self._mark:
                return
            told = read_actions(self._path)
            self._mark = mark
        except (TickserveError, OSError) as error:
            self._mark, self._fresh_until_ns = None, 0
            self._doubted(str(error) if isinstance(error, TickserveError) else f"{error.strerror}: {self._path.name}")
            return
        self._take(told)

    def _take(self, told: ActionFile) -> None:
        age_ns = time.time_ns() - told.written_ns
        if age_ns < -AHEAD_NS or told.written_ns < self._written_ns:
            self._fresh_until_ns = 0
            self._doubted("the action file is from the future" if age_ns < 0 else "the action file is an older one")
            return
        asked_now = {model: self._asked_of(model, asked) for model, asked in told.models.items()}
        for model, asked in asked_now.items():
            self._tell_change(model, asked)
        self._written_ns, self._asked = told.written_ns, {**self._asked, **asked_now}
        self._known = {
            model: risk_of(asked) if model in asked_now and told.models[model].measured else self._doubt(asked)
            for model, asked in self._asked.items()
        }
        self._unknown = {model: self._doubt(asked) for model, asked in self._asked.items()}
        fresh_ns = self._max_age_ns - max(0, age_ns)
        self._fresh_until_ns = time.monotonic_ns() + fresh_ns if fresh_ns > 0 else 0
        if fresh_ns > 0:
            self._problem = ""
        else:
            self._doubted("the action file is too old")

    def _asked_of(self, model: str, asked: ModelAction) -> ModelAction:
        """What holds for a model: who has not measured it yet lifts no action, but of another bundle or by a person."""
        before = self._asked.get(model)
        if (
            before is None
            or asked.measured
            or _is_another(asked, before)
            or ACTIONS.index(asked.action) >= ACTIONS.index(before.action)
        ):
            return asked
        return before

    def _doubt(self, asked: ModelAction) -> Risk | None:
        return risk_of(asked, known=False, least="flat" if self._settings.on_unknown == "flat" else "none")

    def _doubted(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            REPORTER.say(logging.WARNING, f"drift is unknown: {problem}; the last action known holds")

    def _tell_change(self, model: str, asked: ModelAction) -> None:
        before = self._asked.get(model, ModelAction()).action
        if asked.action != before:
            worse = ACTIONS.index(asked.action) > ACTIONS.index(before)
            level = logging.WARNING if worse else logging.INFO
            REPORTER.say(level, f"model {model!r}: drift action {before} -> {asked.action}: {asked.reason}")

    def _start(self) -> None:
        if self._closed.is_set() or not self._starting.acquire(blocking=False):
            return
        try:
            if self._thread is None:
                arguments = (weakref.ref(self), self._closed, self._settings.look_ms / 1e3)
                thread = threading.Thread(target=_watch, args=arguments, name="tickserve-risk", daemon=True)
                thread.start()
                self._thread = thread
        except RuntimeError:  # no thread to be had: a later call tries again, and what is known grows old
            pass
        finally:
            self._starting.release()


def _is_another(asked: ModelAction, before: ModelAction) -> bool:
    """Whether this is about another bundle than before, or a person has lifted what was asked then."""
    known = asked.bundle_digest and before.bundle_digest
    return asked.cleared_ns > before.cleared_ns or bool(known and asked.bundle_digest != before.bundle_digest)


def _watch(watched: weakref.ref[RiskWatch], closed: threading.Event, every_s: float) -> None:
    """Look until the watch is closed or gone: a client that nobody closed must not keep a thread."""
    while not closed.wait(every_s):
        watch = watched()
        if watch is None:
            return
        watch.look()
        del watch

"""Keeping an idle client warm: while no call is made, a thread makes calls that decide nothing (_warm.py).

Connections, the server's threads, caches and clocks go cold within milliseconds of idling. The thread sends one call at
a time and stops where a call of the engine's begins; it leaves alone who is believed down, and says nothing. It holds
its client only while it works, so a client that is dropped ends it.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Sequence
from time import monotonic_ns
from typing import Any, Generic, TypeVar
from weakref import WeakSet, ref

from tickserve.client._arguments import positive_ms, shown
from tickserve.client._backoff import Backoff
from tickserve.client._core import Core
from tickserve.client._fork import pause_at_fork, renew_after_fork
from tickserve.client._transport import InferRequest, Transport
from tickserve.client._warm import Place, places
from tickserve.errors import UsageError

T = TypeVar("T")

NS_PER_MS = 1_000_000
LEAST_MS = 1.0
# After a round that took so long there is a rest of nine times that: a warm call is under way for at most a tenth of
# the time, so that a slow model, or a slow server, is not held up by calls that nobody asked for.
RESTS = 9
FIRST_BACKOFF_NS, MAX_BACKOFF_NS = 100 * NS_PER_MS, 10_000 * NS_PER_MS
END_S = 1.0


class _Trouble:
    """One replica's: until when it is left alone."""

    def __init__(self) -> None:
        self.backoff, self.until_ns = Backoff(FIRST_BACKOFF_NS, MAX_BACKOFF_NS), 0


class Schedule(Generic[T]):
    """When which replica is asked for which model. No input or output: the thread and the event loop share it.

    Raises UsageError for what is no span of time.
    """

    def __init__(self, core: Core, everywhere: Sequence[Place[T]], keep_warm_ms: float) -> None:
        every_ms = positive_ms("keep_warm_ms", keep_warm_ms, UsageError)
        if every_ms < LEAST_MS:
            expected = f"milliseconds from {LEAST_MS:g}"
            raise UsageError("too often", field="keep_warm_ms", expected=expected, was=shown(keep_warm_ms))
        self.core, self.places = core, everywhere
        self._every_ns = int(every_ms * NS_PER_MS)
        self._models: dict[str, None] = {}  # those that were called
        self._turns = 0
        self._called_ns = self._warmed_ns = self._rested_ns = monotonic_ns()
        self._trouble = {place.name: _Trouble() for place in everywhere}

    def called(self, model: str, now_ns: int) -> None:
        """The engine calls `model`."""
        self._called_ns = now_ns
        self._models[model] = None

    def left_s(self) -> float:
        """Seconds until a round is due; 0 when it is."""
        due_ns = max(max(self._called_ns, self._warmed_ns) + self._every_ns, self._rested_ns)
        return max(0, due_ns - monotonic_ns()) / 1e9

    def begin(self) -> tuple[str | None, int]:
        """The model of a round that begins now, in turn one of those the engine calls; None: no model is pinned."""
        models = list(self._models) or list(self.core.manifests)
        self._turns += 1
        return (models[self._turns % len(models)] if models else None), monotonic_ns()

    def wants(self, place: Place[T], began_ns: int) -> bool:
        """Whether a round that began at `began_ns` asks `place`: no call came meanwhile, and it is believed alive."""
        alive = place.breaker is None or place.breaker.closed
        return alive and self._called_ns < began_ns and monotonic_ns() >= self._trouble[place.name].until_ns

    def prepare(self, model: str) -> tuple[Any, InferRequest, int]:
        """A pin, its request, its deadline. Raises RequestError."""
        self.core.look_aside()
        pinned, request = self.core.rehearse(model)
        return pinned, request, monotonic_ns() + 1_000 * request.timeout_us

    def told(self, place: Place[T], good: bool) -> None:
        """Who failed is left alone, for longer each time. No breaker hears of it, and no log."""
        trouble = self._trouble[place.name]
        if good:
            trouble.backoff.reset()
        else:
            trouble.until_ns = monotonic_ns() + trouble.backoff.next_ns()

    def end(self, began_ns: int) -> None:
        """A round is over."""
        self._warmed_ns = now = monotonic_ns()
        self._rested_ns = now + RESTS * (now - began_ns)


class Keeper(Schedule[Transport]):
    """Keeps a `Client` warm, from a daemon thread that a forked child starts anew with its first call."""

    def __init__(self, core: Core, carrier: Transport, keep_warm_ms: float) -> None:
        super().__init__(core, places(carrier), keep_warm_ms)
        self._closed = False
        self.after_fork()
        renew_after_fork(self)
        pause_at_fork(self)
        _keepers.add(self)
        self._start()

    def after_fork(self) -> None:
        """The thread is not there in a child, and what wakes it may be held for ever."""
        self._lock, self._calling, self._stop = threading.Lock(), threading.Lock(), threading.Event()
        self._holds = False
        self._thread: threading.Thread | None = None

    def called(self, model: str, now_ns: int) -> None:
        """The engine calls `model`."""
        super().called(model, now_ns)
        if self._thread is None:
            self._start()

    def before_fork(self) -> None:
        """Let the call that is under way end, and none begin: in a child it would hold its locks for ever."""
        self._holds = self._calling.acquire(timeout=END_S)

    def fork_over(self) -> None:
        """Go on, in the parent."""
        if self._holds:
            self._holds = False
            self._calling.release()

    def close(self) -> None:
        """Stop; waits for the call that is under way, at most a second. Idempotent."""
        self._closed = True
        self._stop.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(END_S)

    def step(self) -> float:
        """Make a round if it is due; the seconds until there is something to do."""
        left_s = self.left_s()
        if left_s:
            return left_s
        model, began_ns = self.begin()
        if model is not None:
            for place in self.places:
                with self._calling:
                    if not self._closed and self.wants(place, began_ns):
                        self.told(place, self._ask(place, model))
        self.end(began_ns)
        return self.left_s()

    def _ask(self, place: Place[Transport], model: str) -> bool:
        try:
            pinned, request, deadline_ns = self.prepare(model)
            spare = getattr(place.transport, "spare", None)
            if spare is not None:
                spare(deadline_ns)
            self.core.rehearsed(pinned, request, place.transport.infer(request, deadline_ns))
        except Exception:  # whatever it is, the engine's own call will say so
            return False
        return True

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None or self._closed:
                return
            thread = threading.Thread(
                target=_keep, args=(ref(self), self._stop), name="tickserve-keep-warm", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # no thread to be had: the next call tries again
                return
            self._thread = thread


def _keep(keeper: ref[Keeper], stop: threading.Event) -> None:
    while True:
        held = keeper()
        if held is None:
            return
        wait_s = held.step()
        del held
        if stop.wait(wait_s):
            return


_keepers: WeakSet[Keeper] = WeakSet()


@atexit.register
def _end() -> None:
    """A thread that is cut off inside ONNX Runtime as the interpreter ends takes the process with it (SIGABRT)."""
    for keeper in list(_keepers):
        keeper.close()

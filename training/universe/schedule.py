"""Which call comes next: features are prepared a little ahead of the training, and all of it inside the memory limit.

A call waits where it would not fit beside those that run; one that would not fit alone is refused; and where the
estimate was too low and the limit is passed, the youngest call is ended, to be tried again alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tickserve.errors import ComponentError
from training.universe.engine import Engine, Lane
from training.universe.tasks import Answer, Call, told

TICK_S = 0.05
# Of a process that trains or prepares before it holds a row: the interpreter with XGBoost, scikit-learn and pyarrow, or
# with numba and polars; measured by `python -m benchmarks.universe`.
PROCESS_MB = 300.0
# Copies of the feature matrix, in float32, that training holds at its peak (the table, a fold, the binned matrix).
COPIES = 3.0
# Labels, times, prices, orders and predictions of a row.
ROW_BYTES = 160


@dataclass
class Item:
    """A call with the memory it is expected to take; `alone` once it was ended for taking more."""

    call: Call
    need_mb: float
    alone: bool = False


@dataclass
class Log:
    """What the schedule saw of memory: its peak, calls that were ended for it, and symbols that waited for it."""

    peak_memory_mb: float = 0.0
    ended_for_memory: int = 0
    waited_for_memory: set[str] = field(default_factory=set)


def training_mb(rows: int, columns: int) -> float:
    """Memory that training on [rows, columns] is expected to take, its process included."""
    return PROCESS_MB + rows * (columns * 4 * COPIES + ROW_BYTES) / 2**20


class Schedule:
    """Runs prepare calls, and the train calls that come of them.

    `prepared(call, answer)` gives the train call that follows and its memory, or None; `ended(lane, call, answer)` is
    told of every end. `limit_mb` 0 is no limit.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        ahead: int,
        limit_mb: float,
        prepared: Callable[[Call, Answer], Item | None],
        ended: Callable[[Lane, Call, Answer], None],
    ) -> None:
        self._engine, self._ahead, self._limit_mb = engine, ahead, limit_mb
        self._prepared, self._told_end = prepared, ended
        self._waiting: deque[Item] = deque()
        self._ready: deque[Item] = deque()
        self._running: dict[Lane, list[Item]] = {"prepare": [], "train": []}
        self.log = Log()

    def run(self, prepare: Sequence[Item] = (), train: Sequence[Item] = ()) -> None:
        """Run everything to its end."""
        self._waiting.extend(prepare)
        self._ready.extend(train)
        while self._waiting or self._ready or any(self._running.values()):
            self._start("train", self._ready, self._engine.lanes["train"])
            self._start("prepare", self._waiting, self._may_prepare())
            for lane, call, answered in self._engine.finished(TICK_S):
                self._ended(lane, call, answered)
            self._hold_limit()

    def _may_prepare(self) -> int:
        """Preparations that may run: a free trainer's next symbol and `ahead` more, less what is ready."""
        free = self._engine.lanes["train"] - len(self._running["train"])
        return min(self._engine.lanes["prepare"], free + self._ahead - len(self._ready))

    def _start(self, lane: Lane, queue: deque[Item], room: int) -> None:
        while queue and len(self._running[lane]) < room and self._fits(lane, queue):
            item = queue.popleft()
            self._running[lane].append(item)
            self._engine.start(lane, item.call)

    def _others(self) -> list[Item]:
        return self._running["prepare"] + self._running["train"]

    def _fits(self, lane: Lane, queue: deque[Item]) -> bool:
        """Whether the first of the queue may start now; one that never will is refused."""
        while queue:
            item, others = queue[0], self._others()
            if others and (item.alone or any(other.alone for other in others)):
                return False
            used = self._engine.memory_mb() or 0.0
            if not self._limit_mb or used + item.need_mb <= self._limit_mb:
                return True
            if self._engine.spare():
                continue
            if others:
                self.log.waited_for_memory.add(item.call.subject)
                return False
            self._refuse(lane, queue.popleft(), f"about {used + item.need_mb:,.0f} MB")
        return False

    def _refuse(self, lane: Lane, item: Item, was: str) -> None:
        error = ComponentError(
            "it needs more memory than the run may take",
            field="universe.memory_mb",
            expected=f"at most {self._limit_mb:,.0f} MB",
            was=was,
            hint="raise it (0: limits.memory_mb), or lower features.max_rows or features.bars_max_rows",
        )
        self._told_end(lane, item.call, Answer(0.0, error=told(error)))

    def _ended(self, lane: Lane, call: Call, answered: Answer) -> None:
        self._running[lane] = [item for item in self._running[lane] if item.call is not call]
        self._told_end(lane, call, answered)
        if lane == "prepare" and answered.error is None:
            following = self._prepared(call, answered)
            if following is not None:
                self._ready.append(following)

    def _hold_limit(self) -> None:
        """End the youngest call where the limit is passed, the preparations first."""
        used = self._engine.memory_mb()
        if used is None:
            return
        self.log.peak_memory_mb = max(self.log.peak_memory_mb, used)
        if not self._limit_mb or used <= self._limit_mb or not self._others() or self._engine.spare():
            return
        lane: Lane = "prepare" if self._running["prepare"] else "train"
        item = self._running[lane].pop()
        self._engine.stop(lane, item.call)
        self.log.ended_for_memory += 1
        if not self._others():
            self._refuse(lane, item, f"{used:,.0f} MB")
            return
        item.alone = True
        (self._waiting if lane == "prepare" else self._ready).appendleft(item)

"""Triton's dynamic batcher over recorded arrivals, event by event.

The rules it follows, for one model with N instances:
1. A request joins the queue of its lane; a bounded lane that is full refuses it at once.
2. When an instance is idle the batcher looks at the queue, lane 1 before lane 2, in order of arrival within a lane.
   A request whose queue timeout has passed is refused then, not before.
3. It takes the largest preferred size that the waiting rows fill. When they fill none it waits, until the oldest has
   waited `delay_us`, then takes what is there up to the largest batch. A delay of 0 never waits.
4. A request is never split: a batch ends before the request that would overfill it.
5. Without a queue policy Triton also forms up to 2 N batches ahead of time (prefetching). Those grow until they are
   executed, so batches come out as in rule 3; that lane 1 cannot overtake them is not modelled, because lanes need a
   queue policy. With a queue policy there is no prefetching: enough instances are a rule of
   `export/batching/rules.py`, so the missed wake-up of few instances is not modelled either.

An execution takes its measured mean for its rows and requests, times a factor drawn from the measured samples (seeded),
times the busy instances over the cores when there are more of them. To what a request waits and executes comes its path
(network stack, parsing, answer), drawn from the measured ones. Letters: N requests.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.batching.arrivals import Arrivals
from export.batching.rules import Setting
from export.batching.service import ServiceTimes
from tickserve.model_config import BULK_LANE, SINGLE_LANE

LANES = (SINGLE_LANE, BULK_LANE)


@dataclass(frozen=True)
class Outcome:
    """What each of N requests would see: `latency_us` float64 [N], NaN where the queue refused it."""

    latency_us: npt.NDArray[np.float64]
    lane: npt.NDArray[np.int64]
    batch_rows: npt.NDArray[np.int64]
    deepest: int

    def misses(self, deadline_us: float, lane: int = SINGLE_LANE) -> int:
        """Requests of `lane` refused, or answered after the deadline."""
        mine = self.latency_us[self.lane == lane]
        return int(np.sum(~(mine <= deadline_us)))

    def quantile_us(self, share: float, lane: int = SINGLE_LANE) -> float:
        """Nearest-rank latency quantile of a lane; a refused request counts as infinitely late."""
        mine = np.sort(np.nan_to_num(self.latency_us[self.lane == lane], nan=np.inf))
        return float(mine[max(0, int(np.ceil(share * len(mine))) - 1)]) if len(mine) else float("nan")

    def to_json(self, deadline_us: float) -> dict[str, Any]:
        """Percentiles and misses of both lanes; None where a quantile falls on refused requests."""
        shown: dict[str, Any] = {}
        for name, lane in (("single", SINGLE_LANE), ("bulk", BULK_LANE)):
            count = int(np.sum(self.lane == lane))
            if count:
                quantiles = {f"p{q:g}_us": self.quantile_us(q / 100, lane) for q in (50, 99)}
                shown[name] = {
                    "requests": count,
                    **{key: round(value, 1) if np.isfinite(value) else None for key, value in quantiles.items()},
                    "refused": int(np.sum(np.isnan(self.latency_us[self.lane == lane]))),
                    "misses": self.misses(deadline_us, lane),
                }
        mean = float(np.mean(self.batch_rows)) if len(self.batch_rows) else 0.0
        return shown | {"mean_batch_rows": round(mean, 2), "deepest_queue": self.deepest}


class _Batcher:
    def __init__(self, arrivals: Arrivals, service: ServiceTimes, setting: Setting, cores: int, seed: int) -> None:
        self._setting, self._service, self._cores = setting, service, cores
        self._times: list[float] = (arrivals.times_ns / 1_000).tolist()
        self._rows: list[int] = arrivals.rows.tolist()
        # Without lanes the batcher knows one queue.
        self._lane: list[int] = (arrivals.lane if setting.lanes else np.ones_like(arrivals.lane)).tolist()
        self._queues: dict[int, deque[int]] = {lane: deque() for lane in LANES}
        self._waiting_rows = 0
        self._idle = setting.instances
        random = np.random.default_rng(seed)
        self._factors = random.choice(service.spread(), max(1, len(arrivals))).tolist()
        self._paths = random.choice(service.paths(), max(1, len(arrivals)))
        self._means: dict[tuple[int, int], float] = {}
        self._ends: list[tuple[float, list[int]]] = []
        self.latency = np.full(len(arrivals), np.nan)
        self.batches: list[int] = []
        self.deepest = 0

    def run(self) -> None:
        """Play every arrival and every end of an execution in order of time."""
        arrived, now = 0, 0.0
        while arrived < len(self._times) or self._ends or self._waiting_rows:
            times = [self._look_again(now)]
            if arrived < len(self._times):
                times.append(self._times[arrived])
            if self._ends:
                times.append(self._ends[0][0])
            now = min(times)
            while self._ends and self._ends[0][0] <= now:
                self._finish(*heapq.heappop(self._ends))
            while arrived < len(self._times) and self._times[arrived] <= now:
                self._enqueue(arrived)
                arrived += 1
            self._dispatch(now)

    def _enqueue(self, request: int) -> None:
        queue = self._queues[self._lane[request]]
        if self._setting.queue_size and len(queue) >= self._setting.queue_size:
            return
        queue.append(request)
        self._waiting_rows += self._rows[request]
        self.deepest = max(self.deepest, sum(map(len, self._queues.values())))

    def _oldest(self) -> float:
        return min(self._times[queue[0]] for queue in self._queues.values() if queue)

    def _look_again(self, now: float) -> float:
        """When the delay of the oldest is over, if an instance is idle for it."""
        if not self._waiting_rows or not self._idle:
            return float("inf")
        return max(now, self._oldest() + self._setting.delay_us)

    def _dispatch(self, now: float) -> None:
        while self._idle and self._waiting_rows:
            self._refuse_late(now)
            if not self._waiting_rows:
                return
            filled = [size for size in self._setting.preferred if size <= self._waiting_rows]
            target = max(filled, default=0)
            if not target:
                if now < self._oldest() + self._setting.delay_us:
                    return
                target = self._setting.max_batch
            self._execute(self._take(target), now)

    def _refuse_late(self, now: float) -> None:
        timeout = self._setting.queue_timeout_us
        for queue in self._queues.values() if timeout else ():
            while queue and now - self._times[queue[0]] > timeout:
                self._waiting_rows -= self._rows[queue.popleft()]

    def _take(self, target: int) -> list[int]:
        taken: list[int] = []
        rows = 0
        for queue in self._queues.values():
            while queue and (not taken or rows + self._rows[queue[0]] <= target):
                rows += self._rows[queue[0]]
                taken.append(queue.popleft())
        self._waiting_rows -= rows
        self.batches.append(rows)
        return taken

    def _execute(self, taken: list[int], now: float) -> None:
        key = (self.batches[-1], len(taken))
        if key not in self._means:
            self._means[key] = self._service.mean_us(*key)
        self._idle -= 1
        crowd = max(1.0, (self._setting.instances - self._idle) / self._cores)
        factor = self._factors[len(self.batches) % len(self._factors)]
        heapq.heappush(self._ends, (now + self._means[key] * factor * crowd, taken))

    def _finish(self, ended: float, taken: list[int]) -> None:
        self._idle += 1
        for request in taken:
            self.latency[request] = ended - self._times[request] + self._paths[request]


def simulate(arrivals: Arrivals, service: ServiceTimes, setting: Setting, *, cores: int, seed: int = 7) -> Outcome:
    """What `arrivals` would see under `setting` on `cores` cores. The same arguments give the same outcome."""
    batcher = _Batcher(arrivals, service, setting, cores, seed)
    batcher.run()
    return Outcome(batcher.latency, arrivals.lane, np.array(batcher.batches, np.int64), batcher.deepest)

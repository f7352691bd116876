"""What one pod answers a second inside the deadline.

batch B    the largest measured batch that leaves half the deadline for the wait before it
request    time of a batch of B over its requests, times the threads it runs on, plus the path (network, parsing,
           answer): what a request takes of the pod's cores, an upper bound, because on the path it also waits
capacity   the lower of cores / request and of what the instances score when they are never idle
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from export.batching import ServiceTimes
from export.batching.rules import slack_us
from export.deployment.figures import ModelFigures
from tickserve.errors import UsageError


@dataclass(frozen=True)
class Capacity:
    """Requests a second of one pod for one model, and what it follows from."""

    per_second: float
    batch: int
    batch_us: float
    request_us: float
    slack_us: float
    measured: bool = False


def capacity_of(model: ModelFigures) -> Capacity | None:
    """What one pod answers a second inside the deadline; None where only times without a server are known.

    Raises UsageError when not even a lone request fits in the deadline.
    """
    if model.service is None:
        return None
    times, deadline = model.service.times, model.deadline_us
    if slack_us(deadline, times, 1) <= 0:
        need = times.overhead_us + times.mean_us(1)
        raise UsageError(
            f"no time is left for one lone request to {model.name}",
            field="deadline",
            expected=f"more than {need / 1e3:.3g} ms",
            was=f"{deadline / 1e3:g} ms ({model.deadline_source})",
        )
    fit = [size for size in times.sizes if size <= model.setting.max_batch and _leaves_half(times, size, deadline)]
    batch = max(fit, default=1)
    slack = slack_us(deadline, times, batch)
    if not model.service.served and model.cpu is None:
        return Capacity(math.nan, batch, times.mean_us(batch, batch), math.nan, slack)
    rows = model.rate.rows if model.rate else 1.0
    requests = max(1.0, batch / rows)
    batch_us = times.mean_us(max(batch, math.ceil(rows)), math.ceil(requests))
    upper_us = batch_us / requests * model.threads + times.overhead_us
    request_us = upper_us if model.cpu is None else model.cpu.us
    by_cores = model.setting.instances * model.threads / request_us * 1e6
    by_instances = model.setting.instances * requests / batch_us * 1e6
    return Capacity(min(by_cores, by_instances), batch, batch_us, request_us, slack, model.cpu is not None)


def _leaves_half(times: ServiceTimes, size: int, deadline_us: float) -> bool:
    return slack_us(deadline_us, times, size) >= deadline_us / 2

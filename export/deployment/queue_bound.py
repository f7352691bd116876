"""The bound of a model's queue that follows from its own figures: what its instances score within the slack.

config.pbtxt belongs to the model and not to the chart, so nothing is written here: the bound is said, with what puts
it in force. The default is no bound, since with one fewer than three instances can overlook a lone request
(docs/batching.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from export.batching.rules import STEADY_INSTANCES, slack_us, with_bound
from export.deployment.capacity import capacity_of
from export.deployment.figures import ModelFigures


@dataclass(frozen=True)
class QueueBound:
    """For one model; `size` 0: no bound follows, and the reason says why. `in_force` is that of config.pbtxt."""

    model: str
    in_force: int
    size: int
    timeout_us: int
    reason: str
    keys: dict[str, Any]
    command: str

    @property
    def advice(self) -> str:
        """What follows, why, and how it is put in force."""
        if not self.size:
            return f"{self.reason}; `{self.command}` computes a bound"
        keys = ", ".join(f"{name} = {json.dumps(value)}" for name, value in self.keys.items())
        return (
            f"{self.size} requests that wait {self.timeout_us} us at most, since {self.reason}: `{self.command}` "
            f"simulates the recorded peak and puts a bound in force; the next export takes [export] {keys}"
        )

    @property
    def line(self) -> str:
        """One line about the queue, as it is and as it would follow."""
        now = f"bounded to {self.in_force} requests" if self.in_force else "unbounded"
        return f"queue of {self.model} (its config.pbtxt, no chart value): {now}; {self.advice}"

    def to_json(self) -> dict[str, Any]:
        """Every field; a bound that does not follow is null."""
        return {
            "model": self.model,
            "in_force": self.in_force or None,
            "queue_size": self.size or None,
            "queue_timeout_us": self.timeout_us or None,
            "reason": self.reason,
            "export": self.keys,
            "command": self.command,
        }


def queue_bounds(models: Sequence[ModelFigures], *, gpu: bool = False) -> list[QueueBound]:
    """One for each model. Raises UsageError when not even a lone request fits in a deadline."""
    return [queue_bound(model, gpu=gpu) for model in models]


def queue_bound(model: ModelFigures, *, gpu: bool = False) -> QueueBound:
    """What the instances score within the slack, in the batches that the deadline leaves room for."""
    if gpu:
        return _none(model, "no bound follows: the service times were measured on a CPU")
    capacity = capacity_of(model)
    if capacity is None or model.service is None or not model.service.served:
        return _none(model, "no bound follows: no served times are known")
    times = model.service.times
    batch = max(model.setting.preferred, default=capacity.batch)
    slack, rows = slack_us(model.deadline_us, times, batch), model.rate.rows if model.rate else 1.0
    if slack <= 1:
        return _none(model, f"no bound follows: a batch of {batch}, its preferred size, leaves no time to wait")
    busy = times.mean_us(batch, max(1, round(batch / rows)))
    steady = replace(model.setting, instances=max(model.setting.instances, STEADY_INSTANCES), delay_us=0)
    found = with_bound(steady, slack, busy, max(1, int(batch / rows)), steady.instances)
    more = "" if steady.instances == model.setting.instances else " (the fewest that a bound may have; render again)"
    reason = (
        f"{steady.instances} instances{more} score so many within the {slack / 1e3:.3g} ms of slack, in batches of "
        f"{batch} rows that take {busy:.0f} us each"
    )
    return QueueBound(
        model.name,
        model.setting.queue_size,
        found.queue_size,
        found.queue_timeout_us,
        reason,
        found.export_keys(),
        _command(model),
    )


def _none(model: ModelFigures, reason: str) -> QueueBound:
    return QueueBound(model.name, model.setting.queue_size, 0, 0, reason, {}, _command(model))


def _command(model: ModelFigures) -> str:
    deadline = f"{model.deadline_us / 1e3:g}"
    return f"tickserve batching derive --model {model.name} --deadline-ms {deadline} --arrivals <journal> --apply"

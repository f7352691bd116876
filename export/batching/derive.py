"""The batching setting for a deadline: every candidate simulated over the recorded peak, the lowest p99 chosen.

    slack      = deadline - wire - service time of the largest preferred batch
    timeout    = slack: a request that waited longer cannot be answered in time, so it is refused
    queue size = what the instances can score within that timeout: a longer queue only holds requests that will be late

Candidates are instance counts, preferred sizes and delays inside `export/batching/rules.py`. The choice is the lowest
single-lane p99 among those whose misses stay within the allowed share; on (nearly) equal p99 the fewest instances, then
the shortest delay, then the fewest preferred sizes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as schema

from export.batching.arrivals import Arrivals
from export.batching.rules import STEADY_INSTANCES, Setting, lint, slack_us, with_bound
from export.batching.service import ServiceTimes
from export.batching.simulate import Outcome, simulate
from tickserve import model_config
from tickserve.errors import UsageError
from tickserve.model_config import CONFIG_NAME
from tickserve.store import write_atomic

# Differences of p99 below this share are noise of the service times, not a reason for another instance.
SAME_P99 = 0.05
DELAY_SHARES = (0.0, 0.1, 0.25)


@dataclass(frozen=True)
class Row:
    """One candidate and what it would do at the recorded peak."""

    setting: Setting
    outcome: Outcome


@dataclass(frozen=True)
class Derivation:
    """Every candidate, the chosen one, whether it satisfies the deadline, and a reason for each of its values."""

    rows: tuple[Row, ...]
    chosen: Row
    satisfied: bool
    deadline_us: float
    arrivals: Arrivals
    service: ServiceTimes
    cores: int
    allowed: float
    reasons: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The table as it is written: service times, peak, candidates with predictions, the choice with reasons."""
        return {
            "deadline_us": self.deadline_us,
            "allowed_miss_share": self.allowed,
            "cores": self.cores,
            "peak": {
                "requests": len(self.arrivals),
                "rows": int(self.arrivals.rows.sum()),
                "seconds": round(self.arrivals.seconds, 6),
                "per_second": round(self.arrivals.per_second, 3) if self.arrivals.seconds else None,
            },
            "service": self.service.to_json(),
            "candidates": [_row_json(row, self.deadline_us) for row in self.rows],
            "chosen": _row_json(self.chosen, self.deadline_us),
            "satisfied": self.satisfied,
            "reasons": self.reasons,
            "export": self.chosen.setting.export_keys(),
        }


def _row_json(row: Row, deadline_us: float) -> dict[str, Any]:
    return {"setting": row.setting.to_json(), "predicted": row.outcome.to_json(deadline_us)}


def derive(
    arrivals: Arrivals,
    service: ServiceTimes,
    *,
    deadline_us: float,
    max_batch: int,
    max_instances: int = 4,
    allowed: float = 0.0,
    bounded: bool = True,
    cores: int | None = None,
) -> Derivation:
    """Simulate the candidates over `arrivals` (the peak) and choose. Raises UsageError when the slack is gone.

    `bounded` asks for a queue that refuses, and for priority lanes where `arrivals` has bulk requests; without it the
    queue has no bound, as Triton's own default.
    """
    cores = cores or len(os.sched_getaffinity(0))
    if slack_us(deadline_us, service, 1) <= 0:
        need = service.overhead_us + service.mean_us(1)
        raise UsageError("no time is left for one lone request", field="deadline", expected=f"more than {need:.0f} us")
    rows = tuple(
        Row(setting, simulate(arrivals, service, setting, cores=cores))
        for setting in candidates(arrivals, service, deadline_us, max_batch, max_instances, bounded, cores)
    )
    fitting = [row for row in rows if row.outcome.misses(deadline_us) <= allowed * len(arrivals)]
    chosen = _best(fitting, deadline_us) if fitting else min(rows, key=lambda row: row.outcome.misses(deadline_us))
    facts = Derivation(rows, chosen, bool(fitting), deadline_us, arrivals, service, cores, allowed, {})
    return replace(facts, reasons=_reasons(facts))


def _best(rows: list[Row], deadline_us: float) -> Row:
    least = min(row.outcome.quantile_us(0.99) for row in rows)
    near = [row for row in rows if row.outcome.quantile_us(0.99) <= least * (1 + SAME_P99)]
    return min(
        near,
        key=lambda row: (
            row.outcome.misses(deadline_us),
            row.setting.instances,
            row.setting.delay_us,
            len(row.setting.preferred),
        ),
    )


def candidates(
    arrivals: Arrivals,
    service: ServiceTimes,
    deadline_us: float,
    max_batch: int,
    max_instances: int,
    bounded: bool,
    cores: int,
) -> list[Setting]:
    """Every setting inside the rules that is worth a simulation."""
    lanes = bounded and bool((arrivals.lane != model_config.SINGLE_LANE).any())
    fit, found = _fit(service, deadline_us, max_batch), []
    for instances in range(STEADY_INSTANCES if bounded else 1, max(max_instances, STEADY_INSTANCES * bounded) + 1):
        for preferred in _preferred(fit):
            largest = _steered(preferred, fit)
            # A large batch may be measured faster than a lone row; the rules hold a request to either.
            slack = min(slack_us(deadline_us, service, rows) for rows in (1, largest))
            for share in (0.0,) if bounded or not preferred else DELAY_SHARES:
                setting = Setting(
                    max_batch, int(share * slack), preferred, instances, 0, 0, lanes, unbounded_on_purpose=not bounded
                )
                if bounded:
                    setting = _bounded(setting, service, slack, largest, cores)
                found.append(setting)
    return found


def _fit(service: ServiceTimes, deadline_us: float, max_batch: int) -> list[int]:
    """The sizes that leave half the deadline for the wait before them."""
    return [
        size
        for size in service.sizes
        if 1 < size <= max_batch and slack_us(deadline_us, service, size) >= deadline_us / 2
    ]


def _preferred(fit: list[int]) -> list[tuple[int, ...]]:
    """No preferred size, the largest that fits, and a ladder up to it."""
    return list(dict.fromkeys([(), (fit[-1],), tuple(fit[::-2][::-1])])) if fit else [()]


def _steered(preferred: tuple[int, ...], fit: list[int]) -> int:
    """The batch a request must expect to end in: the largest preferred size, or without any what a burst may fill."""
    return max(preferred or fit, default=1)


def _bounded(setting: Setting, service: ServiceTimes, slack: float, largest: int, cores: int) -> Setting:
    """`setting` with the queue timeout and size that follow from its slack."""
    return with_bound(setting, slack, service.mean_us(largest, largest), largest, min(setting.instances, cores))


def _reasons(found: Derivation) -> dict[str, str]:
    setting, outcome = found.chosen.setting, found.chosen.outcome
    sizes = [size for row in found.rows for size in row.setting.preferred]
    largest = max(setting.preferred or sizes, default=1)
    slack = slack_us(found.deadline_us, found.service, largest)
    busy = found.service.mean_us(largest, largest)
    shown = list(setting.preferred) or "none, no size lowers the predicted p99"
    rows = float(outcome.batch_rows.mean()) if len(outcome.batch_rows) else 0.0
    p99: dict[int, float] = {}
    for row in found.rows:
        count = row.setting.instances
        p99[count] = min(p99.get(count, float("inf")), row.outcome.quantile_us(0.99))
    reasons = {
        "max_queue_delay_microseconds": _delay_reason(setting, slack),
        "preferred_batch_size": (
            f"{shown}: a batch of {largest} takes {busy:.0f} us, which leaves {slack:.0f} us of "
            f"{found.deadline_us:.0f} to wait; batches at the peak hold {rows:.1f} rows on average"
        ),
        "instance_group.count": f"predicted p99 by count, in us: {_shown(p99)}"
        + (f"; {STEADY_INSTANCES} is the fewest that a queue policy may have" if setting.has_policy else ""),
    }
    if setting.queue_size:
        reasons["default_timeout_microseconds"] = (
            f"{setting.queue_timeout_us}: who waited longer cannot be answered inside {found.deadline_us:.0f} us"
        )
        reasons["max_queue_size"] = (
            f"{setting.queue_size}: what is scored within that time, so whoever joins a longer queue is late. It is a "
            f"ceiling for an overload: the recorded peak needs {outcome.deepest}"
        )
    else:
        reasons["max_queue_size"] = (
            "none: asked for without a bound; the client's deadline bounds a caller's wait alone"
        )
    reasons["priority_levels"] = (
        "2: single decisions before bulk scoring, which names lane 2" if setting.lanes else "none: one lane arrives"
    )
    return reasons


def _delay_reason(setting: Setting, slack: float) -> str:
    if setting.has_policy:
        return "0: beside a queue policy a delay can slow this server down (docs/batching.md)"
    if not setting.delay_us:
        return f"0: no delay up to {max(DELAY_SHARES) * slack:.0f} us lowers the predicted p99"
    return f"{setting.delay_us} of {slack:.0f} us slack: fuller batches lower the predicted p99"


def _shown(p99: dict[int, float]) -> str:
    return ", ".join(
        f"{count}: {value:.0f}" if value < float("inf") else f"{count}: refused" for count, value in sorted(p99.items())
    )


def apply_to_config(path: Path, setting: Setting) -> None:
    """Write `setting` into a published config.pbtxt, and warm every preferred size up; the rest stays as it is.

    Raises ArtifactError when the file cannot be read, and UsageError for a setting that breaks a rule of the server.
    """
    from export.triton_config import HEADER, parse_config

    broken = [found for found in lint(setting) if found.field != "max_queue_size"]
    if broken:
        raise UsageError(broken[0].reason, field=broken[0].field)
    text = path.read_text("utf-8")
    parse_config(text)
    config = text_format.Parse(text, schema.ModelConfig())
    batching = schema.ModelDynamicBatching(
        preferred_batch_size=setting.preferred, max_queue_delay_microseconds=setting.delay_us
    )
    if setting.unbounded_on_purpose:
        batching.default_queue_policy.SetInParent()
    if setting.queue_size:
        queue = batching.default_queue_policy
        queue.timeout_action, queue.allow_timeout_override = schema.ModelQueuePolicy.REJECT, True
        queue.default_timeout_microseconds, queue.max_queue_size = setting.queue_timeout_us, setting.queue_size
    if setting.lanes:
        batching.priority_levels = model_config.BULK_LANE
        batching.default_priority_level = setting.default_lane
    config.dynamic_batching.CopyFrom(batching)
    for group in config.instance_group[1:]:
        config.instance_group.remove(group)
    config.instance_group[0].count = setting.instances
    _warm(config, setting)
    changed = HEADER + text_format.MessageToString(config)
    parse_config(changed)
    write_atomic(path.with_name(CONFIG_NAME), changed.encode())


def _warm(config: Any, setting: Setting) -> None:
    """One warm-up of zeros for each size a batch is steered to."""
    inputs = config.model_warmup[0].inputs if config.model_warmup else {}
    shapes = {name: (value.data_type, list(value.dims)) for name, value in inputs.items()} or {
        tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in config.input
    }
    del config.model_warmup[:]
    for rows in sorted({1, *setting.preferred}):
        warmup = config.model_warmup.add(name=f"rows_{rows}", batch_size=rows, count=1)
        for name, (data_type, dims) in shapes.items():
            warmup.inputs[name].CopyFrom(schema.ModelWarmup.Input(data_type=data_type, dims=dims, zero_data=True))

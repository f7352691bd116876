"""What a batching setting may be, whoever wrote it: the derivation searches inside these rules, `lint` checks the rest.

The rules about queue policies are facts of the measured Triton build (2.51, release 24.10; docs/batching.md), not of
the protocol: any queue policy or priority level switches off its prefetching, and then
- with fewer than `STEADY_INSTANCES` instances a request can be overlooked for 500 ms;
- with a queue delay as well, merged batches miscount the free instances, and over minutes the batcher slows down until
  a reload (upstream issue triton-inference-server/server 8870; read, not seen in this project's short runs).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as schema

from export.batching.service import ServiceTimes
from tickserve.config import ExportSettings
from tickserve.errors import ArtifactError
from tickserve.model_config import CONFIG_NAME, SINGLE_LANE

STEADY_INSTANCES = 3


@dataclass(frozen=True)
class Setting:
    """One way to batch. Times in microseconds; a `queue_size` or `queue_timeout_us` of 0 means none.

    `unbounded_on_purpose`: that the queue has no bound is said, not left out; config.pbtxt says it by a
    `default_queue_policy` with nothing in it, which leaves Triton's prefetching on (benchmarks/queue_policy.py).
    """

    max_batch: int
    delay_us: int
    preferred: tuple[int, ...]
    instances: int
    queue_size: int
    queue_timeout_us: int
    lanes: bool
    default_lane: int = SINGLE_LANE
    rejects: bool = True
    unbounded_on_purpose: bool = False

    @property
    def has_policy(self) -> bool:
        """Whether Triton's prefetching is off."""
        return bool(self.queue_size or self.queue_timeout_us or self.lanes)

    def export_keys(self) -> dict[str, Any]:
        """The same as keys of the configuration's [export] table."""
        keys: dict[str, Any] = {
            "preferred_batch_rows": list(self.preferred),
            "queue_delay_us": self.delay_us,
            "instances": self.instances,
            "queue_policy": "reject" if self.has_policy else "none",
        }
        if self.has_policy:
            keys |= {"queue_size": self.queue_size, "queue_timeout_us": self.queue_timeout_us}
        return keys | {"priority_lanes": self.lanes}

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)


@dataclass(frozen=True)
class Finding:
    """A rule that a setting breaks; a `note` is a choice that it says it made, with what that costs."""

    field: str
    reason: str
    note: bool = False


def lint(
    setting: Setting,
    *,
    deadline_us: float | None = None,
    service: ServiceTimes | None = None,
    two_lanes: bool = False,
) -> list[Finding]:
    """The rules that `setting` breaks, and its notes. Rules of time need the deadline; the slack, the service times.

    `two_lanes`: bulk scoring shares the model with single decisions.
    """
    findings = _sizes(setting) + _queue(setting)
    if two_lanes and not setting.lanes:
        findings.append(
            Finding("priority_levels", "two lanes without priorities: bulk scoring delays single decisions")
        )
    if setting.lanes and setting.default_lane != SINGLE_LANE:
        reason = f"a request that names no lane must be a single decision: expected {SINGLE_LANE}"
        findings.append(Finding("default_priority_level", f"{reason}, was {setting.default_lane}"))
    return findings + (_times(setting, deadline_us, service) if deadline_us is not None else [])


def _sizes(setting: Setting) -> list[Finding]:
    findings = []
    over = [size for size in setting.preferred if not 1 <= size <= setting.max_batch]
    if over:
        findings.append(
            Finding("preferred_batch_size", f"expected from 1 to max_batch_size ({setting.max_batch}), was {over}")
        )
    if setting.delay_us and not any(size > 1 for size in setting.preferred):
        reason = f"every lone request waits {setting.delay_us} us for a size that no one named"
        findings.append(Finding("max_queue_delay_microseconds", reason))
    return findings


def _queue(setting: Setting) -> list[Finding]:
    findings = []
    if not setting.queue_size:
        findings.append(_unbounded(setting))
    elif not setting.rejects:
        findings.append(
            Finding("timeout_action", "expected REJECT, was DELAY: late requests stay and are scored in vain")
        )
    if setting.has_policy and setting.instances < STEADY_INSTANCES:
        reason = "with a queue policy or priorities fewer can overlook a request for 500 ms"
        findings.append(
            Finding("instance_group.count", f"{reason}: expected at least {STEADY_INSTANCES}, was {setting.instances}")
        )
    if setting.has_policy and setting.delay_us:
        reason = "a queue delay beside a queue policy can slow this server down until a reload: expected 0"
        findings.append(Finding("max_queue_delay_microseconds", f"{reason}, was {setting.delay_us}"))
    return findings


def _unbounded(setting: Setting) -> Finding:
    if setting.unbounded_on_purpose and not setting.has_policy:
        reason = (
            f"no bound, on purpose: beside a bound fewer than {STEADY_INSTANCES} instances can overlook a request for "
            f"500 ms, and this has {setting.instances}; an overload waits in the server, and each caller by its own "
            "deadline (docs/batching.md)"
        )
        return Finding("max_queue_size", reason, note=True)
    return Finding("max_queue_size", "the queue is unbounded: overload turns into waiting without end")


def slack_us(deadline_us: float, service: ServiceTimes, rows: int) -> float:
    """What a request may wait and still be answered in time, when it ends in a batch of `rows` rows."""
    return deadline_us - service.overhead_us - service.mean_us(rows, rows)


def with_bound(setting: Setting, slack: float, busy_us: float, requests: int, side_by_side: int) -> Setting:
    """`setting` with the queue that follows: who waited longer than the slack is late.

    So is who cannot be scored within it, when so many batches of `requests` run side by side and take `busy_us` each.
    """
    in_time = slack / busy_us * requests * side_by_side
    # A microsecond less: `lint` knows the slack from the table, whose times are rounded.
    return replace(setting, queue_size=max(requests, int(in_time)), queue_timeout_us=max(1, int(slack) - 1))


def _times(setting: Setting, deadline_us: float, service: ServiceTimes | None) -> list[Finding]:
    slack, why = deadline_us, f"the deadline ({deadline_us:.0f} us)"
    if service is not None:
        rows = min(max(setting.preferred, default=1), setting.max_batch)
        slack = slack_us(deadline_us, service, rows)
        why = f"the slack ({slack:.0f} us: the deadline of {deadline_us:.0f} us less a batch of {rows} and the wire)"
    findings = []
    if setting.delay_us >= slack:
        findings.append(Finding("max_queue_delay_microseconds", f"expected less than {why}, was {setting.delay_us}"))
    if setting.queue_timeout_us and setting.queue_timeout_us >= deadline_us:
        reason = f"expected less than the deadline ({deadline_us:.0f} us), was {setting.queue_timeout_us}"
        findings.append(Finding("default_timeout_microseconds", reason))
    elif setting.queue_timeout_us and setting.queue_timeout_us > slack:
        findings.append(
            Finding("default_timeout_microseconds", f"expected at most {why}, was {setting.queue_timeout_us}")
        )
    return findings


def setting_of_config(path: Path) -> Setting:
    """The setting in a config.pbtxt. Raises ArtifactError when it cannot be read."""
    try:
        config = text_format.Parse(path.read_text("utf-8"), schema.ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a model configuration"
        raise ArtifactError(f"cannot read: {reason}", field=CONFIG_NAME) from error
    batching, queue = config.dynamic_batching, config.dynamic_batching.default_queue_policy
    levels = [queue, *batching.priority_queue_policy.values()]
    return Setting(
        max_batch=config.max_batch_size,
        delay_us=batching.max_queue_delay_microseconds,
        preferred=tuple(sorted(batching.preferred_batch_size)),
        instances=sum(max(1, group.count) for group in config.instance_group) or 1,
        queue_size=queue.max_queue_size,
        queue_timeout_us=queue.default_timeout_microseconds,
        lanes=batching.priority_levels > 0,
        default_lane=batching.default_priority_level or SINGLE_LANE,
        rejects=all(level.timeout_action == schema.ModelQueuePolicy.REJECT for level in levels),
        unbounded_on_purpose=batching.HasField("default_queue_policy") and queue == schema.ModelQueuePolicy(),
    )


def setting_of_settings(settings: ExportSettings) -> Setting:
    """The setting that an export with these settings writes."""
    bounded = settings.queue_policy == "reject"
    return Setting(
        max_batch=settings.max_batch,
        delay_us=settings.queue_delay_us,
        preferred=tuple(sorted(set(settings.preferred_batch_rows))),
        instances=settings.instances,
        queue_size=settings.queue_size if bounded else 0,
        queue_timeout_us=settings.queue_timeout_us if bounded else 0,
        lanes=settings.priority_lanes,
        unbounded_on_purpose=not bounded,
    )

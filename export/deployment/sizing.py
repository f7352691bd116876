"""Chart values from figures: each with the reason it follows from, and where the figures are from.

batch B       the largest measured batch that leaves half the deadline for the wait before it
request       time of a batch of B over its requests, times the threads it runs on, plus the path (network, parsing,
              answer): what a request takes of the pod's cores, an upper bound, because on the path it also waits
capacity      the lower of cores / request and of what the instances score when they are never idle
replicas      peak / (capacity x utilisation); with one pod gone, the rest still hold the peak
queue seconds slack / ln(1 / (1 - objective)): were waits exponential with this mean, the objective's share of them
              would lie inside the slack
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from export.deployment.capacity import Capacity, capacity_of
from export.deployment.figures import ModelFigures
from export.deployment.schedule import Schedule
from tickserve.config import DeploySettings
from tickserve.errors import UsageError

MI = 2**20
STEP_MI = 64
# The chart's default of model.sizeLimit.
DEFAULT_SIZE_LIMIT = 1 << 30


@dataclass(frozen=True)
class Value:
    """One chart value: `path` by dots; with `left` it is not written, and the reason says why."""

    path: str
    value: Any
    reason: str
    source: str
    left: bool = False

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; a value that is left to the chart is null."""
        return {
            "path": self.path,
            "value": None if self.left else self.value,
            "left_to_chart": self.left,
            "reason": self.reason,
            "source": self.source,
        }


@dataclass(frozen=True)
class Memory:
    """Bytes of a pod that were measured, and how."""

    bytes: int
    source: str


@dataclass(frozen=True)
class Wanted:
    """What the operator says rather than a measurement: the image, the GPU, how pods are scaled."""

    image: str | None = None
    gpu: bool = False
    objective: float | None = None
    prometheus: str | None = None
    max_replicas: int | None = None


def values(
    models: Sequence[ModelFigures],
    memory: Memory | None,
    settings: DeploySettings,
    wanted: Wanted,
    calendar: Schedule | None = None,
) -> list[Value]:
    """Every value for a pod that serves `models`, in the order of the chart's file. Raises UsageError."""
    capacities = {model.name: capacity_of(model) for model in models}
    replicas = _replicas(models, capacities, settings, wanted)
    return [
        *_image(wanted),
        replicas,
        _cpu(models, wanted),
        _memory(memory, settings, wanted),
        *_gpu(wanted),
        _names(models),
        _size_limit(models),
        *_access(),
        *_scaling(models, capacities, replicas, settings, wanted, calendar),
        *_freeze(calendar),
        *_slo(models, settings, wanted),
    ]


def _left(path: str, reason: str) -> Value:
    return Value(path, None, f"left to the chart: {reason}", "", left=True)


def _image(wanted: Wanted) -> list[Value]:
    if wanted.image is None:
        return [_left("image", "no --image; name registry, repository, tag and digest before you install")]
    found = parse_image(wanted.image)
    values = [Value(f"image.{key}", value, "as it was given", "--image") for key, value in found.items() if value]
    if not found["digest"]:
        values.append(
            _left("image.digest", "the image was given without one; only your registry knows it, after the push")
        )
    return values


def parse_image(text: str) -> dict[str, str]:
    """`registry/repository:tag@digest` in its parts, those that are missing empty. Raises UsageError."""
    name, _, digest = text.partition("@")
    if digest and not (digest.startswith("sha256:") and len(digest) == 71):
        raise UsageError("not a digest", field="--image", expected="...@sha256:<64 hex digits>", was=digest[:80])
    first, slash, rest = name.partition("/")
    # As container runtimes read it: the first part is a host when it has a dot, a port, or is localhost.
    host = first if slash and ("." in first or ":" in first or first == "localhost") else ""
    repository, _, tag = (rest if host else name).partition(":")
    if not repository or (not tag and not digest) or tag == "latest":
        raise UsageError(
            "what runs has to be known",
            field="--image",
            expected="registry/repository:tag@sha256:..., the tag not latest",
            was=text[:80],
        )
    return {"registry": host, "repository": repository, "tag": tag, "digest": digest}


def _replicas(
    models: Sequence[ModelFigures],
    capacities: dict[str, Capacity | None],
    settings: DeploySettings,
    wanted: Wanted,
) -> Value:
    if wanted.gpu:
        return _left("replicaCount", "service times were measured on a CPU; what a GPU answers is not known from them")
    parts, need = [], settings.min_replicas
    for model in models:
        capacity = capacities[model.name]
        if model.rate is None:
            return _left("replicaCount", f"no rate of {model.name} is known (--rate, --arrivals, or batching derive)")
        if capacity is None or math.isnan(capacity.per_second):
            return _left("replicaCount", f"no served times of {model.name} are known (run tickserve batching derive)")
        busy = model.rate.per_second / (capacity.per_second * settings.utilisation)
        spare = model.rate.per_second / capacity.per_second
        need = max(need, math.ceil(busy), math.ceil(spare) + 1)
        parts.append(
            f"{model.name}: peak {model.rate.per_second:.4g} requests/s of {model.rate.rows:.3g} rows; one pod answers "
            f"{capacity.per_second:.4g}/s (batches of {capacity.batch} take {capacity.batch_us:.0f} us, a request "
            f"{'' if capacity.measured else 'at most '}{capacity.request_us:.0f} us of its cores)"
        )
    reason = (
        f"{'; '.join(parts)}. At most {settings.utilisation:.0%} of a pod is planned for, the rest hold the peak when "
        f"one is gone, and at least {settings.min_replicas}"
    )
    return Value("replicaCount", need, reason, _sources(models))


def _sources(models: Sequence[ModelFigures]) -> str:
    figures = ((model.rate, model.service, model.cpu) for model in models)
    found = [each.source for three in figures for each in three if each is not None]
    return "; ".join(dict.fromkeys(found))


def _cpu(models: Sequence[ModelFigures], wanted: Wanted) -> Value:
    if wanted.gpu:
        return _left("resources.limits.cpu", "what a GPU server takes of its CPUs was not measured here")
    cores = sum(model.setting.instances * model.threads for model in models)
    shown = " + ".join(f"{model.name} {model.setting.instances} x {model.threads}" for model in models)
    reason = (
        f"instances x threads: {shown}. Whole cores, requests equal to limits. Triton's own threads share them, which "
        "is why replicaCount counts all that a request takes of the server"
    )
    return Value("resources.limits.cpu", str(cores), reason, "config.pbtxt of the versions in force")


def _memory(memory: Memory | None, settings: DeploySettings, wanted: Wanted) -> Value:
    if wanted.gpu:
        return _left("resources.limits.memory", "what a GPU server takes (CUDA, pinned memory) was not measured here")
    if memory is None:
        return _left("resources.limits.memory", "memory was not measured (--memory chart)")
    reason = (
        f"{memory.bytes / MI:.0f} Mi measured, times {settings.memory_headroom:g} (deploy.memory_headroom, a choice) "
        f"for what the allocator keeps, in steps of {STEP_MI} Mi, and no less than {settings.min_memory_mb} "
        "(deploy.min_memory_mb, a choice), because production's build of Triton was not measured; requests are equal"
    )
    return Value("resources.limits.memory", f"{memory_mi(memory.bytes, settings)}Mi", reason, memory.source)


def memory_mi(measured: int, settings: DeploySettings) -> int:
    """The memory of a pod in Mi for what was measured in bytes."""
    needed = max(measured * settings.memory_headroom / MI, settings.min_memory_mb)
    return math.ceil(needed / STEP_MI) * STEP_MI


def _gpu(wanted: Wanted) -> list[Value]:
    return [Value("gpu.enabled", True, "asked for", "--gpu")] if wanted.gpu else []


def _names(models: Sequence[ModelFigures]) -> Value:
    versions = ", ".join(f"{model.name} version {model.version}" for model in models)
    return Value("model.names", [model.name for model in models], f"in force: {versions}", "current.json")


def _size_limit(models: Sequence[ModelFigures]) -> Value:
    stored = sum(model.bytes for model in models)
    if 2 * stored <= DEFAULT_SIZE_LIMIT:
        return _left("model.sizeLimit", f"these models take {stored / MI:.1f} Mi of the repository, twice that fits")
    limit = math.ceil(2 * stored / MI / STEP_MI) * STEP_MI
    reason = f"these models take {stored / MI:.1f} Mi of the repository; twice that, since a publish adds a version"
    return Value("model.sizeLimit", f"{limit}Mi", reason, "the files of the repository")


def _access() -> list[Value]:
    where = "name them in a second values file (docs/deploy-values.md)"
    return [
        _left("networkPolicy.callers", f"who may score is no measurement: nobody, until you {where}"),
        _left("networkPolicy.prometheus", f"nor is who may scrape: nobody, until you {where}; scaling needs it"),
    ]


def _scaling(
    models: Sequence[ModelFigures],
    capacities: dict[str, Capacity | None],
    replicas: Value,
    settings: DeploySettings,
    wanted: Wanted,
    calendar: Schedule | None,
) -> list[Value]:
    threshold = _threshold(models, capacities, settings, wanted)
    bounds = _bounds(replicas, settings, wanted, calendar)
    found: list[Value] = []
    for section in ("autoscaling", "keda"):
        found += [_under(section, each) for each in (*bounds, threshold)]
    if calendar is not None and calendar.triggers:
        found += _keda(wanted, calendar)
    return found


def _under(section: str, value: Value) -> Value:
    return Value(f"{section}.{value.path}", value.value, value.reason, value.source, value.left)


def _threshold(
    models: Sequence[ModelFigures],
    capacities: dict[str, Capacity | None],
    settings: DeploySettings,
    wanted: Wanted,
) -> Value:
    path = "queueSecondsPerRequest"
    if wanted.gpu:
        return _left(path, "the slack on a GPU is not known from service times of a CPU")
    objective = wanted.objective or settings.objective
    slacks = []
    for model in models:
        capacity = capacities[model.name]
        if capacity is None:
            return _left(path, f"no service times of {model.name} are known (run tickserve batching derive)")
        slacks.append((capacity.slack_us, model.name, capacity.batch))
    slack, name, batch = min(slacks)
    factor = math.log(1 / (1 - objective))
    reason = (
        f"{name} may wait {slack / 1e3:.3g} ms and still be answered in a batch of {batch}; a mean wait of a "
        f"{factor:.1f}th of it keeps {objective:.3%} of exponential waits inside"
    )
    return Value(path, float(f"{slack / 1e6 / factor:.3g}"), reason, _sources(models))


def _bounds(replicas: Value, settings: DeploySettings, wanted: Wanted, calendar: Schedule | None) -> list[Value]:
    ahead = max((each.replicas for each in calendar.triggers), default=0) if calendar else 0
    if replicas.left:
        reason = replicas.reason.removeprefix("left to the chart: ")
        least = _left("minReplicas", reason)
        if not ahead and wanted.max_replicas is None:
            return [least, _left("maxReplicas", reason)]
    else:
        least = Value("minReplicas", replicas.value, "as replicaCount: the peak needs them", replicas.source)
    if wanted.max_replicas is not None:
        most = Value("maxReplicas", wanted.max_replicas, "as it was given", "--max-replicas")
    elif replicas.left:
        most = _most(ahead, f"the {ahead} that the calendar asks for before the open", settings)
    elif ahead > replicas.value:
        most = _most(ahead, f"the {ahead} of the calendar, more than replicaCount", settings)
    else:
        most = _most(replicas.value, "replicaCount", settings)
    lowest = 0 if least.left else least.value
    if most.value < max(lowest, ahead):
        raise UsageError(
            "fewer than are needed",
            field="--max-replicas",
            expected=f"at least {max(lowest, ahead)}",
            was=str(most.value),
        )
    return [least, most]


def _most(pods: int, what: str, settings: DeploySettings) -> Value:
    """What the autoscaler may go up to: room above the pods that are there anyway, so above a pre-scale too."""
    count = math.ceil(round(pods * settings.growth, 9))
    return Value("maxReplicas", count, f"{settings.growth:g} times {what} (deploy.growth, a choice)", "configuration")


def _keda(wanted: Wanted, calendar: Schedule) -> list[Value]:
    until = calendar.end.date().isoformat()
    idle = sum(each.to_json()["hours"] for each in calendar.idle)
    reason = (
        f"weekly, in the market's time zone; what else trades until {until} has a dated trigger. Holidays and "
        f"half-days until then keep pods for {idle:.1f} h that no session asks for: cron knows weekdays only"
    )
    if wanted.prometheus is None:
        raise UsageError(
            "KEDA asks Prometheus how long requests wait",
            field="--prometheus",
            expected="its address, with a calendar that has [prescale]",
        )
    return [
        Value(
            "keda.enabled", True, "the calendar asks for pods before the open, and KEDA alone knows cron", "--calendar"
        ),
        Value("keda.prometheusAddress", wanted.prometheus, "as it was given", "--prometheus"),
        Value("keda.preScale", [each.to_json() for each in calendar.triggers], reason, "--calendar"),
    ]


def _freeze(calendar: Schedule | None) -> list[Value]:
    if calendar is None:
        return []
    first, last = calendar.start.date(), calendar.end.date()
    if not calendar.windows:
        return [_left("changeFreeze", f"the calendar has no freeze window from {first} to {last}: nothing is frozen")]
    reason = f"the sessions with their margins from {first} to {last}; render again before then"
    return [
        Value("changeFreeze.enabled", True, "the calendar has freeze windows", "--calendar"),
        Value("changeFreeze.windows", [each.to_json() for each in calendar.windows], reason, "--calendar"),
    ]


def _slo(models: Sequence[ModelFigures], settings: DeploySettings, wanted: Wanted) -> list[Value]:
    model = min(models, key=lambda each: each.deadline_us)
    source = "--objective" if wanted.objective else "deploy.objective of the configuration"
    deadline = model.deadline_us / 1_000
    shown = int(deadline) if deadline == int(deadline) else round(deadline, 3)
    reason = "the deadline that the engines call with" if len(models) == 1 else f"the shortest: that of {model.name}"
    reason_of_objective = (
        "share of calls answered inside it; alerts hold monitoring.slo_objective, for which their rules were rendered"
    )
    return [
        Value("slo.deadlineMs", shown, reason, model.deadline_source),
        Value("slo.objective", wanted.objective or settings.objective, reason_of_objective, source),
    ]

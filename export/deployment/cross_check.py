"""Values against what is published and what was measured: contradictions are refused, doubts are warned about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from export.batching import lint
from export.batching.rules import slack_us
from export.deployment import quantity
from export.deployment.figures import ModelFigures, read_derived, read_model
from export.deployment.finding import Finding, note, refused, warning
from export.deployment.queue_bound import queue_bound
from export.deployment.sizing import MI, memory_mi
from tickserve.config import Config
from tickserve.pipeline import models_in

# Findings of the batching rules that contradict the deadline; the others are about how the queue behaves.
OF_TIME = ("default_timeout_microseconds", "max_queue_delay_microseconds")
SCALERS = ("autoscaling", "keda")


def check(
    values: dict[str, Any], record: dict[str, Any] | None, repository: Path, tables: Path, config: Config
) -> list[Finding]:
    """Everything that the schemas cannot know of the merged `values`. Raises ArtifactError for a broken repository."""
    named = list(values.get("model", {}).get("names") or ())
    published = set(models_in(repository))
    deadline_us = float(values["slo"]["deadlineMs"]) * 1_000
    models = [_figures(repository, name, tables, deadline_us) for name in named if name in published]
    return [
        *_names(named, published),
        *_image(values),
        *_memory(values, record, config),
        *_versions(models, record),
        *_cpu(values, models, set(named) <= published),
        *_scaling(values),
        *_callers(values),
        *_scraped(values),
        *(finding for model in models for finding in _times(values, model)),
        *_freeze(values),
    ]


def _figures(repository: Path, name: str, tables: Path, deadline_us: float) -> ModelFigures:
    return read_model(
        repository,
        name,
        derived=read_derived(tables, name),
        deadline_us=deadline_us,
        default_deadline_us=deadline_us,
    )


def _names(named: Sequence[str], published: set[str]) -> Iterator[Finding]:
    if not named:
        yield warning("model.names", "empty: nothing could be held against a manifest; name the models that are served")
    elif not published:
        yield note("model.names", "no repository with models here (--repository): not held against manifests")
    else:
        for name in named:
            if name not in published:
                have = ", ".join(sorted(published))
                yield refused("model.names", f"expected a published model ({have}), was {name!r}")


def _image(values: dict[str, Any]) -> Iterator[Finding]:
    if not values["image"].get("digest"):
        yield warning("image.digest", "empty: a tag can be moved; take the digest that your registry said at the push")


def _memory(values: dict[str, Any], record: dict[str, Any] | None, config: Config) -> Iterator[Finding]:
    field = "resources.limits.memory"
    limit = quantity.parse(values["resources"]["limits"].get("memory"))
    measured = (record or {}).get("memory") or {}
    if not measured.get("bytes"):
        yield note(
            field, "not held against a measurement: no record of one beside the values (tickserve deploy render)"
        )
        return
    taken, shown = int(measured["bytes"]), f"{int(measured['bytes']) / MI:.0f}Mi"
    if values["gpu"]["enabled"]:
        yield note(field, "a GPU server's memory was not measured on a CPU: watch the pod's working set")
    elif limit is None or limit < taken:
        was = values["resources"]["limits"].get("memory")
        yield refused(field, f"expected at least the {shown} that were measured ({measured['source']}), was {was}")
    elif limit < memory_mi(taken, config.deploy) * MI:
        advised = memory_mi(taken, config.deploy)
        reason = f"{limit / MI:.0f}Mi is less than the {advised}Mi that [deploy] asks for over the {shown} measured"
        yield warning(field, reason)


def _versions(models: Sequence[ModelFigures], record: dict[str, Any] | None) -> Iterator[Finding]:
    known = {str(each["name"]): each for each in (record or {}).get("models", ())}
    for model in models:
        then = known.get(model.name)
        if then is not None and then["manifest_sha256"] != model.manifest_sha256:
            reason = f"{model.name}: version {then['version']} was measured, in force is {model.version}; render again"
            yield warning("model.names", reason)


def _cpu(values: dict[str, Any], models: Sequence[ModelFigures], whole: bool) -> Iterator[Finding]:
    limit = quantity.parse(values["resources"]["limits"].get("cpu"))
    wanted = sum(model.setting.instances * model.threads for model in models)
    if models and whole and not values["gpu"]["enabled"] and limit is not None and limit < wanted:
        reason = f"{limit} for {wanted} (instances x threads of config.pbtxt): the kernel will stop them in turns"
        yield warning("resources.limits.cpu", reason)


def _scaling(values: dict[str, Any]) -> Iterator[Finding]:
    on = [name for name in SCALERS if values[name]["enabled"]]
    for name in on:
        least, most = values[name]["minReplicas"], values[name]["maxReplicas"]
        if least > most:
            yield refused(f"{name}.maxReplicas", f"expected at least minReplicas ({least}), was {most}")
        if least < 2:
            yield warning(f"{name}.minReplicas", f"{least}: a drain or a crash leaves nobody to answer")
    if not on and values["replicaCount"] < 2:
        yield warning("replicaCount", f"{values['replicaCount']}: a drain or a crash leaves nobody to answer")
    if "keda" in on:
        yield from _prescale(values["keda"])


def _prescale(keda: dict[str, Any]) -> Iterator[Finding]:
    most = keda["maxReplicas"]
    for trigger in keda["preScale"]:
        field, asked = f"keda.preScale ({trigger['name']})", trigger["replicas"]
        if asked > most:
            yield refused(field, f"expected at most keda.maxReplicas ({most}), was {asked}: KEDA would cut it off")
        elif asked == most:
            yield warning(field, f"all {most} of keda.maxReplicas: at the open nothing is left to scale to")


def _callers(values: dict[str, Any]) -> Iterator[Finding]:
    policy = values["networkPolicy"]
    if policy["enabled"] and not policy["callers"] and not values["sidecar"]["enabled"]:
        yield warning("networkPolicy.callers", "empty: nobody but helm test may score; name the engines")


def _scraped(values: dict[str, Any]) -> Iterator[Finding]:
    on = [name for name in SCALERS if values[name]["enabled"]]
    monitored, policy = values["serviceMonitor"]["enabled"], values["networkPolicy"]
    why = f": {on[0]} scales on what Prometheus scrapes from the pods, and would see no queue" if on else ""
    if on and not monitored:
        yield warning("serviceMonitor.enabled", f"false{why}; leave it so only where Prometheus finds the pods itself")
    if (on or monitored) and policy["enabled"] and not policy["prometheus"]:
        yield warning("networkPolicy.prometheus", f"empty, so Prometheus may not reach port 8002{why}")


def _times(values: dict[str, Any], model: ModelFigures) -> Iterator[Finding]:
    service = model.service.times if model.service and model.service.served else None
    slack = model.deadline_us if service is None else slack_us(model.deadline_us, service, 1)
    if service is not None and slack <= 0:
        need = service.overhead_us + service.mean_us(1)
        reason = f"expected more than the {need / 1e3:.3g} ms of a lone request to {model.name}"
        yield refused("slo.deadlineMs", f"{reason}, was {model.deadline_us / 1e3:g}")
        return
    for found in lint(model.setting, deadline_us=model.deadline_us, service=service):
        made = refused if found.field in OF_TIME else warning
        reason = f"{found.reason} (slo.deadlineMs)"
        if found.field == "max_queue_size":
            reason = f"{found.reason}; {queue_bound(model, gpu=values['gpu']['enabled']).advice}"
        yield made(f"{model.name}/config.pbtxt: {found.field}", reason)
    for name in SCALERS:
        wait = float(values[name]["queueSecondsPerRequest"])
        if values[name]["enabled"] and wait * 1e6 >= slack:
            reason = f"expected less than the {slack / 1e6:.4g} s that a request to {model.name} may wait, was {wait:g}"
            yield refused(f"{name}.queueSecondsPerRequest", f"{reason}: replicas would come when it is too late")


def _freeze(values: dict[str, Any]) -> Iterator[Finding]:
    freeze = values["changeFreeze"]
    if not freeze["enabled"]:
        return
    if not freeze["windows"]:
        yield warning("changeFreeze.windows", "empty: nothing is frozen; render with a calendar that has sessions")
        return
    ends = [datetime.fromisoformat(str(window["end"])) for window in freeze["windows"]]
    left = max((end - datetime.now(UTC)).total_seconds() / 86_400 for end in ends)
    if left < 0:
        yield warning("changeFreeze.windows", "none lies ahead: nothing is frozen any more; render again")
    elif left < 7:
        yield warning("changeFreeze.windows", f"the last one ends in {left:.1f} days; render again before then")

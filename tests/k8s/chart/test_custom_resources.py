"""ScaledObject, ServiceMonitor and PrometheusRule against the schemas of their projects; RayJob as far as can be.

The first three schemas come with npm packages that are generated from the projects' own definitions. No registry has
KubeRay's, so a RayJob's own few fields are held to a list written from KubeRay's definition, and each of its pods to
Kubernetes' schema.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.k8s.chart.rendering import (
    CHART,
    NEWEST,
    NODE_MODULES,
    OLDEST,
    ROOT,
    SCENARIOS,
    Object,
    installed,
    objects,
    of_kind,
    ray_templates,
    the,
)

KINDS = {"ScaledObject", "ServiceMonitor", "PrometheusRule"}
JUDGE = Path(__file__).with_name("custom_resources.mjs")
GROUP = """
name: triton
interval: 30s
rules:
  - record: tickserve:x
    expr: sum(rate(x[5m]))
  - alert: Slow
    expr: tickserve:x > 1
    for: 5m
    labels: {severity: page}
    annotations: {summary: "{{ $labels.model }} is slow"}
"""


def judged(items: list[Object]) -> list[list[str]]:
    """What is wrong with each object, as its own schema says."""
    installed(NODE_MODULES / "@kubernetes-models" / "keda" / "package.json")
    done = subprocess.run(["node", JUDGE], input=json.dumps(items), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said: list[list[str]] = json.loads(done.stdout)
    return said


def with_a_rule(rule: Object) -> Object:
    return {**rule, "spec": {"groups": [*rule["spec"]["groups"], yaml.safe_load(GROUP)]}}


def test_every_custom_resource_is_valid() -> None:
    found = [item for name in SCENARIOS for item in objects(name) if item["kind"] in KINDS]
    found = [with_a_rule(item) if item["kind"] == "PrometheusRule" else item for item in found]
    assert {item["kind"] for item in found} == KINDS
    assert judged(found) == [[] for _ in found]


def _key_of(item: Object) -> Object:
    item["spec"]["unheard-of"] = 1
    return item


def _trigger(**changes: Any) -> Callable[[], Object]:
    def spoilt() -> Object:
        item = copy.deepcopy(the(objects("keda"), "ScaledObject"))
        item["spec"]["triggers"][0] |= changes
        return item

    return spoilt


def _endpoint(**changes: Any) -> Callable[[], Object]:
    def spoilt() -> Object:
        item = copy.deepcopy(the(objects("monitoring"), "ServiceMonitor"))
        item["spec"]["endpoints"][0] |= changes
        return item

    return spoilt


def _rule(**changes: Any) -> Callable[[], Object]:
    def spoilt() -> Object:
        item = with_a_rule(copy.deepcopy(the(objects("monitoring"), "PrometheusRule")))
        item["spec"]["groups"][-1]["rules"][1] |= changes
        return item

    return spoilt


SPOILT: dict[str, tuple[Callable[[], Object], str]] = {
    "an unknown key": (lambda: _key_of(copy.deepcopy(the(objects("keda"), "ScaledObject"))), "spec/unheard-of"),
    "an unknown key of a trigger": (_trigger(threshhold="1"), "threshhold is not known"),
    "a number for a text": (_trigger(metadata={"threshold": 1}), '/metadata/threshold type {"type":"string"}'),
    "a trigger without its type": (_trigger(type=None), "type"),
    "an unknown key of an endpoint": (_endpoint(intervall="5s"), "intervall is not known"),
    "an interval that is none": (_endpoint(interval="often"), "/interval pattern"),
    "an unknown key of a rule": (_rule(until="5m"), "until is not known"),
    "a rule without an expression": (_rule(expr=None), "expr"),
}


@functools.cache
def judged_spoilt() -> dict[str, list[str]]:
    return dict(zip(SPOILT, judged([make() for make, _ in SPOILT.values()]), strict=True))


@pytest.mark.parametrize("name", SPOILT)
def test_a_custom_resource_that_is_wrong_is_refused(name: str) -> None:
    assert any(SPOILT[name][1] in text for text in judged_spoilt()[name]), judged_spoilt()[name]


def closed(required: list[str], **properties: Any) -> Object:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
GROUP_OF_WORKERS = closed(
    ["groupName", "rayStartParams", "template"],
    groupName={"type": "string"},
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=TEXTS,
    template={"type": "object"},
)
CLUSTER = closed(
    ["headGroupSpec"],
    rayVersion={"type": "string"},
    enableInTreeAutoscaling={"type": "boolean"},
    headGroupSpec=closed(["rayStartParams", "template"], rayStartParams=TEXTS, template={"type": "object"}),
    workerGroupSpecs={"type": "array", "items": GROUP_OF_WORKERS},
)
RAY_JOB = closed(
    ["entrypoint"],
    entrypoint={"type": "string"},
    submissionMode={"enum": ["K8sJobMode", "HTTPMode"]},
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    submitterPodTemplate={"type": "object"},
    rayClusterSpec=CLUSTER,
)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_a_ray_job_and_its_pods_are_valid(version: str) -> None:
    (job,) = of_kind(objects("jobs"), "RayJob")
    jsonschema.validate(job["spec"], RAY_JOB)
    assert len(job["metadata"]["name"]) <= 47, "KubeRay's own limit"
    for name, made in ray_templates(job).items():
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": made}
        kubernetes_validate.validate(template, version, strict=True)


def test_ray_is_in_the_version_of_the_lock() -> None:
    (locked,) = re.findall(r"^ray(?:\[[a-z,]+\])?==(\S+)", (ROOT / "requirements-train.lock").read_text(), re.MULTILINE)
    assert yaml.safe_load((CHART / "values.yaml").read_text())["jobs"]["rayJob"]["rayVersion"] == locked
    assert the(objects("jobs"), "RayJob")["spec"]["rayClusterSpec"]["rayVersion"] == locked


def test_the_submitter_is_small() -> None:
    """It hands the job over and waits; the others train."""
    made = ray_templates(the(objects("jobs"), "RayJob"))
    amounts = {name: each["spec"]["containers"][0]["resources"]["limits"] for name, each in made.items()}
    assert amounts["submitter"] == {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "512Mi"}
    assert amounts["head"] == amounts["workers"] == {"cpu": "4", "memory": "8Gi", "ephemeral-storage": "4Gi"}
    for name, size in (("submitter", "341Mi"), ("head", "2730Mi")):
        (shared,) = [each for each in made[name]["spec"]["volumes"] if each["name"] == "shared-memory"]
        assert shared["emptyDir"]["sizeLimit"] == size


def test_a_ray_job_with_an_unknown_key_or_a_wrong_pod_is_refused() -> None:
    (job,) = copy.deepcopy(of_kind(objects("jobs"), "RayJob"))
    made = ray_templates(job)["head"]
    made["spec"]["containers"][0]["imagePullPolice"] = "Always"
    template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": made}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(template, NEWEST, strict=True)
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job["spec"], RAY_JOB)

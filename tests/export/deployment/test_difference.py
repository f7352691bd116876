"""Differences between objects: what changed is named field by field, and nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from export.deployment.chart import key_of
from export.deployment.difference import differences

DEPLOYMENT: dict[str, Any] = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "triton", "namespace": "scoring", "labels": {"a": "b"}},
    "spec": {
        "replicas": 2,
        "paused": False,
        "containers": [
            {"name": "triton", "args": ["--x=1", "--y=2"], "limits": {"memory": "1024Mi"}},
            {"name": "proxy", "args": []},
        ],
    },
}
SERVICE: dict[str, Any] = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "triton"}, "spec": {}}


def changed(spoil: Callable[[dict[str, Any]], object]) -> list[tuple[str, str, Any, Any]]:
    other = copy.deepcopy(DEPLOYMENT)
    spoil(other)
    found = differences([SERVICE, DEPLOYMENT], [other, SERVICE])
    assert {each.object for each in found} <= {"Deployment.apps/scoring/triton"}
    return [(each.path, each.what, each.before, each.after) for each in found]


def test_the_same_objects_in_another_order_are_no_difference() -> None:
    assert changed(lambda _: None) == []
    assert changed(lambda d: d["spec"]["containers"].reverse()) == []


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda d: d["spec"].update(replicas=3), ("spec.replicas", "changed", 2, 3)),
        (lambda d: d["spec"].update(replicas="2"), ("spec.replicas", "changed", 2, "2")),
        (lambda d: d["spec"].update(paused=0), ("spec.paused", "changed", False, 0)),
        (lambda d: d["spec"].update(more=1), ("spec.more", "added", None, 1)),
        (lambda d: d["metadata"].pop("labels"), ("metadata.labels", "removed", {"a": "b"}, None)),
        (
            lambda d: d["spec"]["containers"][0].update(args=["--x=1", "--y=3"]),
            ("spec.containers[triton].args[1]", "changed", "--y=2", "--y=3"),
        ),
        (
            lambda d: d["spec"]["containers"].pop(),
            ("spec.containers[proxy]", "removed", {"name": "proxy", "args": []}, None),
        ),
        (
            lambda d: d["spec"]["containers"][0]["limits"].update(memory="1Gi"),
            ("spec.containers[triton].limits.memory", "changed", "1024Mi", "1Gi"),
        ),
    ],
)
def test_each_change_is_named(spoil: Callable[[dict[str, Any]], object], expected: tuple[Any, ...]) -> None:
    assert changed(spoil) == [expected]


def test_objects_that_come_and_go() -> None:
    moved = copy.deepcopy(SERVICE)
    moved["metadata"]["namespace"] = "other"
    found = differences([SERVICE], [moved])
    assert [(each.object, each.path, each.what) for each in found] == [
        ("Service/other/triton", "", "added"),
        ("Service/triton", "", "removed"),
    ]


def test_another_version_of_a_group_is_the_same_object() -> None:
    assert key_of(DEPLOYMENT) == key_of(DEPLOYMENT | {"apiVersion": "apps/v2"}) == "Deployment.apps/scoring/triton"


def test_of_a_cluster_only_what_was_rendered_is_compared() -> None:
    live = copy.deepcopy(DEPLOYMENT)
    live["status"] = {"replicas": 2}
    live["metadata"]["uid"] = "1"
    live["spec"]["containers"][0] |= {"limits": {"memory": "1Gi"}, "terminationMessagePath": "/dev/termination-log"}
    assert differences([live], [DEPLOYMENT], only_named=True) == []
    live["spec"]["containers"][0]["limits"]["memory"] = "2Gi"
    live["spec"]["replicas"] = 5
    found = differences([live], [DEPLOYMENT], only_named=True)
    assert [(each.path, each.before, each.after) for each in found] == [
        ("spec.replicas", 5, 2),
        ("spec.containers[triton].limits.memory", "2Gi", "1024Mi"),
    ]


def test_a_scaler_as_a_cluster_writes_its_quantity_is_no_difference() -> None:
    def scaler(amount: str) -> dict[str, Any]:
        target = {"type": "AverageValue", "averageValue": amount}
        return {"apiVersion": "autoscaling/v2", "kind": "X", "metadata": {"name": "x"}, "spec": {"target": target}}

    assert differences([scaler("1230u")], [scaler("0.00123")], only_named=True) == []
    assert len(differences([scaler("1240u")], [scaler("0.00123")], only_named=True)) == 1

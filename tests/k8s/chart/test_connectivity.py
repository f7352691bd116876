"""Each connection that the chart needs is allowed by both of its ends, and those it does not need are not."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest

from tests.k8s.chart.connectivity import SPACE, Party, party, reaches
from tests.k8s.chart.rendering import objects, of_kind

MASTER, WORKER = {"tickserve.io/role": "master"}, {"tickserve.io/role": "worker"}


class Way(NamedTuple):
    """A connection in a scenario: the pods' component, or somebody outside the release."""

    scenario: str
    who: str
    whom: str
    port: int
    protocol: str = "TCP"


OUTSIDE = {
    "prometheus": Party({SPACE: "monitoring"}, {"app.kubernetes.io/name": "prometheus"}),
    "dns": Party({SPACE: "kube-system"}, {"k8s-app": "kube-dns"}),
    "engines": Party({SPACE: "trading"}, {"app.kubernetes.io/component": "engine"}),
    "research": Party({SPACE: "research"}, {"app": "notebook"}),
    "kuberay": Party({SPACE: "kuberay-operator"}, {"app.kubernetes.io/name": "kuberay-operator"}),
    "openshift": Party({SPACE: "openshift-dns"}, {"dns.operator.openshift.io/daemonset-dns": "default"}),
    "cache": Party({}, {}, "169.254.20.10"),
    "gateway": Party({}, {}, "10.30.0.9"),
    "neighbour": Party({}, {}, "10.30.0.16"),
    "stranger": Party({SPACE: "elsewhere"}, {"app": "x"}),
}
ROLES = {"master": MASTER, "worker": WORKER}
NEEDED = [
    Way("default", "test", "server", 8000),
    Way("default", "test", "server", 8001),
    Way("mtls", "test", "server", 8001),
    Way("default", "test", "dns", 53, "UDP"),
    Way("default", "test", "dns", 53),
    Way("jobs", "worker", "server", 8000),
    Way("jobs", "worker", "server", 8001),
    Way("jobs", "worker", "master", 5557),
    Way("jobs", "worker", "dns", 53, "UDP"),
    Way("jobs", "master", "dns", 53, "UDP"),
    Way("jobs", "ray", "ray", 6379),
    Way("jobs", "ray", "ray", 8265),
    Way("jobs", "ray", "dns", 53, "UDP"),
    Way("monitoring", "prometheus", "server", 8002),
    Way("s3-sync", "server", "dns", 53, "UDP"),
    Way("jobs", "kuberay", "ray", 8265),
    Way("dns", "test", "openshift", 5353, "UDP"),
    Way("dns", "test", "openshift", 5353),
    Way("dns", "test", "cache", 5353, "UDP"),
    Way("dns", "gateway", "server", 8001),
    Way("cpu", "engines", "server", 8001),
    Way("cpu", "research", "server", 8000),
]
REFUSED = [
    Way("default", "stranger", "server", 8001),
    Way("default", "prometheus", "server", 8002),
    Way("monitoring", "prometheus", "server", 8000),
    Way("monitoring", "prometheus", "server", 8001),
    Way("cpu", "engines", "server", 8000),
    Way("default", "test", "server", 8002),
    Way("dns", "test", "dns", 53, "UDP"),
    Way("dns", "test", "openshift", 53, "UDP"),
    Way("dns", "test", "neighbour", 5353, "UDP"),
    Way("dns", "gateway", "server", 8000),
    Way("dns", "neighbour", "server", 8001),
    Way("default", "gateway", "server", 8001),
    Way("default", "test", "stranger", 443),
    Way("default", "server", "dns", 53, "UDP"),
    Way("jobs", "training", "server", 8001),
    Way("jobs", "training", "dns", 53, "UDP"),
    Way("jobs", "stranger", "master", 5557),
    Way("jobs", "stranger", "ray", 8265),
]


def end(scenario: str, name: str) -> Party:
    if name in OUTSIDE:
        return OUTSIDE[name]
    return party(objects(scenario), "loadtest" if name in ROLES else name, **ROLES.get(name, {}))


def allowed(way: Way, items: object = None) -> bool:
    held = objects(way.scenario) if items is None else items
    assert isinstance(held, (list, tuple))
    return reaches(held, end(way.scenario, way.who), end(way.scenario, way.whom), way.port, way.protocol)


@pytest.mark.parametrize("way", NEEDED, ids=lambda way: " ".join(map(str, way)))
def test_both_ends_allow_what_is_needed(way: Way) -> None:
    assert allowed(way)


@pytest.mark.parametrize("way", REFUSED, ids=lambda way: " ".join(map(str, way)))
def test_nobody_else_gets_through(way: Way) -> None:
    assert not allowed(way)


@pytest.mark.parametrize("way", NEEDED, ids=lambda way: " ".join(map(str, way)))
def test_without_the_rules_of_either_end_it_does_not_come_about(way: Way) -> None:
    for side in ("ingress", "egress"):
        items = copy.deepcopy(list(objects(way.scenario)))
        own = end(way.scenario, way.whom if side == "ingress" else way.who)
        if not own.of_the_release:
            continue
        for policy in of_kind(items, "NetworkPolicy"):
            policy["spec"].pop(side, None)
        assert not allowed(way, items), side

"""Who reaches whom under the NetworkPolicies of a release: both ends have to allow it, by egress and by ingress."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any, NamedTuple

from tests.k8s.chart.conditions import Objects
from tests.k8s.chart.rendering import NAMESPACE, Object, of_kind, pods

SPACE = "kubernetes.io/metadata.name"


class Party(NamedTuple):
    """A pod: the labels of its namespace, and its own; or an address outside the cluster."""

    namespace: dict[str, str]
    labels: dict[str, str]
    address: str = ""

    @property
    def of_the_release(self) -> bool:
        """Only the release's own namespace has policies of the release."""
        return self.namespace.get(SPACE) == NAMESPACE


def party(items: Objects, component: str, **labels: str) -> Party:
    """The pod of a component; of several with the same labels any."""
    wanted = {"app.kubernetes.io/component": component, **labels}
    found = [pod for pod in pods(items) if wanted.items() <= pod.metadata["labels"].items()]
    return Party({SPACE: NAMESPACE}, found[0].metadata["labels"])


def _matches(selector: Object, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "this reads no expressions"
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def _is_peer(peer: Object, other: Party) -> bool:
    if "ipBlock" in peer or other.address:
        return (
            "ipBlock" in peer
            and bool(other.address)
            and ip_address(other.address) in ip_network(peer["ipBlock"]["cidr"])
        )
    in_space = _matches(peer["namespaceSelector"], other.namespace) if "namespaceSelector" in peer else None
    if in_space is None:
        in_space = other.of_the_release
    return in_space and _matches(peer.get("podSelector", {}), other.labels)


def _one_way(items: Objects, way: str, side: str, own: Party, other: Party, port: int, protocol: str) -> bool:
    """Whether the policies that hold `own` allow it. A pod that none holds may do everything."""
    held = [
        policy["spec"]
        for policy in of_kind(items, "NetworkPolicy")
        if own.of_the_release
        and way.capitalize() in policy["spec"]["policyTypes"]
        and _matches(policy["spec"]["podSelector"], own.labels)
    ]
    wanted: dict[str, Any] = {"port": port, "protocol": protocol}
    return not held or any(
        any(_is_peer(peer, other) for peer in rule[side]) and ("ports" not in rule or wanted in rule["ports"])
        for spec in held
        for rule in spec.get(way, [])
    )


def reaches(items: Objects, who: Party, whom: Party, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection comes about."""
    leaves = _one_way(items, "egress", "to", who, whom, port, protocol)
    return leaves and _one_way(items, "ingress", "from", whom, who, port, protocol)

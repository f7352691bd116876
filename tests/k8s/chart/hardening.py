"""The hardening list, a line a rule: what is asked of the objects of any scenario, and what breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from tests.k8s.chart.conditions import (
    AMOUNTS,
    Objects,
    bounded_scratch,
    closed_apis,
    default_deny,
    disruption_budgets,
    each_container,
    each_object,
    each_pod,
    each_server,
    equal_amounts,
    grace_adds_up,
    known_volumes,
    labelled,
    models_read_only,
    mount,
    named_peers,
    no_rights,
    no_secret_literal,
    no_secret_variable,
    own_account,
    probes,
    readable_to_its_group,
    replicas,
    rollout,
    secrets_read_only,
    security,
    shared_memory,
    spread,
    tagged,
    verified,
)
from tests.k8s.chart.rendering import Object, Pod, container, of_kind, pods, the


class Rule(NamedTuple):
    """One line of the list: what is wrong with objects, and how to break those of a scenario."""

    wrong: Callable[[Objects], Iterable[str]]
    spoil: Callable[[list[Object]], object]
    scenario: str = "default"


def first(items: list[Object]) -> Pod:
    """The server's pod, to be broken."""
    return next(pods([the(items, "Deployment")]))


def triton(items: list[Object]) -> Object:
    return container(first(items), "triton")


def _rule(items: list[Object], name: str, way: str) -> Object:
    return the(items, "NetworkPolicy", name)["spec"][way][0]


RULES: dict[str, Rule] = {
    "non-root": Rule(
        each_pod(
            lambda p: p.spec["securityContext"]["runAsNonRoot"] and p.spec["securityContext"]["runAsUser"] >= 1000
        ),
        lambda items: first(items).spec["securityContext"].update(runAsUser=0),
    ),
    "no container is another user": Rule(
        each_container(lambda c: not {"runAsUser", "runAsGroup", "runAsNonRoot"} & set(security(c))),
        lambda items: security(triton(items)).update(runAsUser=0),
    ),
    "seccomp": Rule(
        each_pod(lambda p: p.spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"),
        lambda items: first(items).spec["securityContext"]["seccompProfile"].update(type="Unconfined"),
    ),
    "no service account token": Rule(
        each_pod(lambda p: p.spec["automountServiceAccountToken"] is False),
        lambda items: first(items).spec.update(automountServiceAccountToken=True),
    ),
    "an account of its own": Rule(
        own_account, lambda items: the(items, "ServiceAccount").pop("automountServiceAccountToken")
    ),
    "no rights in the cluster": Rule(
        no_rights, lambda items: items.append({"kind": "RoleBinding", "metadata": {"name": "x"}})
    ),
    "no service variables": Rule(
        each_pod(lambda p: p.spec["enableServiceLinks"] is False),
        lambda items: first(items).spec.update(enableServiceLinks=True),
    ),
    "no hostNetwork": Rule(
        each_pod(lambda p: "hostNetwork" not in p.spec), lambda items: first(items).spec.update(hostNetwork=True)
    ),
    "no hostPID": Rule(
        each_pod(lambda p: "hostPID" not in p.spec), lambda items: first(items).spec.update(hostPID=True)
    ),
    "no hostIPC": Rule(
        each_pod(lambda p: "hostIPC" not in p.spec), lambda items: first(items).spec.update(hostIPC=True)
    ),
    "no hostPort": Rule(
        each_container(lambda c: all("hostPort" not in port for port in c.get("ports", []))),
        lambda items: triton(items)["ports"][0].update(hostPort=8000),
    ),
    "no hostPath, and no volume of another kind": Rule(
        each_pod(known_volumes),
        lambda items: first(items).spec["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    ),
    "scratch space has a limit": Rule(
        each_pod(bounded_scratch),
        lambda items: first(items).spec["volumes"].append({"name": "x", "emptyDir": {}}),
    ),
    "read-only root": Rule(
        each_container(lambda c: security(c)["readOnlyRootFilesystem"] is True),
        lambda items: security(triton(items)).update(readOnlyRootFilesystem=False),
    ),
    "no capability": Rule(
        each_container(lambda c: security(c)["capabilities"] == {"drop": ["ALL"]}),
        lambda items: security(triton(items))["capabilities"].update(add=["NET_ADMIN"]),
    ),
    "no privilege escalation": Rule(
        each_container(lambda c: security(c)["allowPrivilegeEscalation"] is False),
        lambda items: security(first(items).containers[0]).update(allowPrivilegeEscalation=True),
    ),
    "not privileged": Rule(
        each_container(lambda c: security(c)["privileged"] is False),
        lambda items: security(triton(items)).update(privileged=True),
    ),
    "resources set and equal": Rule(
        each_container(equal_amounts), lambda items: triton(items)["resources"]["requests"].update(cpu="1")
    ),
    "every amount is limited": Rule(
        each_container(lambda c: set(c["resources"]["limits"]) >= AMOUNTS),
        lambda items: [part.pop("memory") for part in triton(items)["resources"].values()],
    ),
    "an image with a tag or a digest, not latest": Rule(
        each_container(lambda c: tagged(c["image"])),
        lambda items: triton(items).update(image="registry.example.com:5000/tickserve-server:latest"),
    ),
    "a pull policy": Rule(
        each_container(lambda c: c["imagePullPolicy"] in ("IfNotPresent", "Always")),
        lambda items: triton(items).pop("imagePullPolicy"),
    ),
    "no secret in a variable": Rule(
        each_container(no_secret_variable),
        lambda items: triton(items)["env"][0].update(value="a value in the open"),
    ),
    "no secret in any object": Rule(
        each_object(no_secret_literal),
        lambda items: items.append({"kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"a": "f0" * 32}}),
    ),
    "no Secret made": Rule(
        each_object(lambda item: item["kind"] != "Secret"),
        lambda items: items.append({"kind": "Secret", "metadata": {"name": "x"}}),
    ),
    "secrets mounted read-only, for nobody else": Rule(
        each_pod(secrets_read_only),
        lambda items: mount(container(first(items), "triton"), "/etc/tickserve/tls").update(readOnly=False),
        "mtls",
    ),
    "mounted secrets are the pod's group's": Rule(
        each_pod(readable_to_its_group), lambda items: first(items).spec["securityContext"].pop("fsGroup"), "mtls"
    ),
    "labels on pods": Rule(
        each_pod(lambda p: labelled(p.metadata["labels"])),
        lambda items: first(items).metadata["labels"].pop("app.kubernetes.io/instance"),
    ),
    "labels on objects": Rule(
        each_object(
            lambda item: labelled(item["metadata"]["labels"]) and "helm.sh/chart" in item["metadata"]["labels"]
        ),
        lambda items: the(items, "PodDisruptionBudget")["metadata"]["labels"].pop("app.kubernetes.io/name"),
    ),
    "probes that mean something": Rule(
        each_server(probes),
        lambda items: triton(items)["livenessProbe"]["httpGet"].update(path="/v2/health/ready"),
    ),
    "the grace period adds up": Rule(
        each_server(grace_adds_up), lambda items: first(items).spec.update(terminationGracePeriodSeconds=35)
    ),
    "a rollout loses no replica and waits": Rule(
        each_server(rollout),
        lambda items: the(items, "Deployment")["spec"]["strategy"]["rollingUpdate"].update(maxUnavailable=1),
    ),
    "models read-only": Rule(
        each_server(models_read_only), lambda items: mount(triton(items), "/models").update(readOnly=False)
    ),
    "models verified": Rule(
        each_server(verified), lambda items: container(first(items), "model-sync")["args"].remove("--require-signature")
    ),
    "closed calls ask for a secret": Rule(
        each_server(closed_apis),
        lambda items: triton(items).update(args=[text for text in triton(items)["args"] if "restricted" not in text]),
    ),
    "spread over nodes": Rule(
        each_server(spread), lambda items: first(items).spec.update(topologySpreadConstraints=[])
    ),
    "shared memory between an engine and its server alone": Rule(
        each_server(shared_memory), lambda items: triton(items)["args"].append("--allow-client-shm=true")
    ),
    "a disruption budget": Rule(
        disruption_budgets, lambda items: the(items, "PodDisruptionBudget")["spec"].update(maxUnavailable="100%")
    ),
    "two replicas, one autoscaler": Rule(
        replicas, lambda items: the(items, "Deployment")["spec"].update(replicas=4), "hpa"
    ),
    "everything denied by default": Rule(
        default_deny, lambda items: the(items, "NetworkPolicy", "-default-deny")["spec"].update(ingress=[{}])
    ),
    "every caller is named": Rule(
        each_object(named_peers, "NetworkPolicy"),
        lambda items: _rule(items, "tickserve", "ingress").update({"from": [{"podSelector": {}}]}),
    ),
    "services inside the cluster alone": Rule(
        each_object(
            lambda item: (
                item["spec"]["type"] == "ClusterIP" and not {"externalIPs", "loadBalancerIP"} & set(item["spec"])
            ),
            "Service",
        ),
        lambda items: of_kind(items, "Service")[0]["spec"].update(type="NodePort"),
    ),
}
# Scenarios that switch a line off, and say so.
SWITCHED_OFF = {("no-network-policy", "everything denied by default")}

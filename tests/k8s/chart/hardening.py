"""The hardening list, a line a rule: what is asked of the objects of any scenario, and what breaks it.

A rule takes the objects of a release and answers with what is wrong: one text for each pod, container or object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from tests.k8s.chart.rendering import Object, Pod, container, of_kind, pods, the

Objects = list[Object] | tuple[Object, ...]
AMOUNTS = {"cpu", "memory", "ephemeral-storage"}
VOLUMES = {"emptyDir", "persistentVolumeClaim", "secret", "image"}
SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_KEY|ACCESS_KEY|PRIVATE_KEY|RESTRICTED_VALUE")
# What looks like a secret wherever it stands: PEM keys, AWS key ids, long random text.
SECRET_VALUE = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY|\bAKIA[0-9A-Z]{16}\b|(?<!sha256:)\b[0-9a-f]{40,}\b")
LABELS = {"name", "instance", "component", "part-of"}


class Rule(NamedTuple):
    """One line of the list: what is wrong with objects, and how to break those of a scenario."""

    wrong: Callable[[Objects], Iterable[str]]
    spoil: Callable[[list[Object]], object]
    scenario: str = "default"


def each_pod(holds: Callable[[Pod], bool]) -> Callable[[Objects], Iterator[str]]:
    """A rule of pods: where it does not hold. What is missing does not hold either."""

    def wrong(items: Objects) -> Iterator[str]:
        for pod in pods(items):
            if not _safely(lambda pod=pod: holds(pod)):
                yield pod.where

    return wrong


def each_container(holds: Callable[[Object], bool]) -> Callable[[Objects], Iterator[str]]:
    """A rule of containers, those that run once among them."""

    def wrong(items: Objects) -> Iterator[str]:
        for pod in pods(items):
            for each in pod.containers:
                if not _safely(lambda each=each: holds(each)):
                    yield f"{pod.where} {each['name']}"

    return wrong


def _safely(holds: Callable[[], bool]) -> bool:
    try:
        return bool(holds())
    except (KeyError, TypeError, AttributeError, ValueError, IndexError):
        return False


def first(items: list[Object]) -> Pod:
    """The server's pod, to be broken."""
    return next(pods([the(items, "Deployment")]))


def triton(items: list[Object]) -> Object:
    return container(first(items), "triton")


def servers(items: Objects) -> Iterator[tuple[Object, Pod, Object]]:
    """(Deployment, pod, container) of what serves."""
    for deployment in of_kind(items, "Deployment"):
        (pod,) = pods([deployment])
        yield deployment, pod, container(pod, "triton")


def each_server(holds: Callable[[Object, Pod, Object], bool]) -> Callable[[Objects], Iterator[str]]:
    """A rule of what serves."""

    def wrong(items: Objects) -> Iterator[str]:
        for deployment, pod, each in servers(items):
            if not _safely(lambda at=(deployment, pod, each): holds(*at)):
                yield pod.where

    return wrong


def each_object(holds: Callable[[Object], bool], *kinds: str) -> Callable[[Objects], Iterator[str]]:
    """A rule of objects of some kinds, or of all."""

    def wrong(items: Objects) -> Iterator[str]:
        for item in items:
            if (not kinds or item["kind"] in kinds) and not _safely(lambda item=item: holds(item)):
                yield f"{item['kind']}/{item['metadata']['name']}"

    return wrong


def security(each: Object) -> Object:
    return each["securityContext"]


def mount(each: Object, path: str) -> Object:
    (found,) = [item for item in each["volumeMounts"] if item["mountPath"] == path]
    return found


def tagged(image: str) -> bool:
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    return bool(re.fullmatch(r"sha256:[0-9a-f]{64}", digest)) if digest else tag not in ("", "latest")


def equal_amounts(each: Object) -> bool:
    limits = each["resources"]["limits"]
    return each["resources"]["requests"] == limits and set(limits) >= AMOUNTS


def known_volumes(pod: Pod) -> bool:
    kinds = [set(volume) - {"name"} for volume in pod.spec.get("volumes", [])]
    return all(len(kind) == 1 and kind <= VOLUMES for kind in kinds)


def bounded_scratch(pod: Pod) -> bool:
    return all(volume["emptyDir"].get("sizeLimit") for volume in pod.spec.get("volumes", []) if "emptyDir" in volume)


def secrets_read_only(pod: Pod) -> bool:
    volumes = {volume["name"]: volume["secret"] for volume in pod.spec.get("volumes", []) if "secret" in volume}
    mounts = [item for each in pod.containers for item in each.get("volumeMounts", []) if item["name"] in volumes]
    return all(item["readOnly"] is True for item in mounts) and all(
        volume["defaultMode"] == 0o440 for volume in volumes.values()
    )


def no_secret_variable(each: Object) -> bool:
    """A variable that is called like a secret has its value from a Secret, or is made of one that has."""
    literals = [item for item in each.get("env", []) if SECRET_NAME.search(item["name"]) and "value" in item]
    return all(re.search(r"\$\([A-Z_]+\)$|^/", item["value"]) for item in literals)


def texts(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)
    elif isinstance(value, str):
        yield value


def no_secret_literal(item: Object) -> bool:
    return item["kind"] != "Secret" and not any(SECRET_VALUE.search(text) for text in texts(item))


def labelled(labels: Object) -> bool:
    return all(labels.get(f"app.kubernetes.io/{name}") for name in LABELS)


def probes(_deployment: Object, _pod: Pod, each: Object) -> bool:
    """Start-up and readiness ask for every model, liveness for the server alone."""

    def asks(name: str, end: str) -> bool:
        probe = each[f"{name}Probe"]
        target = probe["httpGet"]["path"] if "httpGet" in probe else " ".join(probe["exec"]["command"])
        return f"/v2/health/{end}" in target and probe["timeoutSeconds"] <= probe["periodSeconds"]

    return asks("startup", "ready") and asks("liveness", "live") and asks("readiness", "ready")


def argument(each: Object, name: str) -> str | None:
    found = [text.partition("=")[2] for text in each.get("args", []) if text.startswith(f"--{name}=")]
    return found[-1] if found else None


def grace_adds_up(_deployment: Object, pod: Pod, each: Object) -> bool:
    """preStop, then the exit timeout, then something to unload; the embedded server's exit timeout is 2 s."""
    pause = each.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    leaves = int(argument(each, "exit-timeout-secs") or 2)
    beside_an_engine = each.get("restartPolicy") == "Always"
    return (pause >= 5 or beside_an_engine) and pod.spec["terminationGracePeriodSeconds"] >= pause + leaves + 5


def rollout(deployment: Object, _pod: Pod, each: Object) -> bool:
    """No replica is lost, an engine is never there twice; and a rollout is waited for as long as a load may take."""
    strategy, probe = deployment["spec"]["strategy"], each["startupProbe"]
    kept = strategy["type"] == "Recreate" or strategy["rollingUpdate"]["maxUnavailable"] == 0
    return kept and deployment["spec"]["progressDeadlineSeconds"] > probe["periodSeconds"] * probe["failureThreshold"]


def models_read_only(_deployment: Object, pod: Pod, _each: Object) -> bool:
    """Nobody but the sync may write to what is served, and a claim is mounted read-only whoever mounts it."""
    may_write = [each["name"] for each in pod.containers if mount(each, "/models").get("readOnly") is not True]
    claims = [volume["persistentVolumeClaim"] for volume in pod.spec["volumes"] if "persistentVolumeClaim" in volume]
    return may_write in ([], ["model-sync"]) and all(claim["readOnly"] is True for claim in claims)


def verified(_deployment: Object, pod: Pod, _each: Object) -> bool:
    """What is served was copied by the sync, under a key; or it is a claim, for which the values said so."""
    (models,) = [volume for volume in pod.spec["volumes"] if volume["name"] == "models"]
    if "persistentVolumeClaim" in models:
        return all(each["name"] != "model-sync" for each in pod.containers)
    sync = container(pod, "model-sync")
    return (
        pod.containers[0] is sync
        and "emptyDir" in models
        and "--require-signature" in sync["args"]
        and sync["args"][sync["args"].index("--public-key") + 1].startswith("/etc/tickserve/keys/")
        and mount(sync, "/etc/tickserve/keys")["readOnly"] is True
    )


def closed_apis(_deployment: Object, _pod: Pod, each: Object) -> bool:
    """Triton's closed calls ask for a value from a Secret; the embedded server makes one of its own."""
    if each["args"][0] == "serve":
        return True
    (variable,) = [item for item in each["env"] if item["name"] == "TRITON_RESTRICTED_VALUE"]
    end = ":triton-restricted=$(TRITON_RESTRICTED_VALUE)"
    both = (argument(each, "http-restricted-api"), argument(each, "grpc-restricted-protocol"))
    kept = all(told and told.startswith("shared-memory,model-config,") and told.endswith(end) for told in both)
    return kept and "secretKeyRef" in variable["valueFrom"] and "value" not in variable


def spread(deployment: Object, pod: Pod, _each: Object) -> bool:
    wanted = deployment["spec"]["selector"]["matchLabels"]
    rules = pod.spec["topologySpreadConstraints"]
    return bool(rules) and all(rule["labelSelector"]["matchLabels"] == wanted for rule in rules)


def shared_memory(_deployment: Object, pod: Pod, each: Object) -> bool:
    """Client shared memory is on only where an engine is in the pod, and then for them alone, on loopback."""
    shared = [volume for volume in pod.spec["volumes"] if volume.get("emptyDir", {}).get("medium") == "Memory"]
    if argument(each, "allow-client-shm") is None:
        return each["args"][0] == "serve" or not shared
    loopback = argument(each, "http-address") == argument(each, "grpc-address") == "127.0.0.1"
    return loopback and bool(shared) and len(pod.spec["containers"]) == 1


def disruption_budgets(items: Objects) -> Iterator[str]:
    budgets = [item["spec"] for item in of_kind(items, "PodDisruptionBudget")]
    for deployment, pod, _ in servers(items):
        labels = pod.metadata["labels"].items()
        mine = [each for each in budgets if each["selector"]["matchLabels"].items() <= labels]
        if not any(each.get("maxUnavailable") == 1 for each in mine):
            yield deployment["metadata"]["name"]


def default_deny(items: Objects) -> Iterator[str]:
    """Every pod is held by a policy without rules, both ways."""
    empty = [
        item["spec"]["podSelector"]["matchLabels"]
        for item in of_kind(items, "NetworkPolicy")
        if set(item["spec"]["policyTypes"]) == {"Ingress", "Egress"} and not {"ingress", "egress"} & set(item["spec"])
    ]
    # KubeRay writes the name of its pods itself.
    for pod in pods(items):
        labels = {key: value for key, value in pod.metadata["labels"].items() if key != "app.kubernetes.io/name"}
        if not any(selector.items() <= labels.items() for selector in empty):
            yield pod.where


def named_peers(item: Object) -> bool:
    """No rule without a peer and a port, no peer that is everybody, no address that is the whole world."""
    for way, side in (("ingress", "from"), ("egress", "to")):
        for rule in item["spec"].get(way, []):
            own_cluster = item["metadata"]["name"].endswith("-ray")
            if not rule.get(side) or not (rule.get("ports") or own_cluster):
                return False
            if not all(_somebody(peer) for peer in rule[side]):
                return False
    return True


def _somebody(peer: Object) -> bool:
    if "ipBlock" in peer:
        return not peer["ipBlock"]["cidr"].endswith("/0")
    chosen = [peer[key]["matchLabels"] for key in ("namespaceSelector", "podSelector") if key in peer]
    return bool(chosen) and all(chosen)


def replicas(items: Objects) -> Iterator[str]:
    """Two at least, or as many as an autoscaler keeps; an engine is one."""
    scaled = [item["spec"]["minReplicas"] for item in of_kind(items, "HorizontalPodAutoscaler")]
    scaled += [item["spec"]["minReplicaCount"] for item in of_kind(items, "ScaledObject")]
    for deployment, pod, _ in servers(items):
        said = deployment["spec"].get("replicas")
        engine = pod.metadata["labels"]["app.kubernetes.io/component"] == "engine"
        if engine and said == 1:
            continue
        if len(scaled) > 1 or (said is None) != bool(scaled) or (said or scaled[0]) < 2:
            yield deployment["metadata"]["name"]


def no_rights(items: Objects) -> Iterator[str]:
    for item in items:
        if "Role" in item["kind"]:
            yield item["metadata"]["name"]


def own_account(items: Objects) -> Iterator[str]:
    """An account that is not the namespace's default, and whose token is not mounted."""
    for account in of_kind(items, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield account["metadata"]["name"]
    for pod in pods(items):
        if pod.spec.get("serviceAccountName", "default") == "default":
            yield pod.where


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
    "secrets mounted read-only, for the pod's group": Rule(
        each_pod(secrets_read_only),
        lambda items: mount(container(first(items), "triton"), "/etc/tickserve/tls").update(readOnly=False),
        "mtls",
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

"""What a pod, a container or an object has to be: the conditions of the hardening list.

A rule of the list takes the objects of a release and answers with what is wrong: one text for each pod, container or
object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from tests.k8s.chart.rendering import Object, Pod, container, of_kind, pods

Objects = list[Object] | tuple[Object, ...]
AMOUNTS = {"cpu", "memory", "ephemeral-storage"}
VOLUMES = {"emptyDir", "persistentVolumeClaim", "secret", "image"}
SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_KEY|ACCESS_KEY|PRIVATE_KEY|RESTRICTED_VALUE")
# What looks like a secret wherever it stands: PEM keys, AWS key ids, long random text.
SECRET_VALUE = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY|\bAKIA[0-9A-Z]{16}\b|(?<!sha256:)\b[0-9a-f]{40,}\b")
LABELS = {"name", "instance", "component", "part-of"}


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
    modes = all(volume["defaultMode"] == 0o440 for volume in volumes.values())
    return modes and all(item["readOnly"] is True for item in mounts)


def readable_to_its_group(pod: Pod) -> bool:
    """A Secret's files belong to root and fsGroup: the user reads them only as a member of that group."""
    chosen = pod.spec["securityContext"]
    return bool(chosen["fsGroup"] == chosen["runAsGroup"] and chosen["fsGroup"] >= 1000)


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

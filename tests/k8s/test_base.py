"""The kustomize base: valid against Kubernetes, hardened line by line, and every check shown what it must refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

BASE = Path(__file__).resolve().parents[2] / "k8s" / "base"
# The oldest minor version that the project means to support, and the newest that the validator knows.
VERSIONS = ("1.31", kubernetes_validate.latest_version())
Object = dict[str, Any]


def objects() -> list[Object]:
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    return [yaml.safe_load((BASE / name).read_text()) for name in kustomization["resources"]]


def the(kind: str) -> Object:
    (found,) = [item for item in objects() if item["kind"] == kind]
    return found


def pod(deployment: Object) -> Object:
    return deployment["spec"]["template"]["spec"]


def triton(deployment: Object) -> Object:
    (container,) = pod(deployment)["containers"]
    return container


def test_the_kustomization_lists_every_file() -> None:
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(path.name for path in BASE.glob("*.yaml") if path.name != "kustomization.yaml")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["Deployment", "Service", "PodDisruptionBudget"])
def test_every_object_is_valid(kind: str, version: str) -> None:
    kubernetes_validate.validate(the(kind), version, strict=True)


def _misspell(deployment: Object) -> None:
    pod(deployment)["terminationGracePeriodSecond"] = 60


def _text_for_a_number(deployment: Object) -> None:
    deployment["spec"]["replicas"] = "two"


def _no_selector(deployment: Object) -> None:
    del deployment["spec"]["selector"]


@pytest.mark.parametrize("spoil", [_misspell, _text_for_a_number, _no_selector])
@pytest.mark.parametrize("version", VERSIONS)
def test_an_invalid_object_is_refused(spoil: Callable[[Object], None], version: str) -> None:
    deployment = the("Deployment")
    spoil(deployment)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, version, strict=True)


def _seconds(deployment: Object) -> tuple[int, int]:
    return triton(deployment)["lifecycle"]["preStop"]["sleep"]["seconds"], pod(deployment)[
        "terminationGracePeriodSeconds"
    ]


def _exit_timeout() -> int:
    dockerfile = (BASE.parents[1] / "Dockerfile").read_text()
    return int(dockerfile.partition("--exit-timeout-secs=")[2].partition('"')[0])


def _mount(deployment: Object, path: str) -> Object:
    (mount,) = [item for item in triton(deployment)["volumeMounts"] if item["mountPath"] == path]
    return mount


def _claims_read_only(deployment: Object) -> bool:
    claims = [volume["persistentVolumeClaim"] for volume in pod(deployment)["volumes"] if "emptyDir" not in volume]
    return bool(claims) and all(claim["readOnly"] is True for claim in claims)


def _drain_fits(deployment: Object) -> bool:
    pause, grace = _seconds(deployment)
    return pause >= 5 and grace > pause + _exit_timeout()


def _restricted(deployment: Object) -> bool:
    calls = "shared-memory,model-config,model-repository,statistics,trace,logging"
    end = f"={calls}:triton-restricted=$(TRITON_RESTRICTED_VALUE)"
    wanted = {f"--http-restricted-api{end}", f"--grpc-restricted-protocol{end}"}
    (variable,) = triton(deployment)["env"]
    secret = variable.get("valueFrom", {}).get("secretKeyRef", {})
    return wanted <= set(triton(deployment)["args"]) and "value" not in variable and secret.get("optional") is not True


# name -> (the rule, what breaks it)
HARDENING: dict[str, tuple[Callable[[Object], bool], Callable[[Object], object]]] = {
    "non-root pod": (
        lambda d: pod(d)["securityContext"]["runAsNonRoot"] is True and pod(d)["securityContext"]["runAsUser"] >= 1000,
        lambda d: pod(d)["securityContext"].update(runAsUser=0),
    ),
    "seccomp": (
        lambda d: pod(d)["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault",
        lambda d: pod(d)["securityContext"]["seccompProfile"].update(type="Unconfined"),
    ),
    "no service account token": (
        lambda d: pod(d)["automountServiceAccountToken"] is False,
        lambda d: pod(d).update(automountServiceAccountToken=True),
    ),
    "no service variables": (
        lambda d: pod(d)["enableServiceLinks"] is False,
        lambda d: pod(d).update(enableServiceLinks=True),
    ),
    "nothing of the host": (
        lambda d: not {"hostNetwork", "hostPID", "hostIPC"} & set(pod(d)),
        lambda d: pod(d).update(hostNetwork=True),
    ),
    "read-only root": (
        lambda d: triton(d)["securityContext"]["readOnlyRootFilesystem"] is True,
        lambda d: triton(d)["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    "no capability": (
        lambda d: triton(d)["securityContext"]["capabilities"] == {"drop": ["ALL"]},
        lambda d: triton(d)["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
    ),
    "no privilege": (
        lambda d: (
            triton(d)["securityContext"]["allowPrivilegeEscalation"] is False
            and triton(d)["securityContext"]["privileged"] is False
        ),
        lambda d: triton(d)["securityContext"].update(allowPrivilegeEscalation=True),
    ),
    "models mounted read-only": (
        lambda d: _mount(d, "/models").get("readOnly") is True,
        lambda d: _mount(d, "/models").update(readOnly=False),
    ),
    "model claim read-only": (
        _claims_read_only,
        lambda d: pod(d)["volumes"][0]["persistentVolumeClaim"].update(readOnly=False),
    ),
    "nothing else mounted": (
        lambda d: {item["mountPath"] for item in triton(d)["volumeMounts"]} == {"/models", "/tmp"},
        lambda d: triton(d)["volumeMounts"].append({"name": "tmp", "mountPath": "/etc"}),
    ),
    "guaranteed resources": (
        lambda d: (
            triton(d)["resources"]["requests"] == triton(d)["resources"]["limits"]
            and {"cpu", "memory", "ephemeral-storage"} == set(triton(d)["resources"]["limits"])
        ),
        lambda d: triton(d)["resources"]["requests"].update(cpu="1"),
    ),
    "probes": (
        lambda d: (
            [
                triton(d)[f"{name}Probe"]["httpGet"] == {"path": f"/v2/health/{path}", "port": "http"}
                for name, path in (("startup", "ready"), ("liveness", "live"), ("readiness", "ready"))
            ]
            == [True] * 3
        ),
        lambda d: triton(d)["livenessProbe"]["httpGet"].update(path="/v2/health/ready"),
    ),
    "rollout waits for the start-up probe": (
        lambda d: (
            d["spec"]["progressDeadlineSeconds"]
            > triton(d)["startupProbe"]["periodSeconds"] * triton(d)["startupProbe"]["failureThreshold"]
        ),
        lambda d: d["spec"].update(progressDeadlineSeconds=60),
    ),
    "drain fits the grace period": (_drain_fits, lambda d: pod(d).update(terminationGracePeriodSeconds=35)),
    "no replica lost in a rollout": (
        lambda d: d["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0 and d["spec"]["replicas"] >= 2,
        lambda d: d["spec"]["strategy"]["rollingUpdate"].update(maxUnavailable=1),
    ),
    "restricted calls ask for the secret": (
        _restricted,
        lambda d: triton(d)["env"][0].update(value="a value in the open"),
    ),
    "image with a tag, not latest": (
        lambda d: triton(d)["image"].partition(":")[2] not in ("", "latest"),
        lambda d: triton(d).update(image="tickserve-server:latest"),
    ),
}


@pytest.mark.parametrize("rule", HARDENING)
def test_hardened(rule: str) -> None:
    holds, _ = HARDENING[rule]
    assert holds(the("Deployment"))


@pytest.mark.parametrize("rule", HARDENING)
def test_each_rule_refuses_what_breaks_it(rule: str) -> None:
    holds, spoil = HARDENING[rule]
    deployment = copy.deepcopy(the("Deployment"))
    spoil(deployment)
    assert not holds(deployment)


def test_selectors_find_the_pods() -> None:
    labels = the("Deployment")["spec"]["template"]["metadata"]["labels"]
    for selector in (
        the("Deployment")["spec"]["selector"]["matchLabels"],
        the("Service")["spec"]["selector"],
        the("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()


def test_every_service_port_is_a_port_of_the_container() -> None:
    ports = {port["name"]: port["containerPort"] for port in triton(the("Deployment"))["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    assert {port["targetPort"]: port["port"] for port in the("Service")["spec"]["ports"]} == ports


def test_a_service_never_makes_variables_that_the_command_refuses() -> None:
    """Kubernetes names them after the Service, and TICKSERVE_ is the prefix of settings."""
    assert not the("Service")["metadata"]["name"].upper().replace("-", "_").startswith("TICKSERVE")


def test_the_kustomization_names_the_image_that_the_deployment_runs() -> None:
    (image,) = yaml.safe_load((BASE / "kustomization.yaml").read_text())["images"]
    assert triton(the("Deployment"))["image"] == f"{image['name']}:{image['newTag']}"

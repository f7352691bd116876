"""Every scenario under every version of Kubernetes: rendered, linted, and valid against the schemas."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import kubernetes_validate
import pytest
import yaml

from tests.k8s.chart.rendering import (
    CHART,
    NEWER_HELM,
    NEWEST,
    OLDEST,
    SCENARIOS,
    VERSIONS,
    Object,
    helm,
    objects,
    of_kind,
    parse,
    pods,
    rendered,
    template,
    the,
    values_of,
)

CUSTOM = ("keda.sh/", "monitoring.coreos.com/", "ray.io/")


def is_custom(item: Object) -> bool:
    return item["apiVersion"].startswith(CUSTOM)


def test_the_versions_are_those_of_the_chart_and_the_validator() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"] == f">={OLDEST}.0-0"
    assert VERSIONS[0] == "1.31"
    assert VERSIONS[-1] == NEWEST == "1.37"


def test_an_older_kubernetes_is_refused() -> None:
    done = template(version="1.30")
    assert done.returncode != 0
    assert "requires kubeVersion: >=1.31.0-0" in done.stderr


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_lint_has_nothing_to_say(scenario: str) -> None:
    done = helm("lint", CHART, "--strict", "--values", values_of(scenario))
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_version_of_kubernetes_gets_the_same_objects(scenario: str) -> None:
    """Nothing is gated on what a cluster says it knows, so no object is dropped in silence."""
    with ThreadPoolExecutor(2) as pool:
        texts = set(pool.map(lambda version: rendered(scenario, version), VERSIONS))
    assert len(texts) == 1


def test_the_same_values_give_the_same_objects() -> None:
    assert template("--values", values_of("jobs")).stdout == rendered("jobs")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_newer_helm_renders_the_same(scenario: str) -> None:
    assert rendered(scenario, OLDEST, NEWER_HELM) == rendered(scenario)


def test_an_autoscaler_is_there_though_the_cluster_did_not_name_its_api() -> None:
    """helm 3.6 without --api-versions autoscaling/v2, as `helm template` is run by hand."""
    done = helm("template", "x", CHART, "--kube-version", OLDEST, "--values", values_of("hpa"))
    assert len(of_kind(parse(done.stdout), "HorizontalPodAutoscaler")) == 1


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_is_valid(version: str) -> None:
    """Each once, though several scenarios have the same."""
    distinct = {json.dumps(item): item for scenario in SCENARIOS for item in objects(scenario) if not is_custom(item)}
    assert {item["kind"] for item in distinct.values()} > {"Deployment", "Job", "HorizontalPodAutoscaler", "Pod"}
    for item in distinct.values():
        kubernetes_validate.validate(item, version, strict=True)


def _misspell(item: Object) -> None:
    item["spec"]["template"]["spec"]["terminationGracePeriodSecond"] = 60


def _text_for_a_number(item: Object) -> None:
    item["spec"]["replicas"] = "two"


def _no_selector(item: Object) -> None:
    del item["spec"]["selector"]


@pytest.mark.parametrize("spoil", [_misspell, _text_for_a_number, _no_selector])
def test_an_invalid_object_is_refused(spoil: Callable[[Object], None]) -> None:
    deployment = copy.deepcopy(the(objects("default"), "Deployment"))
    spoil(deployment)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, NEWEST, strict=True)


def test_no_two_objects_are_the_same_and_all_are_in_the_namespace() -> None:
    for scenario in SCENARIOS:
        names = [(item["kind"], item["metadata"]["name"]) for item in objects(scenario)]
        assert len(set(names)) == len(names)
        assert {item["metadata"]["namespace"] for item in objects(scenario)} == {"scoring"}


def test_a_service_never_makes_variables_that_the_command_refuses() -> None:
    """Kubernetes names them after the Service, and TICKSERVE_ is the prefix of settings."""
    for scenario in SCENARIOS:
        for service in of_kind(objects(scenario), "Service"):
            assert not service["metadata"]["name"].startswith("tickserve")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_selectors_find_the_pods_they_mean_and_no_others(scenario: str) -> None:
    labelled = {pod.where: pod.metadata["labels"] for pod in pods(objects(scenario))}
    for kind, ways in (("Service", ("selector",)), ("PodDisruptionBudget", ("selector", "matchLabels"))):
        for item in of_kind(objects(scenario), kind):
            selector = item["spec"][ways[0]] if len(ways) == 1 else item["spec"]["selector"]["matchLabels"]
            found = [where for where, labels in labelled.items() if selector.items() <= labels.items()]
            assert len(found) == 1, (item["metadata"]["name"], found)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_service_port_is_a_port_of_its_container(scenario: str) -> None:
    for service in of_kind(objects(scenario), "Service"):
        if service["metadata"]["name"].endswith("-loadtest"):
            continue
        deployment = the(objects(scenario), "Deployment")
        (triton,) = deployment["spec"]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in triton["ports"]}
        assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]}.items() <= ports.items()

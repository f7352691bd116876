"""Values that the chart refuses, and what it says: its schema of one alone, its templates of several together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.chart.rendering import CHART, NEWER_HELM, SCENARIOS, template, values_of

SCHEMA = json.loads((CHART / "values.schema.json").read_text())

# Wrong value -> what the schema says. Fault 78 and its neighbours.
BY_SCHEMA: dict[str, str] = {
    "replicaCount=-1": "replicaCount: Must be greater than or equal to 0",
    "replicaCount=two": "replicaCount: Invalid type. Expected: integer, given: string",
    "replicaCount=1.5": "replicaCount: Invalid type. Expected: integer",
    "replicas=2": "(root): Additional property replicas is not allowed",
    "image.tag=": "image.tag: String length must be greater than or equal to 1",
    "image.tag=latest": "image.tag: Does not match pattern",
    "image.tag=0.1 0": "image.tag: Does not match pattern",
    "image.digest=sha256:12": "image.digest: Does not match pattern",
    "image.digest=md5:0123": "image.digest: Does not match pattern",
    "image.name=x": "image: Additional property name is not allowed",
    "image.repository=": "image.repository: Does not match pattern",
    "image.pullPolicy=Sometimes": "image.pullPolicy must be one of the following",
    "resources.limits.memory=2G": "resources.limits.memory: Does not match pattern",
    "resources.limits.cpu=-1": "resources.limits.cpu: Must be greater than 0",
    "resources.limits.gpu=1": "resources.limits: Additional property gpu is not allowed",
    "resources.limits=null": "resources: limits is required",
    "gpu.count=0": "gpu.count: Must be greater than or equal to 1",
    "gpu.resourceName=amd.com/gpu": "gpu.resourceName: Does not match pattern",
    "gpu.resourceName=nvidia.com/mig-9g.80gb": "gpu.resourceName: Does not match pattern",
    "model.source=http": "model.source must be one of the following",
    "model.names={../x}": "model.names.0: Does not match pattern",
    "model.s3.accessKey=AKIA": "model.s3: Additional property accessKey is not allowed",
    "model.s3.secretKey=x": "model.s3: Additional property secretKey is not allowed",
    "server.restrictedValue=x": "server: Additional property restrictedValue is not allowed",
    "server.restrictedSecret=Upper_Case": "server.restrictedSecret: Does not match pattern",
    "server.http=closed": "server.http must be one of the following",
    "server.logVerbose=4": "server.logVerbose: Must be less than or equal to 3",
    "server.extraArgs={model-repository=/x}": "server.extraArgs.0: Does not match pattern",
    "tls.key=x": "tls: Additional property key is not allowed",
    "preStopSeconds=0": "preStopSeconds: Must be greater than or equal to 1",
    "probes.liveness.failureThreshold=0": "probes.liveness.failureThreshold: Must be greater than or equal to 1",
    "probes.startup.path=/": "probes.startup: Additional property path is not allowed",
    "podDisruptionBudget.maxUnavailable=0": "podDisruptionBudget.maxUnavailable: Must be greater than or equal to 1",
    "networkPolicy.callers[0].name=everybody,networkPolicy.callers[0].ports={grpc}": (
        "networkPolicy.callers.0: Must validate at least one schema"
    ),
    "networkPolicy.callers[0].name=x,networkPolicy.callers[0].podLabels.a=b": "callers.0: ports is required",
    "networkPolicy.egress.objectStore[0].cidr=10.0.0.1,networkPolicy.egress.objectStore[0].port=443": (
        "networkPolicy.egress.objectStore.0.cidr: Does not match pattern"
    ),
    "networkPolicy.egress.objectStore[0].cidr=0.0.0.0/0,networkPolicy.egress.objectStore[0].port=443": (
        "networkPolicy.egress.objectStore.0.cidr: Does not match pattern"
    ),
    "networkPolicy.egress.dns.cidrs={10.0.0.1}": "networkPolicy.egress.dns.cidrs.0: Does not match pattern",
    "networkPolicy.egress.dns.port=0": "networkPolicy.egress.dns.port: Must be greater than or equal to 1",
    "networkPolicy.callers[0].name=x,networkPolicy.callers[0].ports={grpc},networkPolicy.callers[0].cidr=::/0": (
        "networkPolicy.callers.0.cidr: Does not match pattern"
    ),
    "service.type=LoadBalancer": "service: Additional property type is not allowed",
    "autoscaling.queueSecondsPerRequest=0": "autoscaling.queueSecondsPerRequest: Must be greater than 0",
    "keda.preScale[0].name=x": "keda.preScale.0: timezone is required",
    "keda.prometheusAddress=prometheus:9090": "keda.prometheusAddress: Does not match pattern",
    "slo.objective=2": "slo.objective: Must be less than 1",
    "changeFreeze.override=yes": "changeFreeze.override: Does not match pattern",
    "changeFreeze.windows[0].name=x,changeFreeze.windows[0].start=2026-03-02,changeFreeze.windows[0].end=2026-03-03": (
        "changeFreeze.windows.0.start: Does not match pattern"
    ),
    "jobs.training.profile=fast": "jobs.training.profile must be one of the following",
    "jobs.training.symbols={BTC USD}": "jobs.training.symbols.0: Does not match pattern",
    "jobs.trainImage.tag=": "jobs.trainImage.tag: String length must be greater than or equal to 1",
    "jobs.loadtest.workers=0": "jobs.loadtest.workers: Must be greater than or equal to 1",
    "podLabels.a b=c": "podLabels",
}
# Values that do not go together -> what the templates say.
TOGETHER: dict[str, str] = {
    "terminationGracePeriodSeconds=44": (
        "terminationGracePeriodSeconds: expected at least 45 (preStopSeconds 10 + exitTimeoutSeconds 30 + 5 to unload)"
    ),
    "preStopSeconds=30": "terminationGracePeriodSeconds: expected at least 65",
    "exitTimeoutSeconds=60": "terminationGracePeriodSeconds: expected at least 75",
    "probes.readiness.timeoutSeconds=5": "timeoutSeconds: expected no more than periodSeconds 2, was 5",
    "autoscaling.enabled=true,keda.enabled=true,keda.prometheusAddress=http://p": (
        "autoscaling.enabled, keda.enabled: expected one of them (two would fight over the replicas), was both"
    ),
    "autoscaling.enabled=true,autoscaling.minReplicas=9": (
        "autoscaling.minReplicas: expected no more than maxReplicas 6, was 9"
    ),
    "keda.enabled=true": "keda.prometheusAddress: expected the address of your Prometheus, was empty",
    "keda.enabled=true,keda.prometheusAddress=http://p,keda.authModes=bearer": (
        "keda.authModes: expected keda.authenticationRef with it, was empty"
    ),
    "model.source=s3": "model.s3.bucket: expected a name with model.source s3, was empty",
    "model.source=gcs": "networkPolicy.egress.objectStore: expected the addresses of the object store",
    "model.source=gcs,model.gcs.bucket=models": "model.gcs.credentialsSecret: expected the Secret of the HMAC keys",
    "model.source=oci": "model.oci.reference: expected an image with a tag or a digest with model.source oci",
    "model.source=oci,model.oci.reference=registry.example.com/models": "expected an image with a tag or a digest",
    "model.source=oci,model.oci.reference=r/m:1,model.verify.publicKeySecret=": (
        "model.verify.publicKeySecret: expected the Secret of the public keys"
    ),
    "networkPolicy.egress.dns.namespaceLabels=null,networkPolicy.egress.dns.podLabels=null": (
        "networkPolicy.egress.dns: expected labels or cidrs (no peer at all is everybody), was neither"
    ),
    (
        "networkPolicy.callers[0].name=x,networkPolicy.callers[0].ports={grpc},"
        "networkPolicy.callers[0].cidr=10.0.0.0/8,networkPolicy.callers[0].podLabels.a=b"
    ): "networkPolicy.callers x: expected labels or a cidr (two entries for both), was both",
    "tls.enabled=true": "tls.secretName: expected the Secret of tls.crt and tls.key, was empty",
    "tls.enabled=true,tls.secretName=x": "server.http: expected probes with tls.enabled",
    "serviceAccount.create=false": "serviceAccount.name: expected a name with serviceAccount.create false",
    "model.sizeLimit=2Gi": (
        "resources.limits.ephemeral-storage: expected at least 2560Mi (model.sizeLimit + tmp.sizeLimit"
    ),
    "resources.requests.cpu=1": (
        "resources.requests.cpu: expected the limit, 2, so that the pod is Guaranteed (leave requests out), was 1"
    ),
    "server.extraArgs={--model-control-mode=explicit}": "was --model-control-mode",
    "server.extraArgs={--http-restricted-api=}": "was --http-restricted-api",
    "server.extraArgs={--metrics-address=127.0.0.1}": "was --metrics-address",
    "gpu.productSelector=NVIDIA-L4": "gpu.productSelector: expected gpu.enabled with it, was false",
    "fullnameOverride=tickserve": "expected a name that does not begin with",
    "sidecar.enabled=true": "sidecar.engine.image: expected a repository, and a tag or a digest",
    "jobs.training.enabled=true": "jobs.training.symbols: expected at least one, was none",
    "jobs.rayJob.enabled=true,jobs.rayJob.rayVersion=": (
        "jobs.rayJob.rayVersion: expected the version of Ray in jobs.rayJob.image, was empty"
    ),
    "jobs.engineBuild.enabled=true": "jobs.engineBuild.nodePools: expected at least one, was none",
    "jobs.loadtest.enabled=true": "model.names: expected at least one with jobs.loadtest.enabled, was none",
    r"podLabels.app\.kubernetes\.io/name=x": "podLabels: expected none of the labels that the chart sets",
    r"dashboards.labels.helm\.sh/chart=x": "dashboards.labels: expected none of the labels that the chart sets",
    "changeFreeze.enabled=true": "changeFreeze.windows: expected one that is still to come",
}
# The same, on top of a scenario.
ON_TOP: dict[tuple[str, str], str] = {
    ("keda", "keda.preScale[1].replicas=11"): "expected no more than keda.maxReplicas 10 replicas, was 11",
    ("keda", "keda.enabled=false"): "keda.preScale: expected keda.enabled with it",
    (
        "sidecar",
        "replicaCount=2",
    ): "replicaCount: expected 1 with sidecar.enabled (a second engine would trade twice), was 2",
    ("sidecar", "autoscaling.enabled=true"): "autoscaling.enabled: expected false with sidecar.enabled",
    ("sidecar", "sidecar.engine.stopSeconds=40"): "terminationGracePeriodSeconds: expected at least 75",
    ("sidecar", "sidecar.sharedMemorySize=2Gi"): "expected no more than half of resources.limits.memory",
    ("sidecar", "sidecar.engine.env[1].name=DB_PASSWORD,sidecar.engine.env[1].value=x"): (
        "sidecar.engine.env DB_PASSWORD: expected valueFrom (no secret belongs in values), was a value"
    ),
    ("sidecar", "serviceMonitor.enabled=true"): "serviceMonitor.enabled: expected false with sidecar.enabled",
    ("sidecar-embedded", "gpu.enabled=true"): "gpu.enabled: expected false with sidecar.server embedded",
    ("mtls", "jobs.loadtest.enabled=true"): "jobs.loadtest.enabled: expected false where HTTP answers probes only",
}


def refused(*arguments: str) -> str:
    done = template(*arguments)
    assert done.returncode == 1
    assert done.stdout == "", "nothing is rendered"
    return done.stderr


@pytest.mark.parametrize("value", BY_SCHEMA)
def test_the_schema_refuses_what_is_wrong_and_names_it(value: str) -> None:
    said = refused("--set", value)
    assert "values don't meet the specifications of the schema" in said
    assert BY_SCHEMA[value] in said


@pytest.mark.parametrize("value", ["replicaCount=-1", "image.tag=", "extra=1"])
def test_a_newer_helm_refuses_it_too(value: str) -> None:
    assert template("--set", value, binary=NEWER_HELM).returncode == 1


@pytest.mark.parametrize("value", TOGETHER)
def test_values_that_do_not_go_together_are_refused(value: str) -> None:
    assert TOGETHER[value] in refused("--set", value)


@pytest.mark.parametrize(("scenario", "value"), ON_TOP)
def test_what_does_not_go_with_a_scenario_is_refused(scenario: str, value: str) -> None:
    assert ON_TOP[scenario, value] in refused("--values", str(values_of(scenario)), "--set", value)


@pytest.mark.parametrize(
    "name", ["DB_PASS", "DB_PWD", "SIGNING_KEY", "KEY", "dbpassword", "VENUE_KEY_2", "PASSPHRASE", "AUTH_TOKEN"]
)
def test_a_secret_in_the_open_is_known_by_its_name(name: str) -> None:
    said = refused("--values", str(values_of("sidecar")), "--set", f"{ENV}.name={name},{ENV}.value=x")
    assert f"sidecar.engine.env {name}: expected valueFrom (no secret belongs in values)" in said


@pytest.mark.parametrize("name", ["VENUE=binance", "KEYBOARD=us", "PASSIVE=on", "TLS_KEY=/etc/engine/tls.key"])
def test_a_variable_that_is_no_secret_is_let_through(name: str) -> None:
    variable, _, value = name.partition("=")
    done = template("--values", values_of("sidecar"), "--set", f"{ENV}.name={variable},{ENV}.value={value}")
    assert done.returncode == 0, done.stderr


ENV = "sidecar.engine.env[1]"


def test_all_that_is_wrong_is_said_at_once() -> None:
    said = refused("--set", "terminationGracePeriodSeconds=10,tls.enabled=true,keda.enabled=true")
    for each in ("terminationGracePeriodSeconds:", "tls.secretName:", "server.http:", "keda.prometheusAddress:"):
        assert f"\n- {each}" in said


def parts(schema: Any, where: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Every object of the schema that lists its properties, with its place."""
    found: list[tuple[str, dict[str, Any]]] = []
    if isinstance(schema, dict):
        if schema.get("type") == "object" and "properties" in schema:
            found.append((where, schema))
        for key, value in schema.items():
            found += parts(value, f"{where}/{key}")
    elif isinstance(schema, list):
        for index, value in enumerate(schema):
            found += parts(value, f"{where}/{index}")
    return found


def test_the_schema_lets_no_unknown_key_through() -> None:
    assert len(parts(SCHEMA)) > 50
    assert [where for where, part in parts(SCHEMA) if part.get("additionalProperties") is not False] == []


def resolved(part: dict[str, Any]) -> dict[str, Any]:
    return SCHEMA["definitions"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part


def undocumented(values: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """Keys of the schema that values.yaml does not show. Free maps and lists show what they hold in comments."""
    known = resolved(schema).get("properties", {})
    missing = [f"{where}{key}" for key in known if key not in values and f"{where}{key}" not in SHOWN_IN_COMMENTS]
    for key, value in values.items():
        if isinstance(value, dict) and value:
            missing += undocumented(value, known.get(key, {}), f"{where}{key}.")
    return missing


SHOWN_IN_COMMENTS = {"global"}


def test_every_key_of_the_schema_is_in_the_values() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    missing = [key for key in undocumented(values, SCHEMA) if not key.endswith((".requests", ".selectPolicy"))]
    assert missing == []


def test_about_half_of_the_values_are_comments() -> None:
    lines = [line.strip() for line in (CHART / "values.yaml").read_text().splitlines() if line.strip()]
    assert sum("#" in line for line in lines) / len(lines) > 0.45


def test_every_scenario_says_what_it_is_for() -> None:
    for name in SCENARIOS:
        assert values_of(name).read_text().startswith("# "), name


def test_there_is_one_object_in_a_template() -> None:
    several = {"dashboards.yaml", "job-engine-build.yaml"}
    for path in Path(CHART / "templates").rglob("*.yaml"):
        kinds = sum(line.startswith("kind: ") for line in path.read_text().splitlines())
        assert kinds == (0 if path.name == "validate.yaml" else 1), path.name
        assert ("\n---" in path.read_text()) == (path.name in several), path.name

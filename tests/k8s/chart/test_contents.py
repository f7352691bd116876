"""What the objects say: arguments, the model sync, scaling, the network, the sidecar, and the commands of jobs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from serving import arguments
from tests.k8s.chart.conditions import argument, mount, servers
from tests.k8s.chart.rendering import (
    CHART,
    ROOT,
    SCENARIOS,
    Object,
    Pod,
    container,
    objects,
    of_kind,
    pods,
    render,
    the,
    values_of,
)
from tickserve.cli.commands import app
from tickserve.config import ServeSettings


def server(scenario: str) -> Object:
    ((_, _, each),) = servers(objects(scenario))
    return each


def pod_of(scenario: str) -> Pod:
    ((_, pod, _),) = servers(objects(scenario))
    return pod


def settings(**keys: Any) -> ServeSettings:
    return ServeSettings(**keys)


TLS = {
    "tls_cert": "/etc/tickserve/tls/tls.crt",
    "tls_key": "/etc/tickserve/tls/tls.key",
    "tls_client_ca": "/etc/tickserve/tls/ca.crt",
    "http": "probes",
}


@pytest.mark.parametrize(("scenario", "keys"), [("default", {}), ("mtls", TLS)])
def test_the_image_and_the_chart_together_say_what_production_says(scenario: str, keys: dict[str, Any]) -> None:
    """One list of arguments: `tickserve serve --print-arguments`. The last value of an argument wins."""
    chosen = server(scenario)["args"]
    mine = dict(text.partition("=")[::2] for text in [*arguments.image_arguments(), *chosen])
    production = dict(text.partition("=")[::2] for text in arguments.container_arguments(settings(**keys)))
    assert mine == production


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "sidecar-embedded"])
def test_the_server_is_given_one_repository(scenario: str) -> None:
    """Triton adds up every --model-repository: the image names it, so the chart does not."""
    told = [*arguments.image_arguments(), *server(scenario)["args"]]
    assert [text for text in told if "--model-repository" in text or "--model-store" in text] == [
        f"--model-repository={mount(server(scenario), '/models')['mountPath']}"
    ]


def test_one_way_tls_asks_no_client_for_a_certificate() -> None:
    made = render("--values", values_of("mtls"), "--set", "tls.clientCa=false")
    ((_, _, each),) = servers(made)
    assert argument(each, "grpc-use-ssl") == "true"
    assert argument(each, "grpc-use-ssl-mutual") is None


def sync_command(scenario: str) -> list[str]:
    sync = container(pod_of(scenario), "model-sync")
    return [*sync["command"], *sync["args"]]


@pytest.mark.parametrize(
    ("scenario", "source"),
    [
        ("default", "/source"),
        ("s3-sync", "s3://scoring-models/production"),
        ("s3-identity", "s3://scoring-models"),
        ("gcs-sync", "gs://scoring-models/production"),
        ("oci", "/source/repository"),
    ],
)
def test_the_sync_copies_what_trusted_keys_signed(scenario: str, source: str) -> None:
    command = sync_command(scenario)
    assert command[:5] == ["python3", "-m", "tickserve.cli", "repo", "sync"]
    wanted = ["--source", source, "--into", "/models", "--public-key", "/etc/tickserve/keys/trusted_keys"]
    assert command[5:14] == [*wanted, "--require-signature", "--size-limit", "1Gi"][:9]
    names = [command[index + 1] for index, text in enumerate(command) if text == "--model"]
    assert names == (["btcusdt-l5-gbdt"] if scenario == "s3-sync" else [])


def test_credentials_come_from_named_secrets_or_from_an_identity() -> None:
    variables = {item["name"]: item for item in container(pod_of("s3-sync"), "model-sync")["env"]}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert variables[name]["valueFrom"]["secretKeyRef"] == {"name": "scoring-models-s3", "key": name}
    assert variables["TICKSERVE_REPOSITORY__S3_ENDPOINT_URL"]["value"] == "https://objects.example.com:9000"
    none = container(pod_of("s3-identity"), "model-sync")["env"]
    assert not any("AWS_SECRET" in item["name"] for item in none)
    account = the(objects("s3-identity"), "ServiceAccount")
    assert "eks.amazonaws.com/role-arn" in account["metadata"]["annotations"]
    assert "scoring-models-gcs" in json.dumps(container(pod_of("gcs-sync"), "model-sync"))
    for scenario in ("s3-sync", "gcs-sync"):
        assert "AWS_" not in json.dumps(server(scenario)), "the server does not see them"


def test_an_image_volume_is_verified_like_any_source() -> None:
    (volume,) = [each for each in pod_of("oci").spec["volumes"] if each["name"] == "source"]
    assert volume["image"] == {"reference": "registry.example.com/scoring-models:2026.11", "pullPolicy": "IfNotPresent"}


def test_a_claim_is_served_unverified_only_where_the_values_say_so() -> None:
    pod = pod_of("pvc-unverified")
    assert [each["name"] for each in pod.containers] == ["triton"]
    assert mount(server("pvc-unverified"), "/models") == {
        "name": "models",
        "mountPath": "/models",
        "readOnly": True,
        "subPath": "production",
    }


def test_a_gpu_is_asked_for_by_both_sides_and_found_by_product() -> None:
    for scenario, resource in (("gpu", "nvidia.com/gpu"), ("gpu-mig", "nvidia.com/mig-1g.10gb")):
        amounts = server(scenario)["resources"]
        assert amounts["limits"][resource] == amounts["requests"][resource] == 1
        assert "nvidia.com/gpu.product" in pod_of(scenario).spec["nodeSelector"]
        assert "nvidia.com/gpu" in [each["key"] for each in pod_of(scenario).spec["tolerations"]]
        assert resource not in container(pod_of(scenario), "model-sync")["resources"]["limits"]


def test_the_autoscaler_reads_waiting_and_missed_deadlines() -> None:
    pods_metric, external = the(objects("hpa"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert pods_metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "500u"}
    assert external["external"]["target"] == {"type": "Value", "value": "500000u"}
    assert "replicas" not in the(objects("hpa"), "Deployment")["spec"], "helm would set them back at every upgrade"


def test_keda_reads_the_contracts_queries_and_scales_before_the_open() -> None:
    queue, misses, *crons = the(objects("keda"), "ScaledObject")["spec"]["triggers"]
    match = '{namespace="scoring",job="triton-tickserve",model=~"btcusdt-l5-gbdt"}'
    assert queue["metadata"]["query"] == (
        f"1e-6 * sum(rate(nv_inference_queue_duration_us{match}[1m])) / "
        f"clamp_min(sum(rate(nv_inference_request_success{match}[1m])), 1)"
    )
    assert misses["metadata"]["query"].startswith("sum(rate(tickserve_client_deadline_misses_total{model=~")
    assert (queue["metadata"]["threshold"], misses["metadata"]["threshold"]) == ("0.002", "0.5")
    assert {queue["metricType"], misses["metricType"]} == {"Value"}
    assert [cron["metadata"]["desiredReplicas"] for cron in crons] == ["4", "6"]
    assert [cron["metadata"]["timezone"] for cron in crons] == ["Europe/London", "America/New_York"]


def adapter_rules() -> dict[str, Any]:
    """What docs/deploy.md gives the Prometheus adapter."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    (block,) = [each for each in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if each.startswith("rules:")]
    return dict(yaml.safe_load(block)["rules"])


def test_the_adapters_rules_serve_what_the_autoscaler_asks_for() -> None:
    ((waiting,), (misses,)) = (adapter_rules()[kind] for kind in ("custom", "external"))
    pods_metric, external = the(objects("hpa"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert waiting["name"]["as"] == pods_metric["pods"]["metric"]["name"]
    assert set(waiting["resources"]["overrides"]) == {"namespace", "pod"}
    assert misses["name"]["as"] == external["external"]["metric"]["name"]
    assert misses["resources"] == {"namespaced": False}, "engines are in namespaces of their own"
    queue, missed, *_ = the(objects("keda"), "ScaledObject")["spec"]["triggers"]
    series = re.compile(r"\b(?:nv|tickserve)_\w+(?=\{)")
    assert series.findall(waiting["metricsQuery"]) == series.findall(queue["metadata"]["query"])
    assert series.findall(misses["metricsQuery"]) == series.findall(missed["metadata"]["query"])
    for rule in (waiting, misses):
        assert rule["seriesQuery"].partition("{")[0] in series.findall(rule["metricsQuery"])
    assert misses["metricsQuery"].endswith(" or vector(0)"), "nothing is counted before the first"
    assert missed["metadata"]["query"].endswith(" or vector(0)")


def test_the_autoscalers_scale_what_serves() -> None:
    for scenario, kind in (("hpa", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")):
        name = the(objects(scenario), "Deployment")["metadata"]["name"]
        wanted = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
        assert the(objects(scenario), kind)["spec"]["scaleTargetRef"] == wanted


def test_callers_are_named_by_namespace_and_pod_and_get_their_ports_alone() -> None:
    rules = the(objects("cpu"), "NetworkPolicy", "tickserve")["spec"]["ingress"]
    engines, research = rules[0], rules[1]
    assert engines["from"] == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "trading"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/component": "engine"}},
        }
    ], "one peer: both have to hold"
    assert [port["port"] for port in engines["ports"]] == [8001]
    assert [port["port"] for port in research["ports"]] == [8000, 8001]


@pytest.mark.parametrize(
    ("scenario", "opened"), [("default", False), ("oci", False), ("s3-sync", True), ("gcs-sync", True)]
)
def test_the_way_out_is_opened_only_where_the_sync_needs_it(scenario: str, opened: bool) -> None:
    assert ("egress" in the(objects(scenario), "NetworkPolicy", "tickserve")["spec"]) is opened


def test_prometheus_reaches_the_metrics_and_scrapes_each_pod_once() -> None:
    monitor = the(objects("monitoring"), "ServiceMonitor")["spec"]
    found = [
        service["metadata"]["name"]
        for service in of_kind(objects("monitoring"), "Service")
        if monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        and any(port["name"] == monitor["endpoints"][0]["port"] for port in service["spec"]["ports"])
    ]
    assert found == ["triton-tickserve"], "and so the label job is the release's full name"
    rules = the(objects("monitoring"), "NetworkPolicy", "tickserve")["spec"]["ingress"]
    assert [port["port"] for port in rules[0]["ports"]] == [8002]


@pytest.mark.parametrize("scenario", ["sidecar", "sidecar-embedded"])
def test_the_sidecar_starts_before_its_engine_and_ends_after_it(scenario: str) -> None:
    spec = pod_of(scenario).spec
    assert [each["name"] for each in spec["initContainers"]] == ["model-sync", "triton"]
    assert server(scenario)["restartPolicy"] == "Always", "a native sidecar"
    assert "startupProbe" in server(scenario)
    assert [each["name"] for each in spec["containers"]] == ["engine"]
    assert of_kind(objects(scenario), "Service") == [], "nobody else asks it"


@pytest.mark.parametrize("scenario", ["sidecar", "sidecar-embedded"])
def test_the_engine_and_its_server_share_memory(scenario: str) -> None:
    engine = container(pod_of(scenario), "engine")
    assert mount(engine, "/dev/shm") == mount(server(scenario), "/dev/shm")
    assert mount(engine, "/models")["readOnly"] is True
    (volume,) = [each for each in pod_of(scenario).spec["volumes"] if each["name"] == "shared-memory"]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "256Mi"}


def test_prometheus_reaches_the_metrics_of_a_sidecar_that_has_any() -> None:
    """Triton's metrics are where its HTTP is unless told otherwise; the embedded server's are on loopback."""
    prometheus = ("--set", "networkPolicy.prometheus.podLabels.app=prometheus")
    made = render("--values", values_of("sidecar"), *prometheus)
    ((_, _, triton),) = servers(made)
    assert argument(triton, "metrics-address") == "0.0.0.0"
    assert argument(triton, "http-address") == argument(triton, "grpc-address") == "127.0.0.1"
    assert [port["containerPort"] for port in triton["ports"]] == [8002]
    (rule,) = the(made, "NetworkPolicy", "triton-tickserve")["spec"]["ingress"]
    assert rule["ports"] == [{"port": 8002, "protocol": "TCP"}]
    embedded = render("--values", values_of("sidecar-embedded"), *prometheus)
    ((_, _, triton),) = servers(embedded)
    assert "ports" not in triton
    assert "ingress" not in the(embedded, "NetworkPolicy", "triton-tickserve")["spec"]


def test_a_job_of_training_has_one_pod_for_each_symbol() -> None:
    job = next(each for each in of_kind(objects("jobs"), "Job") if "-train-" in each["metadata"]["name"])["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 2, 2)
    assert job["podFailurePolicy"]["rules"][1]["action"] == "FailIndex"
    script = job["template"]["spec"]["containers"][0]["args"][0]
    scope: dict[str, Any] = {"__name__": "script"}
    exec(compile(script, "train_symbol.py", "exec"), scope)
    line = scope["command"](["BTCUSDT", "ETHUSDT"], 1, ["--data", "/data"])
    wanted = ["-m", "tickserve.cli", "train", "--symbol", "ETHUSDT", "--out", "bundles/ETHUSDT", "--data", "/data"]
    assert line[1:] == wanted


def test_there_is_an_engine_build_for_each_node_pool() -> None:
    builds = [each for each in pods(objects("jobs")) if "-engine-" in each.where]
    found = {
        each.spec["nodeSelector"]["nvidia.com/gpu.product"]: set(each.spec["containers"][0]["resources"]["limits"])
        - {"cpu", "memory", "ephemeral-storage"}
        for each in builds
    }
    assert found == {"NVIDIA-L4": {"nvidia.com/gpu"}, "NVIDIA-H100-80GB-HBM3": {"nvidia.com/mig-1g.10gb"}}
    command = [*builds[0].spec["containers"][0]["command"], *builds[0].spec["containers"][0]["args"]]
    wanted = ["-m", "tickserve.cli", "tensorrt", "build", "btcusdt-l5-mlp", "--version", "3", "--repository", "/models"]
    assert command[1:] == wanted


def claims(pod: Pod, name: str) -> dict[str, tuple[str, bool]]:
    """Of a container: where each claim is mounted -> its name, and whether it can be written to."""
    known = {volume["name"]: volume.get("persistentVolumeClaim") for volume in pod.spec["volumes"]}
    return {
        item["mountPath"]: (claim["claimName"], not (item.get("readOnly") or claim.get("readOnly")))
        for item in container(pod, name)["volumeMounts"]
        if (claim := known[item["name"]])
    }


DATA_AND_WORK = {"/data": ("my-data", False), "/work": ("my-runs", True)}
CLAIMS: dict[str, dict[str, tuple[str, bool]]] = {
    "train": DATA_AND_WORK,
    "ray-submitter": DATA_AND_WORK,
    "ray-head": DATA_AND_WORK,
    "ray-worker": DATA_AND_WORK,
    "build": {"/models": ("my-models", True)},
    "locust-master": {"/models": ("my-models", False)},
    "locust-worker": {"/models": ("my-models", False)},
}


def test_jobs_mount_the_claims_of_the_values_and_write_where_they_have_to() -> None:
    sets = [
        f"jobs.{job}.{key}" for job in ("training", "rayJob") for key in ("dataClaim=my-data", "outputClaim=my-runs")
    ]
    sets += [f"jobs.{job}.repositoryClaim=my-models" for job in ("engineBuild", "loadtest")]
    found = {
        each["name"]: claims(pod, each["name"])
        for pod in pods(render("--values", values_of("jobs"), "--set", ",".join(sets)))
        for each in pod.spec["containers"]
        if each["name"] in CLAIMS
    }
    assert found == CLAIMS


def test_workers_find_the_master_and_nobody_else() -> None:
    service = the(objects("jobs"), "Service", "-loadtest")
    assert [(port["port"], port["targetPort"]) for port in service["spec"]["ports"]] == [(5557, 5557)]
    assert service["spec"]["publishNotReadyAddresses"] is True, "the master is waited for while it waits"
    chosen = service["spec"]["selector"]
    assert chosen["tickserve.io/role"] == "master"
    found = [pod for pod in pods(objects("jobs")) if chosen.items() <= pod.metadata["labels"].items()]
    assert [each["name"] for pod in found for each in pod.containers] == ["locust-master"]
    (worker,) = [pod for pod in pods(objects("jobs")) if pod.spec["containers"][0]["name"] == "locust-worker"]
    told = worker.spec["containers"][0]["args"]
    assert told[told.index("--master-host") + 1] == service["metadata"]["name"]


def test_every_job_ends_at_its_deadline() -> None:
    sets = ",".join(f"jobs.{job}.deadlineSeconds={60 + index}" for index, job in enumerate(DEADLINES))
    found = {
        name: spec["activeDeadlineSeconds"]
        for full, spec in jobs_of("--set", sets).items()
        for name in DEADLINES.values()
        if f"-{name}-" in full
    }
    assert found == {name: 60 + index for index, name in enumerate(DEADLINES.values())}


DEADLINES = {"training": "train", "rayJob": "ray", "engineBuild": "engine", "loadtest": "load"}


def commands() -> dict[str, list[str]]:
    """What the jobs run of the `tickserve` command, without the Python before it."""
    (build, *_) = [each for each in pods(objects("jobs")) if "-engine-" in each.where]
    (ray,) = of_kind(objects("jobs"), "RayJob")
    train = next(each for each in pods(objects("jobs")) if "-train-" in each.where).spec["containers"][0]
    return {
        "build": build.spec["containers"][0]["args"],
        "ray": ray["spec"]["entrypoint"].split()[3:],
        "train": ["train", "--symbol", "BTCUSDT", "--out", "bundles/BTCUSDT", *train["args"][1:]],
        "sync": sync_command("s3-sync")[3:],
        "embedded": server("sidecar-embedded")["args"],
    }


@pytest.mark.parametrize("name", ["build", "ray", "train", "sync", "embedded"])
def test_the_command_knows_every_option_of_a_pod(name: str) -> None:
    """An unknown option is refused before --help is answered."""
    assert CliRunner().invoke(app, [*commands()[name], "--help"]).exit_code == 0
    assert CliRunner().invoke(app, [*commands()[name], "--unheard-of", "--help"]).exit_code == 2


def jobs_of(*arguments: str | Path, chart: Path = CHART) -> dict[str, Object]:
    """The spec of each Job that is no hook, and of the RayJob, by name."""
    made = render("--values", values_of("jobs"), *arguments, chart=chart)
    return {each["metadata"]["name"]: each["spec"] for kind in ("Job", "RayJob") for each in of_kind(made, kind)}


@pytest.mark.parametrize(
    "change",
    [
        "replicaCount=4",
        "jobs.training.parallelism=1",
        "podLabels.team=desk",
        "image.registry=registry.example.com",
        "imagePullSecrets={mine}",
        "serviceAccount.name=other",
        "jobs.training.gpu=true",
        "jobs.loadtest.workers=3",
    ],
)
def test_a_job_keeps_its_name_exactly_as_long_as_its_spec(change: str) -> None:
    """Kubernetes refuses another spec under the name of a Job, and `helm upgrade` with it."""
    before, after = jobs_of(), jobs_of("--set", change)
    assert len(before) == len(after) == 6
    master = {name for name in after if "-load-" in name and not name.endswith("-workers")}
    assert {f"{name}-workers" for name in master} < set(after), "they run anew together"
    for name in before.keys() & after.keys():
        assert before[name] == after[name], name
    if change in ("podLabels.team=desk", "image.registry=registry.example.com", "imagePullSecrets={mine}"):
        assert not before.keys() & after.keys()
    if change == "replicaCount=4":
        assert before == after
    if change == "jobs.training.parallelism=1":
        assert len(before.keys() - after.keys()) == 1


def test_a_script_of_a_new_chart_makes_another_job(tmp_path: Path) -> None:
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    for name in ("train_symbol", "loadtest_plan"):
        script = chart / "files" / "scripts" / f"{name}.py"
        script.write_text(script.read_text() + "\n# Another version.\n")
    before, after = jobs_of(), jobs_of(chart=chart)
    moved = {name.rpartition("-")[0] for name in before.keys() - after.keys() if not name.endswith("-workers")}
    assert moved == {"triton-tickserve-train", "triton-tickserve-load"}
    assert all(before[name] == after[name] for name in before.keys() & after.keys())

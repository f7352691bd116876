"""`tickserve deploy` as a platform team runs it: exit codes, files, the real helm and kubectl."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from export.deployment.chart import Chart
from tests.cli.conftest import Deploy, Run
from tests.export.deployment.api_server import cluster
from tests.k8s.chart.rendering import HELM, ROOT, installed
from tests.serving.conftest import publish_tiny

KUBECTL = Path(sys.executable).with_name("kubectl")
IMAGE = "r.example.com/tickserve-server:0.1.0@sha256:" + "0" * 64


def rendered(published: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((published / "values.yaml").read_text())
    return tree


@pytest.mark.system
def test_rendered_values_pass_validation_and_are_compared(deploy: Deploy, published: Path) -> None:
    helm = str(installed(HELM))
    done = deploy(
        "render", "--model", "tiny", "--memory", "chart", "--image", IMAGE, "--calendar", "cal.toml",
        "--prometheus", "http://prometheus.monitoring.svc:9090", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    values, said = rendered(published), json.loads(done.stdout)
    assert values["replicaCount"] >= 2
    assert values["slo"] == {"deadlineMs": 10, "objective": 0.999}
    assert values["keda"]["preScale"][0]["timezone"] == "America/New_York"
    assert {each["path"]: each["source"] for each in said["values"]}["replicaCount"].startswith("peak in tiny.json")
    assert all(each["reason"] for each in said["values"])
    (queue,) = said["queues"]
    assert json.loads((published / "values.measured.json").read_text())["queues"] == [queue]
    assert f"{queue['queue_size']} requests that wait" in done.stderr
    assert (
        f"# queue of tiny (its config.pbtxt, no chart value): unbounded; {queue['queue_size']} requests"
        in (published / "values.yaml").read_text()
    )
    checked = deploy("validate", "values.yaml", "--helm", helm, "--json")
    assert checked.returncode == 0, checked.stderr + checked.stdout
    assert json.loads(checked.stdout)["refused"] == 0
    more = (published / "values.yaml").read_text().replace("deadlineMs: 10", "deadlineMs: 4")
    (published / "more.yaml").write_text(
        more.replace(f"maxReplicas: {values['keda']['maxReplicas']}", "maxReplicas: 9")
    )
    same = deploy("diff", "values.yaml", "--against", "values.yaml", "--helm", helm)
    assert (same.returncode, same.stdout) == (0, "no difference\n")
    other = deploy("diff", "more.yaml", "--against", "values.yaml", "--helm", helm)
    assert other.returncode == 1
    assert "ScaledObject.keda.sh/scoring/triton-tickserve: spec.maxReplicaCount: changed: " in other.stdout
    assert "-> 9" in other.stdout


def test_a_value_that_contradicts_is_refused_with_its_field(deploy: Deploy, published: Path) -> None:
    (published / "values.yaml").write_text(json.dumps({"model": {"names": ["tiny"]}, "slo": {"deadlineMs": 0.4}}))
    done = deploy("validate", "values.yaml", "--helm", str(installed(HELM)))
    assert done.returncode == 1
    assert "refused: slo.deadlineMs: expected more than the 0.5 ms of a lone request to tiny, was 0.4" in done.stdout
    assert "error: values: 1 refused: slo.deadlineMs" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("render", "--model", "tinny", "--memory", "chart"), 3, "no published model 'tinny'"),
        (("render", "--model", "tiny", "--rate", "-3"), 2, "--rate: not a rate: expected requests a second above 0"),
        (("render", "--model", "tiny", "--rate", "other=3"), 2, "--rate: of a model that is not deployed"),
        (("render", "--model", "a", "--model", "b", "--rate", "3"), 2, "MODEL=RATE with several models, was 3"),
        (("render", "--model", "tiny", "--rate", "3", "--journal", "x"), 2, "contradict each other"),
        (("render", "--model", "tiny", "--image", "server:latest"), 2, "--image: what runs has to be known"),
        (("render", "--model", "tiny", "--memory", "chart", "--deadline-ms", "0.4"), 2, "no time is left for one lone"),
        (("render", "--model", "tiny", "--memory", "manifest"), 3, "has no memory of the stage 'measure'"),
        (("render", "--model", "tiny", "--calendar", "none.toml"), 2, "none.toml: cannot read"),
        (("validate", "values.yaml", "--helm", "/no/helm"), 4, "helm: not found at /no/helm"),
        (("diff", "values.yaml"), 2, "expected one of --against and --live"),
        (("freeze", "--file", "cal.toml", "--at", "noon"), 2, "--at: not a time"),
    ],
)
def test_what_is_refused(deploy: Deploy, published: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = deploy(*arguments)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
    assert not (published / "values.yaml").exists()


@pytest.mark.system
def test_a_pipeline_stops_inside_a_freeze(tickserve: Run, published: Path) -> None:
    inside = tickserve("deploy", "freeze", "--calendar", "cal.toml", "--at", "2026-11-27T12:00:00-05:00", "--json")
    assert inside.returncode == 1
    assert "change freeze: session xnys-2026-11-27, until 2026-11-27T13:15:00-05:00" in inside.stderr
    assert json.loads(inside.stdout)["frozen"] is True
    outside = tickserve("deploy", "freeze", "--calendar", "cal.toml", "--at", "2026-11-26T12:00:00-05:00")
    assert (outside.returncode, outside.stderr) == (0, "")
    assert "the next begins 2026-11-27T09:15:00-05:00 (xnys-2026-11-27)" in outside.stdout


def test_the_calendar_is_shown(deploy: Deploy, published: Path) -> None:
    arguments = ("calendar", "--file", "cal.toml", "--from", "2026-11-25T00:00:00-05:00", "--days", "3")
    said = json.loads(deploy(*arguments, "--json").stdout)
    assert [each["day"] for each in said["sessions"]] == ["2026-11-25", "2026-11-27"]
    assert [each["hours"] for each in said["idle"]] == [7.0, 3.0]
    shown = deploy(*arguments)
    assert shown.returncode == 0, shown.stderr
    for text in ("xnys-mon-to-fri", "0 9 * * 1-5", "pods without a session", "2026-11-27T13:15:00-05:00"):
        assert text in shown.stdout


def installed_release() -> str:
    """What README, docs/deploy.md and the upgrade notes call the release."""
    texts = [(ROOT / page).read_text() for page in ("README.md", "docs/deploy.md", "k8s/chart/UPGRADING.md")]
    (name,) = {name for text in texts for name in re.findall(r"helm -n scoring (?:install|upgrade) (\S+) ", text)}
    return name


def test_the_release_compared_with_is_the_one_that_the_pages_install(
    deploy: Deploy, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(Chart, "render", lambda *_, **options: asked.append(options["release"]) or [])
    (published / "values.yaml").write_text("replicaCount: 3\n")
    assert deploy("diff", "values.yaml", "--against", "values.yaml", "--helm", str(installed(HELM))).returncode == 0
    assert asked == [installed_release()] * 2


def test_several_files_are_compared_as_helm_lays_them(
    deploy: Deploy, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(Chart, "render", lambda _, files, **__: asked.append([path.name for path in files]) or [])
    now = ("--against", "now.yaml", "--against", "access.yaml")
    assert deploy("diff", "values.yaml", "access.yaml", *now, "--helm", str(installed(HELM))).returncode == 0
    assert asked == [["values.yaml", "access.yaml"], ["now.yaml", "access.yaml"]]
    both = deploy("diff", "values.yaml", *now, "--live", "--helm", str(installed(HELM)))
    assert (both.returncode, "expected one of --against and --live" in both.stderr) == (2, True)


@pytest.mark.system
def test_the_difference_to_a_cluster(deploy: Deploy, published: Path) -> None:
    """The real kubectl against a stand-in of a cluster (see tests/export/deployment/api_server.py)."""
    helm = str(installed(HELM))
    (published / "values.yaml").write_text("replicaCount: 3\n")
    chart = Chart(ROOT / "k8s/chart", helm)
    # The release that the pages install, which is the one `diff` asks for unless told otherwise.
    held = copy.deepcopy(chart.render([published / "values.yaml"], release=installed_release(), hooks=False))
    for item in held:  # what a cluster adds, and how it writes an amount of memory
        item["metadata"] |= {"uid": "1", "resourceVersion": "7"}
        item["status"] = {}
        if item["kind"] == "Deployment":
            (container,) = item["spec"]["template"]["spec"]["containers"]
            container["resources"]["limits"]["memory"] = "2048Mi"
            container["terminationMessagePath"] = "/dev/termination-log"
    arguments = ("diff", "values.yaml", "--live", "--helm", helm, "--kubectl", KUBECTL)
    with cluster(held, published) as kubeconfig:
        same = deploy(*arguments, KUBECONFIG=str(kubeconfig))
        assert (same.returncode, same.stdout) == (0, "no difference\n"), same.stderr
        (published / "values.yaml").write_text("replicaCount: 5\n")
        other = deploy(*arguments, KUBECONFIG=str(kubeconfig))
    changed = "Deployment.apps/scoring/triton-tickserve: spec.replicas: changed: 3 -> 5\n"
    assert (other.returncode, other.stdout) == (1, changed)
    fewer = [item for item in held if item["kind"] != "PodDisruptionBudget"]
    (published / "values.yaml").write_text("replicaCount: 3\n")
    with cluster(fewer, published) as kubeconfig:
        missing = deploy(*arguments, KUBECONFIG=str(kubeconfig))
    assert missing.stdout == "PodDisruptionBudget.policy/scoring/triton-tickserve: added\n"


def test_without_a_cluster_it_says_so(deploy: Deploy, published: Path) -> None:
    (published / "values.yaml").write_text("replicaCount: 3\n")
    arguments = ("diff", "values.yaml", "--live", "--helm", str(installed(HELM)), "--kubectl", KUBECTL)
    done = deploy(*arguments, KUBECONFIG=str(published / "none"))
    assert done.returncode == 4
    assert "--live: the cluster does not answer: " in done.stderr
    assert "kubectl needs a cluster" in done.stderr


@pytest.mark.system
def test_a_real_old_kubectl_is_told_so(tickserve: Run, published: Path) -> None:
    """Debian's own package, unpacked and not installed, so that nobody's kubectl is replaced."""
    subprocess.run(["apt-get", "download", "kubernetes-client"], cwd=published, check=True, capture_output=True)
    (package,) = published.glob("kubernetes-client_*.deb")
    subprocess.run(["dpkg", "-x", package, published / "old"], check=True)
    old = published / "old/usr/bin/kubectl"
    said = subprocess.run([old, "version", "--client", "--output=json"], capture_output=True, text=True, check=True)
    version = json.loads(said.stdout)["clientVersion"]["gitVersion"].removeprefix("v")
    if tuple(map(int, version.split(".")[:2])) >= (1, 27):
        said = f"this Debian's kubectl is {version}, and none of before 1.27 is at hand"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(said)
    (published / "values.yaml").write_text("replicaCount: 3\n")
    done = tickserve("deploy", "diff", "values.yaml", "--live", "--helm", str(installed(HELM)), "--kubectl", old)
    assert done.returncode == 4
    assert done.stderr == f"error: kubectl: expected 1.27 or newer, was {version}\n"
    # What a user without tickserve sees, as k8s/overlays/README.md says.
    built = subprocess.run([old, "kustomize", ROOT / "k8s/overlays/cpu"], capture_output=True, text=True, check=False)
    assert built.returncode != 0
    assert "'../../base' must be a file" in built.stderr


@pytest.mark.system
def test_memory_and_service_times_are_measured_on_the_embedded_server(tickserve: Run, published: Path) -> None:
    shutil.rmtree(published / "runs")
    publish_tiny(published / "model_repository", "other", 2)
    models = ("--model", "tiny", "--model", "other", "--rate", "tiny=500", "--rate", "other=20")
    done = tickserve("deploy", "render", *models, "--deadline-ms", "50", "--json")
    assert done.returncode == 0, done.stderr
    values = {each["path"]: each for each in json.loads(done.stdout)["values"]}
    record = json.loads((published / "values.measured.json").read_text())
    # The server alone takes tens of megabytes; a tiny model no gigabyte.
    assert 30 * 2**20 < record["memory"]["bytes"] < 2**30
    assert "every instance scoring full batches" in values["resources.limits.memory"]["source"]
    assert "measured now" in values["replicaCount"]["source"]
    assert all(each["service"]["rows"]["1"]["mean_us"] > 0 for each in record["models"])
    # A request over HTTP is neither free nor a hundredth of a second of a core.
    assert all(5 < each["cpu_us"] < 10_000 for each in record["models"])
    assert "processor time of the embedded server" in values["replicaCount"]["source"]
    assert [each["name"] for each in record["models"]] == ["tiny", "other"]
    small = rendered(published)
    small["resources"]["limits"]["memory"] = "16Mi"
    (published / "small.yaml").write_text(yaml.safe_dump(small))
    (published / "small.measured.json").write_text(json.dumps(record))
    refused = tickserve("deploy", "validate", "small.yaml", "--helm", str(installed(HELM)))
    assert refused.returncode == 1
    assert "resources.limits.memory: expected at least the" in refused.stdout

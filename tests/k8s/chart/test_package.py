"""The package: rules, dashboards, notes, names, the scripts of its pods, and the page about it."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.k8s.chart.rendering import (
    CHART,
    NEWER_HELM,
    OLDEST,
    ROOT,
    helm,
    objects,
    of_kind,
    parse,
    render,
    template,
    the,
    values_of,
)


@pytest.fixture
def chart(tmp_path: Path) -> Path:
    """A copy of the chart, with files of ours in place of the rules and dashboards of the package."""
    copied = tmp_path / "chart"
    shutil.copytree(CHART, copied)
    for folder in ("rules", "dashboards"):
        shutil.rmtree(copied / "files" / folder, ignore_errors=True)
        (copied / "files" / folder).mkdir()
    return copied


RULES = """
groups:
  - name: triton
    rules:
      - alert: Slow
        expr: up{job="x"} == 0
        annotations: {summary: "{{ $labels.pod }} is down: {{ $value | humanize }}"}
"""


def test_rules_come_from_the_package_and_are_not_read_as_templates(chart: Path) -> None:
    (chart / "files" / "rules" / "a.yaml").write_text(RULES)
    (chart / "files" / "rules" / "b.yaml").write_text(RULES.replace("triton", "client"))
    made = the(render("--values", values_of("monitoring"), chart=chart), "PrometheusRule")["spec"]["groups"]
    assert [group["name"] for group in made] == ["tickserve-slo", "triton", "client"]
    assert made[1]["rules"] == yaml.safe_load(RULES)["groups"][0]["rules"]


def test_rules_of_the_values_replace_those_of_the_package(chart: Path, tmp_path: Path) -> None:
    (chart / "files" / "rules" / "a.yaml").write_text(RULES)
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"prometheusRule": yaml.safe_load(RULES.replace("triton", "own"))}))
    arguments = ("--values", values_of("monitoring"), "--values", own)
    made = the(render(*arguments, chart=chart), "PrometheusRule")["spec"]["groups"]
    assert [group["name"] for group in made] == ["tickserve-slo", "own"]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("", ".*tickserve.*"),
        ("my-tickserve", ".*tickserve.*"),
        ("scores", ".*(tickserve|scores).*"),
    ],
)
def test_alerts_look_at_the_jobs_and_pods_of_this_release(name: str, pattern: str) -> None:
    made = render("--values", values_of("monitoring"), *(("--set", f"fullnameOverride={name}") if name else ()))
    rules = json.dumps(the(made, "PrometheusRule")["spec"]["groups"][1:])
    patterns = set(re.findall(r'(?:job|pod|name)=~\\"(.*?)\\"', rules))
    assert patterns - {".*", "engine", "journal"} == {pattern}
    jobs = [service["metadata"]["name"] for service in of_kind(made, "Service")]
    assert jobs
    assert all(re.fullmatch(pattern, job) for job in jobs)


def test_another_objective_than_that_of_the_rules_is_refused(tmp_path: Path) -> None:
    stricter, own = tmp_path / "stricter.yaml", tmp_path / "own.yaml"
    stricter.write_text("slo: {objective: 0.9999}\n")
    arguments = ("--values", values_of("monitoring"), "--values", stricter)
    refused = template(*arguments)
    assert refused.returncode == 1
    assert "slo.objective: expected 0.999" in refused.stderr
    assert "monitoring.slo_objective = 0.9999" in refused.stderr
    own.write_text(yaml.safe_dump({"prometheusRule": yaml.safe_load(RULES)}))
    said = the(render(*arguments, "--values", own), "PrometheusRule")["spec"]["groups"][0]["rules"]
    assert said[1]["expr"] == "vector(0.9999)"


def test_the_promise_is_recorded_beside_what_is_measured(chart: Path) -> None:
    arguments = ("--values", values_of("monitoring"), "--set", "slo.deadlineMs=4")
    (made,) = the(render(*arguments, chart=chart), "PrometheusRule")["spec"]["groups"]
    said = {rule["record"]: rule["expr"] for rule in made["rules"]}
    assert said == {"tickserve:slo:deadline_seconds": "vector(0.004)", "tickserve:slo:objective": "vector(0.999)"}


def test_each_dashboard_is_a_config_map(chart: Path) -> None:
    board = {"title": "A {{ template }} that is none", "panels": [{"legend": "{{model}}"}]}
    (chart / "files" / "dashboards" / "serving_latency.json").write_text(json.dumps(board, indent=2) + "\n")
    (made,) = of_kind(render("--values", values_of("monitoring"), chart=chart), "ConfigMap")
    assert made["metadata"]["name"] == "triton-tickserve-dashboard-serving-latency"
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(made["data"]["serving_latency.json"]) == board


def test_a_package_without_rules_and_dashboards_renders_and_warns(chart: Path) -> None:
    assert of_kind(render("--values", values_of("monitoring"), chart=chart), "ConfigMap") == []
    said = notes(chart, "--values", values_of("monitoring"))
    assert "this package of the chart has no rules" in said
    assert "this package of the chart has none" in said


def notes(chart: Path, *arguments: str | Path) -> str:
    """NOTES.txt, which `helm template` does not print: through a template of our own."""
    (chart / "templates" / "notes.yaml").write_text(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: notes}\ndata:\n"
        '  notes: {{ include (print .Template.BasePath "/NOTES.txt") . | quote }}\n'
    )
    return str(the(render(*arguments, chart=chart), "ConfigMap", "notes")["data"]["notes"])


def test_a_missing_digest_is_warned_about_and_never_invented(chart: Path) -> None:
    assert "WARNING: image.digest is not set" in notes(chart)
    assert "image.digest" not in notes(chart, "--values", values_of("cpu"))
    assert re.search(r"@sha256", json.dumps(objects("default"))) is None


@pytest.mark.parametrize(
    ("scenario", "warned"),
    [
        ("default", "networkPolicy.callers is empty"),
        ("no-network-policy", "networkPolicy.enabled is false"),
        ("pvc-unverified", "no signature is checked"),
    ],
)
def test_notes_warn_of_what_is_open_or_shut(chart: Path, scenario: str, warned: str) -> None:
    assert warned in notes(chart, "--values", values_of(scenario))
    assert warned not in notes(chart, "--values", values_of("cpu"))


def test_notes_name_the_secrets_and_claims_that_have_to_be_there(chart: Path) -> None:
    said = notes(chart, "--values", values_of("mtls"))
    for name in (
        "triton-tickserve-restricted",
        "triton-tickserve-public-key",
        "triton-tickserve-models",
        "scoring-tls",
    ):
        assert name in said


def test_a_claim_that_several_nodes_mount_is_said_to_need_many(chart: Path) -> None:
    assert "PersistentVolumeClaim triton-tickserve-models, ReadOnlyMany or ReadWriteMany" in notes(chart)
    assert "Many" not in notes(chart, "--values", values_of("sidecar"))
    assert "Many" not in notes(chart, "--values", values_of("oci"))
    for page in ("docs/deploy.md", "k8s/overlays/README.md", "k8s/chart/values.yaml"):
        text = " ".join((ROOT / page).read_text().replace("#", " ").replace("`", "").split())
        assert "ReadOnlyMany or ReadWriteMany" in text, page


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("tickserve", "triton-tickserve"),
        ("triton-tickserve", "triton-tickserve"),
        ("scoring", "triton-tickserve-scoring"),
        ("t" * 53, "triton-tickserve-" + "t" * 33),
    ],
)
def test_names_fit_and_never_begin_with_tickserve(release: str, name: str) -> None:
    done = helm("template", release, CHART, "--kube-version", OLDEST)
    assert done.returncode == 0, done.stderr
    found = re.search(r"kind: Deployment\nmetadata:\n  name: (\S+)", done.stdout)
    assert found is not None
    assert found[1] == name


def test_the_longest_names_fit_where_kubernetes_counts() -> None:
    """63 characters for Services, and for Jobs, whose name becomes a label and, with its index, a host name."""
    pool = '{"name": "abcdefghijkl", "productSelector": "NVIDIA-L4", "resourceName": "nvidia.com/gpu"}'
    own = ("--set", "jobs.loadtest.workers=999", "--set-json", f"jobs.engineBuild.nodePools=[{pool}]")
    line = ("template", "r" * 53, CHART, "--kube-version", OLDEST, "--values", values_of("jobs"), *own)
    done = helm(*line, binary=NEWER_HELM)
    assert done.returncode == 0, done.stderr
    for item in parse(done.stdout):
        if item["kind"] in ("Service", "Job"):
            index = "-999" if item["spec"].get("completionMode") == "Indexed" else ""
            assert len(item["metadata"]["name"] + index) <= 63, item["metadata"]["name"]


def test_the_oldest_python_of_an_image_reads_the_scripts() -> None:
    """Ubuntu 22.04's 3.10 and NVIDIA's 3.12 alike: nothing newer than 3.8 is used."""

    for path in sorted((CHART / "files" / "scripts").glob("*.py")):
        ast.parse(path.read_text(), feature_version=(3, 8))
        assert "$(" not in path.read_text(), "Kubernetes would put a variable there"


def test_the_page_names_keys_that_are_there_and_its_values_render(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    table = page.partition("## Values, by concern")[2].partition("\n## ")[0]
    named = {
        key
        for row in table.splitlines()
        if row.startswith("| ")
        for key in re.findall(r"`(\w[\w.]*)`", row.split("|")[2])
    }
    assert len(named) > 40
    for key in named:
        at = values
        for part in key.split("."):
            assert part in at, key
            at = at[part]
    assert {key.partition(".")[0] for key in named} >= set(values) - UNNAMED
    example = tmp_path / "values.yaml"
    example.write_text(re.search(r"```yaml\n(   image:.*?)```", page, re.DOTALL)[1])  # type: ignore[index]
    assert the(render("--values", example), "Deployment")


def test_pages_that_only_render_name_the_version_of_the_cluster() -> None:
    """Helm 3.6 takes every cluster for 1.20 then, which the chart refuses."""
    pages = [ROOT / "docs" / "deploy.md", ROOT / "k8s" / "chart" / "UPGRADING.md"]
    lines = [
        line for page in pages for line in page.read_text().splitlines() if re.match(r" *helm .*\btemplate ", line)
    ]
    assert len(lines) == 2
    assert all("--kube-version 1." in line for line in lines)


# Keys that the page does not need to name: names, labels, the test's own size.
UNNAMED = {"nameOverride", "fullnameOverride", "podLabels", "podAnnotations", "serviceAccount", "test"}

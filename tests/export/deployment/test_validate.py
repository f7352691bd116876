"""Values held against the real chart, Kubernetes' schemas, a published model and a measurement; each refusal shown."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from export.batching import apply_to_config, setting_of_config
from export.deployment import check, cross_check, objective, schema_check
from export.deployment.chart import Chart, newest_known, objects
from export.deployment.values_file import record_path
from tests.export.deployment.conftest import times, write_table
from tests.serving.conftest import publish_tiny
from tickserve.config import Config
from tickserve.errors import ArtifactError, ConfigError, GateRefusedError
from tickserve.settings import load_settings

MI = 2**20
CONFIG = Config()
GOOD: dict[str, Any] = {
    "image": {"registry": "r.example.com", "repository": "server", "tag": "1", "digest": "sha256:" + "0" * 64},
    "resources": {"limits": {"cpu": "3", "memory": "1024Mi"}},
    "model": {"names": ["tiny"]},
    "slo": {"deadlineMs": 10},
    "networkPolicy": {
        "callers": [{"name": "engines", "namespaceLabels": {"team": "trading"}, "ports": ["grpc"]}],
        "prometheus": {"namespaceLabels": {"kubernetes.io/metadata.name": "monitoring"}},
    },
    "serviceMonitor": {"enabled": True},
    "keda": {
        "enabled": True,
        "prometheusAddress": "http://prometheus:9090",
        "minReplicas": 2,
        "maxReplicas": 6,
        "queueSecondsPerRequest": 0.001,
        "preScale": [
            {
                "name": "xnys-mon-to-fri",
                "timezone": "America/New_York",
                "start": "0 9 * * 1-5",
                "end": "0 16 * * 1-5",
                "replicas": 4,
            }
        ],
    },
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `models/tiny`, bounded and inside 10 ms, and its table."""
    folder = tmp_path_factory.mktemp("published")
    tiny = publish_tiny(folder / "models", "tiny", 1)
    config = folder / "models/tiny/config.pbtxt"
    largest = tiny.manifest.export.max_batch if tiny.manifest.export else 0
    setting = replace(
        setting_of_config(config), instances=3, queue_size=64, queue_timeout_us=5_000, delay_us=0, preferred=(largest,)
    )
    apply_to_config(config, setting)
    write_table(folder / "tables", "tiny", times(300, r1=500, **{f"r{largest}": 2_000}), 10_000)
    return folder


def over(change: dict[str, Any]) -> dict[str, Any]:
    """GOOD with some keys of its sections replaced."""
    tree = json.loads(json.dumps(GOOD))
    for section, part in change.items():
        tree[section] = tree.get(section, {}) | part if isinstance(part, dict) else part
    return tree


@pytest.fixture
def found(chart: Chart, published: Path, tmp_path: Path) -> Callable[..., list[tuple[str, str, str]]]:
    """What the cross check has to say of GOOD with changes, as (level, field, reason)."""

    def run(
        change: dict[str, Any] | None = None, record: dict[str, Any] | None = None, folder: Path = published
    ) -> list[tuple[str, str, str]]:
        (tmp_path / "values.yaml").write_text(json.dumps(over(change or {})))
        values = chart.values([tmp_path / "values.yaml"])
        said = cross_check.check(values, record, folder / "models", folder / "tables", CONFIG)
        return [(each.level, each.field, each.reason) for each in said]

    return run


def recorded(mi: int, digest: str | None = None) -> dict[str, Any]:
    models = [{"name": "tiny", "version": 7, "manifest_sha256": digest}] if digest else []
    return {"values": [], "models": models, "memory": {"bytes": mi * MI, "source": "a test"}}


def test_good_values_and_a_measurement_say_nothing(found: Callable[..., list[tuple[str, str, str]]]) -> None:
    assert found(record=recorded(600)) == []


@pytest.mark.parametrize(
    ("change", "record", "level", "field", "reason"),
    [
        ({}, recorded(1_025), "refused", "resources.limits.memory", "expected at least the 1025Mi that were measured"),
        ({}, recorded(900), "warning", "resources.limits.memory", "less than the 1408Mi"),
        ({}, None, "note", "resources.limits.memory", "not held against a measurement"),
        ({}, recorded(600, "sha256:other"), "warning", "model.names", "version 7 was measured, in force is 1"),
        ({"image": {"digest": ""}}, recorded(600), "warning", "image.digest", "a tag can be moved"),
        ({"model": {"names": ["tinny"]}}, recorded(600), "refused", "model.names", "expected a published model (tiny)"),
        ({"model": {"names": []}}, recorded(600), "warning", "model.names", "nothing could be held"),
        (
            {"resources": {"limits": {"cpu": "2", "memory": "1024Mi"}}},
            recorded(600),
            "warning",
            "resources.limits.cpu",
            "2 for 3",
        ),
        (
            {"slo": {"deadlineMs": 5}},
            recorded(600),
            "refused",
            "tiny/config.pbtxt: default_timeout_microseconds",
            "5000",
        ),
        ({"slo": {"deadlineMs": 0.7}}, recorded(600), "refused", "slo.deadlineMs", "0.8 ms of a lone request"),
        (
            {"keda": {"queueSecondsPerRequest": 0.0093}},
            recorded(600),
            "refused",
            "keda.queueSecondsPerRequest",
            "0.0092",
        ),
        ({"keda": {"maxReplicas": 3}}, recorded(600), "refused", "keda.preScale (xnys-mon-to-fri)", "KEDA would cut"),
        ({"keda": {"maxReplicas": 4}}, recorded(600), "warning", "keda.preScale (xnys-mon-to-fri)", "nothing is left"),
        ({"keda": {"minReplicas": 7}}, recorded(600), "refused", "keda.maxReplicas", "at least minReplicas (7), was 6"),
        ({"keda": {"minReplicas": 1}}, recorded(600), "warning", "keda.minReplicas", "leaves nobody"),
        ({"keda": {"enabled": False}, "replicaCount": 1}, recorded(600), "warning", "replicaCount", "leaves nobody"),
        (
            {"changeFreeze": {"enabled": True, "windows": []}},
            recorded(600),
            "warning",
            "changeFreeze.windows",
            "empty: nothing is frozen",
        ),
        ({"networkPolicy": {"callers": []}}, recorded(600), "warning", "networkPolicy.callers", "nobody but helm test"),
        ({"networkPolicy": {"prometheus": {}}}, recorded(600), "warning", "networkPolicy.prometheus", "keda scales on"),
        ({"serviceMonitor": {"enabled": False}}, recorded(600), "warning", "serviceMonitor.enabled", "keda scales on"),
        (
            {"keda": {"enabled": False}, "networkPolicy": {"prometheus": {}}},
            recorded(600),
            "warning",
            "networkPolicy.prometheus",
            "may not reach port 8002",
        ),
        (
            {
                "changeFreeze": {
                    "enabled": True,
                    "windows": [
                        {"name": "past", "start": "2020-01-02T09:00:00-05:00", "end": "2020-01-02T16:00:00-05:00"}
                    ],
                }
            },
            recorded(600),
            "warning",
            "changeFreeze.windows",
            "none lies ahead",
        ),
    ],
)
def test_each_contradiction_and_doubt_is_named(
    found: Callable[..., list[tuple[str, str, str]]],
    change: dict[str, Any],
    record: dict[str, Any] | None,
    level: str,
    field: str,
    reason: str,
) -> None:
    said = found(change, record)
    assert [(one, two) for one, two, _ in said] == [(level, field)], said
    assert reason in said[0][2]


def test_without_a_policy_nobody_has_to_be_named(found: Callable[..., list[tuple[str, str, str]]]) -> None:
    assert found({"networkPolicy": {"enabled": False, "callers": [], "prometheus": {}}}, recorded(600)) == []
    off = {"keda": {"enabled": False}, "serviceMonitor": {"enabled": False}}
    assert found(off | {"networkPolicy": {"prometheus": {}}}, recorded(600)) == []


def test_an_unbounded_queue_is_warned_about(
    found: Callable[..., list[tuple[str, str, str]]], published: Path, tmp_path: Path
) -> None:
    shutil.copytree(published, tmp_path / "open")
    config = tmp_path / "open/models/tiny/config.pbtxt"
    apply_to_config(config, replace(setting_of_config(config), queue_size=0, queue_timeout_us=0))
    (said,) = found(record=recorded(600), folder=tmp_path / "open")
    assert said[:2] == ("warning", "tiny/config.pbtxt: max_queue_size")
    # 10 ms less 0.3 of path and 2 of a batch; three instances.
    largest = setting_of_config(config).preferred[-1]
    assert f"{int(7_700 / 2_000 * largest * 3)} requests that wait 7699 us at most" in said[2]
    assert "`tickserve batching derive --model tiny --deadline-ms 10 --arrivals <journal> --apply`" in said[2]
    assert 'queue_policy = "reject"' in said[2]


def test_a_table_of_another_export_is_refused(
    found: Callable[..., list[tuple[str, str, str]]], published: Path, tmp_path: Path
) -> None:
    shutil.copytree(published, tmp_path / "other")
    write_table(tmp_path / "other/tables", "tiny", times(300, r1=500, r2=600), 10_000)
    with pytest.raises(ArtifactError, match=r"tiny\.json: .* largest batch: expected \d+, was 2"):
        found(record=recorded(600), folder=tmp_path / "other")


def refuse_the_objective(*_: Any) -> Any:
    raise GateRefusedError("the chart refuses these values: slo.objective: expected 0.999, was 0.99", field="values")


def test_from_end_to_end(chart: Chart, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    record_path(path).write_text(json.dumps(recorded(600)))
    result = check.validate(chart, [path], published / "models", published / "tables", CONFIG)
    assert [each for each in result.findings if each.level != "note"] == []
    path.write_text(yaml.safe_dump(over({"slo": {"objective": 0.99}, "prometheusRule": {"enabled": True}})))
    wrong = check.validate(chart, [path], published / "models", published / "tables", CONFIG, [newest_known()])
    assert [each.field for each in wrong.refused] == ["slo.objective"]
    monkeypatch.setattr(Chart, "render", refuse_the_objective)
    wrong = check.validate(chart, [path], published / "models", published / "tables", CONFIG)
    assert [each.field for each in wrong.refused] == ["slo.objective"], "told once, though the chart refuses it as well"
    assert set(result.objects) == {check.oldest(chart.folder), newest_known()}
    assert min(result.objects.values()) > 5


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"replicaCount": -1}, "replicaCount", "expected at least 0, was -1"),
        ({"replicaCount": "two"}, "replicaCount", 'expected integer, was "two"'),
        ({"imagee": {}}, "imagee", "unknown key (the nearest is image)"),
        ({"image": {"tags": "1"}}, "image.tags", "unknown key (the nearest is tag)"),
        ({"slo": {"objective": 2}}, "slo.objective", "was 2"),
        ({"resources": {"limits": {"cpu": "3", "memory": "lots"}}}, "resources.limits.memory", 'was "lots"'),
    ],
)
def test_values_against_the_schema(
    chart: Chart, published: Path, tmp_path: Path, change: dict[str, Any], field: str, reason: str
) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(over(change)))
    result = check.validate(chart, [path], published / "models", published / "tables", CONFIG)
    assert [each.field for each in result.refused] == [field]
    assert reason in result.refused[0].reason
    assert result.objects == {}


@pytest.mark.parametrize(("promised", "refusals"), [(0.999, 0), (0.99, 1), (0.9995, 1)])
def test_the_objective_is_that_of_the_rules(chart: Chart, promised: float, refusals: int) -> None:
    values = chart.values([])
    values["slo"]["objective"] = promised
    assert list(objective.check(values, chart.folder)) == [], "without rules there is nothing to contradict"
    values["prometheusRule"]["enabled"] = True
    said = list(objective.check(values, chart.folder))
    assert [(each.level, each.field) for each in said] == [("refused", "slo.objective")] * refusals
    for each in said:
        assert f"expected 0.999, which the alerts of files/rules of the chart hold, was {promised:g}" in each.reason


@pytest.mark.parametrize("promised", [0.99, 0.995, 0.9995, 0.99999])
def test_rules_rendered_as_the_refusal_says_are_taken(chart: Chart, tmp_path: Path, promised: float) -> None:
    from monitoring.render import write

    values = chart.values([])
    values["slo"]["objective"], values["prometheusRule"]["enabled"] = promised, True
    (said,) = objective.check(values, chart.folder)
    setting, command = re.findall(
        r"(TICKSERVE_\S+) (tickserve monitor render --profile production --out \S+)", said.reason
    )[0]
    name, value = setting.split("=")
    settings = load_settings(profile="production", environ={name: value}).config.monitoring
    write(settings, tmp_path / "files")
    assert list(objective.check(values, tmp_path)) == []
    assert command.endswith("k8s/chart/files")
    # The same rules, given as values.
    groups = yaml.safe_load((tmp_path / "files/rules/deadline.yaml").read_text())["groups"]
    values["prometheusRule"]["groups"] = groups
    assert list(objective.check(values, chart.folder)) == []
    values["slo"]["objective"] = 0.9
    assert "the alerts of prometheusRule.groups hold" in next(objective.check(values, chart.folder)).reason


def test_an_object_that_kubernetes_does_not_take_is_refused(chart: Chart, published: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "chart"
    shutil.copytree(chart.folder, spoilt)
    service = spoilt / "templates/service.yaml"
    service.write_text(service.read_text().replace("protocol: TCP", "protocoll: TCP", 1))
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    result = check.validate(
        Chart(spoilt, chart.helm), [path], published / "models", published / "tables", CONFIG, ["1.31"]
    )
    assert [each.field for each in result.refused] == ["Service/scoring/triton-tickserve: spec.ports.0"]
    assert "protocoll" in result.refused[0].reason


def test_kinds_of_others_are_said_not_to_be_checked() -> None:
    item = {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "x"}, "spec": 7}
    assert schema_check.check_objects([item], "1.31") == ([], ["ScaledObject (keda.sh/v1alpha1)"])


def test_inside_a_freeze_a_chart_is_looked_at_all_the_same(chart: Chart, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    window = {
        "name": "now",
        "start": (now - timedelta(hours=1)).isoformat(timespec="seconds"),
        "end": (now + timedelta(hours=1)).isoformat(timespec="seconds"),
    }
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(over({"changeFreeze": {"enabled": True, "windows": [window]}})))
    assert len(chart.render([path])) > 5


def test_what_the_chart_itself_refuses_is_told(chart: Chart, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text("fullnameOverride: tickserve-x\n")
    with pytest.raises(GateRefusedError, match=r"the chart refuses these values: .*does not begin with"):
        chart.render([tmp_path / "values.yaml"])


@pytest.mark.parametrize(
    ("windows", "was"),
    [
        ([], "was empty"),
        ([{"name": "past", "start": "2020-01-02T09:00:00Z", "end": "2020-01-02T16:00:00Z"}], "was 1, all over"),
    ],
)
def test_a_freeze_that_freezes_nothing_is_told_why(
    chart: Chart, tmp_path: Path, windows: list[dict[str, str]], was: str
) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(over({"changeFreeze": {"enabled": True, "windows": windows}})))
    with pytest.raises(GateRefusedError, match=rf"one that is still to come .*, {was}"):
        chart.render([path])


def test_what_is_no_chart_and_what_are_no_values(helm: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--chart: expected a chart"):
        Chart(tmp_path, helm).values([])
    (tmp_path / "values.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match=r"values.yaml: wrong type: expected a mapping of values, was list"):
        Chart(tmp_path, helm).values([])
    (tmp_path / "values.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"values.yaml: not YAML"):
        Chart(tmp_path, helm).values([])


def test_what_is_no_object() -> None:
    with pytest.raises(ConfigError, match="expected objects of Kubernetes"):
        objects("a: 1\n")
    assert objects("---\n---\n") == []


def test_the_file_of_the_page_opens_what_validate_warns_about(
    found: Callable[..., list[tuple[str, str, str]]], root: Path
) -> None:
    closed: dict[str, Any] = {"networkPolicy": {"callers": [], "prometheus": {}}, "serviceMonitor": {"enabled": False}}
    fields = [field for _, field, _ in found(closed, recorded(600))]
    assert fields == ["networkPolicy.callers", "serviceMonitor.enabled", "networkPolicy.prometheus"]
    (block,) = re.findall(r"```yaml\n(.*?)```", (root / "docs/deploy-values.md").read_text(), flags=re.DOTALL)
    assert found(yaml.safe_load(block), recorded(600)) == []
    shown = (root / "README.md").read_text()
    assert "deploy validate values.yaml access.yaml" in shown
    assert "-f values.yaml -f access.yaml" in shown


def test_a_refusal_of_the_chart_is_told_and_counted_once(
    chart: Chart, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(over({"fullnameOverride": "tickserve-x"})))

    def refusals() -> list[str]:
        result = check.validate(chart, [path], published / "models", published / "tables", CONFIG)
        return [each.field for each in result.refused]

    assert refusals() == ["chart"]
    render = Chart.render
    path.write_text(yaml.safe_dump(GOOD))

    def one_version(self: Chart, files: Any, version: str) -> Any:
        if version == newest_known():
            raise GateRefusedError("the chart refuses these values: a test", field="values")
        return render(self, files, version)

    monkeypatch.setattr(Chart, "render", one_version)
    assert refusals() == [f"chart (Kubernetes {newest_known()})"]

"""The kustomize overlays, built by the real kubectl, are the chart's objects; and no file lags behind the chart."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from export.deployment import overlays
from export.deployment.chart import Chart, key_of, objects
from export.deployment.difference import differences
from tests.k8s.chart.rendering import HELM, ROOT, installed

K8S = ROOT / "k8s"
KUBECTL = Path(sys.executable).with_name("kubectl")
# The oldest minor version that the chart takes, and the newest that the validator knows.
OLDEST, NEWEST = "1.31", kubernetes_validate.latest_version()


@pytest.fixture(scope="module")
def chart() -> Chart:
    return Chart(K8S / "chart", str(installed(HELM)))


@functools.cache
def built(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


def of_chart(chart: Chart, name: str) -> list[dict[str, Any]]:
    """The chart's objects for the values of an overlay, without hooks and without the two labels of Helm."""
    rendered = chart.render([K8S / "overlays" / name / "values.yaml"])
    kept = [item for item in rendered if "helm.sh/hook" not in (item["metadata"].get("annotations") or {})]
    return [overlays.without_helm(item) for item in kept]


@pytest.mark.parametrize("name", overlays.NAMES)
def test_an_overlay_is_what_the_chart_gives(chart: Chart, name: str) -> None:
    made, wanted = built(K8S / "overlays" / name), of_chart(chart, name)
    assert sorted(map(key_of, made)) == sorted(map(key_of, wanted))
    assert len(made) >= 4
    assert [change.to_json() for change in differences(wanted, made)] == []
    assert all(item["metadata"]["namespace"] == "scoring" for item in made)
    assert "helm" not in str(made).lower()


@pytest.mark.parametrize(("name", "version"), [(name, NEWEST) for name in overlays.NAMES] + [("gpu-mig", OLDEST)])
def test_every_object_is_valid(name: str, version: str) -> None:
    for item in built(K8S / "overlays" / name):
        kubernetes_validate.validate(item, version, strict=True)


def test_no_file_lags_behind_the_chart(chart: Chart) -> None:
    assert overlays.write(chart, K8S, dry_run=True) == [], "run `tickserve deploy overlays`"


def _pod(items: list[dict[str, Any]]) -> dict[str, Any]:
    (deployment,) = [item for item in items if item["kind"] == "Deployment"]
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return pod


def test_what_each_overlay_is_for() -> None:
    pods = {name: _pod(built(K8S / "overlays" / name)) for name in overlays.NAMES}
    limits = {name: pod["containers"][0]["resources"]["limits"] for name, pod in pods.items()}
    assert not any(key.startswith("nvidia.com/") for key in limits["cpu"] | limits["dev"])
    assert limits["gpu"]["nvidia.com/gpu"] == 1
    assert limits["gpu-mig"]["nvidia.com/mig-1g.10gb"] == 1
    assert [pod.get("initContainers", [{}])[0].get("name") for pod in pods.values()] == ["model-sync"] * 3 + [None]


@pytest.fixture
def copied(tmp_path: Path, chart: Chart) -> tuple[Chart, Path]:
    shutil.copytree(K8S, tmp_path / "k8s")
    return Chart(tmp_path / "k8s" / "chart", chart.helm), tmp_path / "k8s"


@pytest.mark.system
def test_a_chart_that_moves_on_is_noticed_and_written(copied: tuple[Chart, Path]) -> None:
    """The negative control: a changed default, a stale file, and a file of the user's."""
    chart, folder = copied
    values = chart.folder / "values.yaml"
    line = "terminationGracePeriodSeconds: 60"
    values.write_text(values.read_text().replace(line, "terminationGracePeriodSeconds: 70"))
    (folder / "overlays/cpu/configmap-old.yaml").write_text(f"{overlays.MARK}\nkind: ConfigMap\n")
    (folder / "overlays/cpu/mine.yaml").write_text("kind: ConfigMap\n")
    deployment = "deployment-triton-tickserve.yaml"
    expected = ["overlays/cpu/configmap-old.yaml", *(f"overlays/{name}/{deployment}" for name in overlays.NAMES)]
    assert overlays.write(chart, folder, dry_run=True) == sorted(expected)
    assert (folder / "overlays/cpu/configmap-old.yaml").exists()
    assert overlays.write(chart, folder) == sorted(expected)
    assert overlays.write(chart, folder) == []
    assert not (folder / "overlays/cpu/configmap-old.yaml").exists()
    assert (folder / "overlays/cpu/mine.yaml").exists()
    assert _pod(built(folder / "overlays/dev"))["terminationGracePeriodSeconds"] == 70


def test_a_changed_object_is_noticed(copied: tuple[Chart, Path], chart: Chart) -> None:
    """The negative control of the comparison itself."""
    _, folder = copied
    path = folder / "overlays/cpu/deployment-triton-tickserve.yaml"
    path.write_text(path.read_text().replace("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", 1))
    changes = differences(of_chart(chart, "cpu"), built(folder / "overlays/cpu"))
    assert [change.after for change in changes] == [False]


def test_an_overlay_of_ones_own_names_the_image_and_the_namespace(tmp_path: Path) -> None:
    """As k8s/README.md tells a new user to begin."""
    shutil.copytree(K8S, tmp_path / "k8s")
    digest = "sha256:" + "1" * 64
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/kustomization.yaml").write_text(
        "resources: [../k8s/overlays/cpu]\nnamespace: desk\n"
        f"images: [{{name: tickserve-server, newName: r.example.com/tickserve-server, digest: '{digest}'}}]\n"
    )
    made = built(tmp_path / "mine")
    assert {item["metadata"]["namespace"] for item in made} == {"desk"}
    pod = _pod(made)
    images = {container["image"] for container in [*pod["containers"], *pod["initContainers"]]}
    assert images == {f"r.example.com/tickserve-server@{digest}"}


def test_labels_of_helm_are_taken_off_everywhere() -> None:
    labels = {"helm.sh/chart": "x", "app.kubernetes.io/managed-by": "Helm", "mine": "y"}
    item: dict[str, Any] = {
        "metadata": {"labels": dict(labels)},
        "spec": {"template": {"metadata": {"labels": labels}}},
    }
    before = copy.deepcopy(item)
    bare = overlays.without_helm(item)
    assert item == before
    assert bare["metadata"]["labels"] == bare["spec"]["template"]["metadata"]["labels"] == {"mine": "y"}

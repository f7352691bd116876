"""helm and kubectl: missing, too old, without a version. Stand-ins say what a tool would; real ones are asked too."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from export.deployment import tools
from tickserve.errors import ComponentError


def stand_in(folder: Path, name: str, says: str, code: int = 0) -> Path:
    """A program of that name that answers everything with `says`."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys\nsys.stdout.write({says!r})\nsys.exit({code})\n")
    path.chmod(0o755)
    return path


def kubectl_says(version: str) -> str:
    return json.dumps({"clientVersion": {"major": "1", "minor": "x", "gitVersion": version}})


@pytest.mark.parametrize("version", ["v1.27.0", "v1.32.4-dispatcher", "v1.37.1", "v2.0.0", "v1.30.1+k3s1"])
def test_a_kubectl_that_is_new_enough(tmp_path: Path, version: str) -> None:
    path = stand_in(tmp_path, "kubectl", kubectl_says(version))
    assert tools.kubectl(path) == str(path)


@pytest.mark.parametrize(("version", "shown"), [("v1.20.2", "1.20.2"), ("v1.26.15", "1.26.15"), ("v0.99.0", "0.99.0")])
def test_an_old_kubectl_is_told_so(tmp_path: Path, version: str, shown: str) -> None:
    with pytest.raises(ComponentError) as raised:
        tools.kubectl(stand_in(tmp_path, "kubectl", kubectl_says(version)))
    assert str(raised.value) == f"kubectl: expected 1.27 or newer, was {shown}"
    assert raised.value.exit_code == 4


def test_a_kubectl_that_does_not_say_its_version(tmp_path: Path) -> None:
    with pytest.raises(ComponentError, match="kubectl does not say its version"):
        tools.kubectl(stand_in(tmp_path, "kubectl", "nothing", 1))


def test_the_kubectl_of_this_environment() -> None:
    assert tools.kubectl(Path(sys.executable).with_name("kubectl"))


def test_helm_of_npm_and_an_old_one(helm: str, tmp_path: Path) -> None:
    assert tools.helm(Path(helm)) == helm
    with pytest.raises(ComponentError, match=r"^helm: expected 3\.6 or newer, was 2\.17\.0$"):
        tools.helm(stand_in(tmp_path, "helm", "v2.17.0"))


def test_a_tool_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, find in (("helm", tools.helm), ("kubectl", tools.kubectl)):
        with pytest.raises(
            ComponentError, match=rf"^{name}: not found on PATH \(install .* or name it with --{name}\)$"
        ):
            find(None)
        with pytest.raises(ComponentError, match=f"{name}: not found at .*nowhere"):
            find(tmp_path / "nowhere")


def test_a_tool_that_does_not_end_or_cannot_run(tmp_path: Path) -> None:
    path = tmp_path / "helm"
    path.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    path.chmod(0o755)
    with pytest.raises(ComponentError, match="helm: did not end within 1 s"):
        tools.run([str(path)], limit_s=1)
    path.write_bytes(b"\x7fELF nonsense")
    with pytest.raises(ComponentError, match="helm: cannot be run"):
        tools.run([str(path)])

"""What the machine allows, and the command's own manners."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from serving import native
from tests.cli.conftest import Run
from tickserve.doctor import installed


def test_doctor_finds_what_the_demo_needs(tickserve: Run) -> None:
    done = tickserve("doctor", "--json")
    assert done.returncode == 0, done.stderr
    findings = {item["what"]: item for item in json.loads(done.stdout)}
    assert findings["numpy"]["ok"]
    assert findings["stage folders"]["ok"]
    assert {"woken late from a sleep", "held up while running"} <= findings.keys()
    assert all(item["fix"] for item in findings.values() if not item["ok"])
    assert not any(item["fix"] for item in findings.values() if item["ok"])
    assert {item["ok"] for item in findings.values()} <= {True, False, None}


def test_doctor_names_a_backend_that_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed.native_backend().ok
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    finding = installed.native_backend()
    assert (finding.ok, finding.needed) == (False, True)
    assert "make install" in finding.fix


def test_no_arguments_is_help_and_an_unknown_command_exits_2(tickserve: Run) -> None:
    assert "demo" in tickserve("--help").stdout
    assert tickserve("nonsense").returncode == 2


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys; from tickserve.cli.commands import app; "
        "print([m for m in ('torch','xgboost','polars','ray','pandas','numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_optional_never_decides_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "find_spec", lambda module: None)
    findings = {item.what: item for item in installed.findings()}
    assert (findings["torch"].ok, findings["torch"].needed) == (False, True)
    for name in ("ray", "deepspeed", "modelopt", "py-spy", "nsys"):
        assert not findings[name].needed


def test_the_optimisations_of_the_configuration_in_force(tickserve: Run, tmp_path: Path) -> None:
    (tmp_path / "desk.toml").write_text("[trainer]\nmemmap = true\n")
    done = tickserve("doctor", "--optimizations", "--json", "--config", "desk.toml")
    assert done.returncode == 0, done.stderr
    found = {item["name"]: item for item in json.loads(done.stdout)}
    assert found["memory-mapped features"] == {
        "name": "memory-mapped features",
        "active": True,
        "why": "trainer.memmap = True",
        "key": "trainer.memmap",
    }
    assert not found["mixed precision"]["active"]
    assert tickserve("doctor", "--optimizations", "--profile", "nonsense").returncode == 2

"""The README's own commands and code, run against a real server: what it says is what happens."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import COMMAND, SETS_UP_A_DEMO, DemoRun, Served, environment, run_demo, serving

pytestmark = SETS_UP_A_DEMO


def blocks(root: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    return run_demo(tmp_path_factory.mktemp("readme"))


@pytest.fixture(scope="module")
def server(simulated: DemoRun) -> Iterator[Served]:
    with serving(simulated.folder) as served:
        yield served


@pytest.mark.system
def test_the_curl_example_answers(root: Path, server: Served, simulated: DemoRun) -> None:
    (script,) = blocks(root, "bash")
    script = script.replace("127.0.0.1:8000", server.http)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=simulated.folder)
    outputs = {output["name"]: output["data"] for output in json.loads(done.stdout)["outputs"]}
    assert len(outputs["probabilities"]) == 3
    exported = json.loads((simulated.run / "export.json").read_text())
    assert outputs["bundle_id"] == [next(e["bundle_id"] for e in exported if e["model"] == "simulated-l5-gbdt")]


@pytest.mark.system
def test_the_python_example_prints_a_signal(root: Path, server: Served, simulated: DemoRun) -> None:
    code = blocks(root, "python")[0].replace("127.0.0.1:8000", server.http)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=simulated.folder, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OK ")
    assert "simulated-l5-gbdt 1 sha256:" in done.stdout


@pytest.mark.system
def test_the_journal_example_writes_a_journal_that_replays(root: Path, server: Served, simulated: DemoRun) -> None:
    code = "".join(blocks(root, "python")[:2]).replace("127.0.0.1:8000", server.http)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=simulated.folder, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in (["journal", "inspect", "journal"], ["replay", "journal", "--url", server.http]):
        done = subprocess.run([*COMMAND, *command], capture_output=True, text=True, cwd=simulated.folder, check=False)
        assert done.returncode == 0, done.stderr
    assert "1 requests sent again, 1 answers identical" in done.stdout


@pytest.mark.system
def test_every_command_the_readme_names_is_there(root: Path) -> None:
    named = set(re.findall(r"(?:^    |`)tickserve ([a-z]+)", (root / "README.md").read_text(), re.MULTILINE))
    assert len(named) >= 8
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, env=environment(), check=True)
    for name in named:
        assert re.search(rf"^\s+{name}\b", done.stdout, re.MULTILINE), name

"""promtool, Prometheus' own: the rules are valid, and every alert fires and resolves as its cases say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from monitoring import render
from tests.monitoring.stage import SHORT

pytestmark = pytest.mark.system
UNIT_TESTS = sorted(Path(__file__).with_name("rules").glob("*.test.yaml"))


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120)


def test_the_committed_rules_are_valid(root: Path) -> None:
    files = sorted((root / "k8s" / "chart" / "files" / "rules").glob("*.yaml"))
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", *files)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SUCCESS") == len(files) == 6


def test_rules_with_other_windows_are_valid_and_a_broken_one_is_not(tmp_path: Path) -> None:
    written = [path for path in render.write(SHORT, tmp_path) if path.suffix == ".yaml"]
    assert promtool("check", "rules", *written).returncode == 0
    written[0].write_text(written[0].read_text().replace("sum by", "sum buy", 1))
    assert promtool("check", "rules", *written).returncode == 1


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.name)
def test_alerts_fire_and_resolve_as_their_cases_say(path: Path) -> None:
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("group", "text", "instead"),
    [
        ("deadline", "> 0.0144", "> 0.144"),
        ("servers", "== 0", "== 1"),
        ("servers", 'reason!="CANCELED"', 'reason!="REJECTED"'),
        ("clients", "> 0.05", "< 0.05"),
        ("models", "> 0.25", "> 0.75"),
        ("gpu", "> 85", "> 95"),
        ("gpu", "is hot", "is warm"),
    ],
)
def test_a_rule_that_was_changed_fails_its_case(
    tmp_path: Path, root: Path, group: str, text: str, instead: str
) -> None:
    """The negative control: each unit test sees its own rule."""
    rules = tmp_path / "k8s" / "chart" / "files" / "rules"
    shutil.copytree(root / "k8s" / "chart" / "files" / "rules", rules)
    changed = [path for path in rules.iterdir() if path.stem in (group, "recorded") and text in path.read_text()]
    assert changed
    for path in changed:
        path.write_text(path.read_text().replace(text, instead))
    cases = tmp_path / "tests" / "monitoring" / "rules"
    cases.mkdir(parents=True)
    case = shutil.copy(Path(__file__).with_name("rules") / f"{group}.test.yaml", cases)
    assert promtool("test", "rules", case).returncode == 1

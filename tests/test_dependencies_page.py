"""docs/dependencies.md gives a reason for every dependency of pyproject.toml, and for nothing else."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "dependencies.md").read_text()


def section(title: str) -> list[list[str]]:
    """The cells of the rows of a section's table."""
    _, _, text = PAGE.partition(f"\n## {title}")
    rows = [line.strip("| ").split(" | ") for line in text.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def declared() -> tuple[set[str], dict[str, set[str]]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return names(project["dependencies"]), {extra: names(packages) for extra, packages in extras.items()}


def names(requirements: list[str]) -> set[str]:
    return {Requirement(text).name for text in requirements}


def documented_extras() -> dict[str, set[str]]:
    """Extra -> packages. A cell may name several extras, and a package may say `, also <extra>`."""
    found: dict[str, set[str]] = {}
    for extras, package, _ in section("Extras"):
        package, _, also = package.partition(", also ")
        for extra in [*extras.split(", "), *([also] if also else [])]:
            found.setdefault(extra, set()).add(package)
    return found


def test_every_dependency_has_its_reason() -> None:
    base, extras = declared()
    development = extras.pop("dev")
    assert {package for package, _ in section("Base")} == base
    assert {package for package, _ in section("Development")} == development
    assert documented_extras() == extras


def test_every_reason_says_something() -> None:
    rows = [*section("Base"), *section("Extras"), *section("Development"), *section("Outside PyPI")]
    assert all(len(row[-1]) > 8 for row in rows if not row[0].startswith("types-") and row[-1] != "its types")
    assert len(rows) > 30


def test_the_system_packages_are_those_of_the_makefile() -> None:
    asked = re.search(r"^SYSTEM_PACKAGES := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert asked
    assert {tool for tool, *_ in section("Outside PyPI")} == set(asked[1].split())

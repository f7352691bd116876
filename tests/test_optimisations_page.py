"""docs/optimisations.md has one row for every number and letter, and names only what there is."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tests.named_tests import NAMED, fault
from tickserve.cli.commands import app
from tickserve.config import Config
from tickserve.doctor.optimizations import RULES
from tickserve.settings import flatten

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "optimisations.md").read_text()
EXPECTED = [*map(str, range(1, 103)), *string.ascii_uppercase]
NOT_TAKEN = "not taken, because "
EVIDENCE = re.compile(r"test_|[\w/]+\.py::|benchmarks\.|tickserve |\w+\.\w+$")
SETTINGS = set(flatten(Config().model_dump()))
COMMAND: Any = typer.main.get_command(app)


def rows(page: str) -> list[list[str]]:
    """The cells of every row: no., what, key or command, where measured."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:2] == "| "]
    return [row for row in cells if re.fullmatch(r"\d+|[A-Z]", row[0])]


def names(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def wrong(name: str) -> str | None:
    """What is wrong with a key, a command, a benchmark or a test; None where it exists."""
    if NAMED.fullmatch(f"`{name}`"):
        return fault(name)
    if name.startswith("benchmarks."):
        program = ROOT / "benchmarks" / f"{name.partition('.')[2]}.py"
        return None if program.is_file() and "__main__" in program.read_text() else f"{name}: no such benchmark"
    if name.startswith("tickserve "):
        found = COMMAND
        for word in name.split()[1:]:
            found = getattr(found, "commands", {}).get(word)
        return None if found is not None and not hasattr(found, "commands") else f"{name}: no such command"
    return None if name in SETTINGS else f"{name}: no such key"


def problems(row: list[str]) -> list[str]:
    """What a row names that is not there, and what it lacks."""
    if len(row) != 4 or not row[1]:
        return ["expected four cells"]
    _, _, set_by, measured = row
    found = [said for name in names(set_by) if (said := wrong(name))]
    evidence = [
        name for name in names(measured) if re.match(r"test_|[\w/]+\.py::|benchmarks\.|tickserve |\w+\.\w+$", name)
    ]
    found += [said for name in evidence if (said := wrong(name))]
    if measured.startswith(NOT_TAKEN):
        return found + (["not taken, and yet set"] if set_by else [])
    if not names(set_by):
        found.append("no key and no command")
    if not evidence and not re.search(r"\*stages\*|\]\(\w+\.md\)", measured):
        found.append("measured nowhere")
    return found


def test_every_number_and_letter_has_one_row() -> None:
    assert [row[0] for row in rows(PAGE)] == EXPECTED


def test_what_the_rows_name_exists() -> None:
    assert {row[0]: said for row in rows(PAGE) if (said := problems(row))} == {}


def test_links_lead_to_pages() -> None:
    links = re.findall(r"\]\(([\w-]+\.md)\)", PAGE)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).is_file()] == []


def test_what_the_doctor_lists_is_on_the_page() -> None:
    assert {rule.key for rule in RULES} - set(names(PAGE)) == set()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("| 1 | a | `trainer.precison` | `benchmarks.training` |", "trainer.precison: no such key"),
        ("| 1 | a | `tickserve tuen` | `benchmarks.training` |", "tickserve tuen: no such command"),
        ("| 1 | a | `tickserve repo` | `benchmarks.training` |", "tickserve repo: no such command"),
        ("| 1 | a | `tune.trials` | `benchmarks.harness` |", "benchmarks.harness: no such benchmark"),
        ("| 1 | a | `tune.trials` | `test_that_nobody_wrote` |", "test_that_nobody_wrote: no such test"),
        ("| 1 | a | `tune.trials` | we believe so |", "measured nowhere"),
        ("| 1 | a | | `benchmarks.training` |", "no key and no command"),
        ("| 1 | a | `tune.trials` | not taken, because of that |", "not taken, and yet set"),
        ("| 1 | a | `tune.trials` |", "expected four cells"),
    ],
)
def test_a_row_that_lies_is_noticed(row: str, says: str) -> None:
    (cells,) = rows(row)
    assert problems(cells) == [says]

"""docs/faults.md names tests, each of which has to exist, and has a row for every number of the project's list."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.named_tests import NAMED, fault

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "faults.md").read_text()
# The list of inputs and faults that this project was given; what is left out of a row of numbers is not in it.
INPUTS = {
    "client and request": {*range(1, 10), 11, 12, 13, 15, 17, 18, *range(20, 25), *range(27, 32)},
    "server, on the wire": {32, 33, 34, 36, 38, 39, 43, 44, 47},
    "exporter and model files": {48, 49, 50, *range(52, 59), 60},
}
# Of the loader and of the configuration, on the page's last table.
MORE = {*range(61, 71), 71, 72, 73, 75, 76, 77, 78}
FAULTS = {1, 2, 3, 4, 5, 7, 8, 10, 12, 15, 16, 17, 18, 21, 22, 26, 28, 29, 33, 34, 36, 41, 42}
SECTIONS = {f"Inputs: {name}": numbers for name, numbers in INPUTS.items()} | {"Faults": FAULTS, "More": MORE}


def rows(page: str, section: str) -> list[list[str]]:
    """The cells of a section's table: numbers, what, what happens, tests."""
    body = re.split(rf"^## {re.escape(section)}$", page, flags=re.MULTILINE)[1].split("\n## ")[0]
    lines = [line for line in body.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def covered(page: str, section: str) -> set[int]:
    """The numbers of a section whose row names a test."""
    named = [row[0] for row in rows(page, section) if NAMED.search(row[-1])]
    return {int(number) for numbers in named for number in re.findall(r"\d+", numbers)}


def test_every_test_the_page_names_exists_and_is_one() -> None:
    named = set(NAMED.findall(PAGE))
    assert len(named) > 150
    assert [said for name in sorted(named) if (said := fault(name))] == []
    # A name in backticks that is written in no such way would be looked at by nobody.
    assert len(re.findall(r"`[^`]*\btest_\w+`", PAGE)) == len(NAMED.findall(PAGE))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("test_that_nobody_wrote", "no such test"),
        ("test_store.py::test_every_row_is_whole", "no such test"),
        (
            "test_an_unwritable_folder_is_a_typed_error",
            "/market/test_readers_events.py, /tickserve/test_store.py",
        ),
        ("test_families.py::test_a_window_longer_than_the_data_is_refused", None),
        ("training/test_families.py::test_a_window_longer_than_the_data_is_refused", "a shorter name"),
        ("test_faults_page.py::test_every_row_is_whole", "a shorter name"),
    ],
)
def test_a_name_that_is_none_or_several_is_noticed(name: str, says: str | None) -> None:
    said = fault(name)
    assert (said is None) if says is None else (said is not None and says in said)


@pytest.mark.parametrize("section", SECTIONS)
def test_no_number_of_the_list_is_missing(section: str) -> None:
    assert not SECTIONS[section] - covered(PAGE, section)


def test_every_row_is_whole() -> None:
    for section in SECTIONS:
        for row in rows(PAGE, section):
            assert len(row) == 4, row
            assert all(row[1:]), row
            assert NAMED.search(row[-1]), row


def test_a_row_that_goes_or_names_no_test_is_noticed() -> None:
    line = next(line for line in PAGE.splitlines() if line.startswith("| 29 | an address"))
    assert 29 not in covered(PAGE.replace(line, ""), "Inputs: client and request")
    bare = re.sub(NAMED, "", line)
    assert 29 not in covered(PAGE.replace(line, bare), "Inputs: client and request")

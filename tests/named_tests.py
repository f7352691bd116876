"""The tests that a page of docs/ names: `test_name`, or `file.py::test_name` where several files define it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parent
NAMED = re.compile(r"`((?:[\w/]+\.py::)?test_\w+)`")


@cache
def defined() -> dict[str, list[str]]:
    """The files that define each test, as paths below tests/ with a leading slash."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for name in re.findall(r"^(?:async )?def (test_\w+)\(", path.read_text(), re.MULTILINE):
            found.setdefault(name, []).append(f"/{path.relative_to(TESTS)}")
    return found


def fault(named: str) -> str | None:
    """What is wrong with a test's name on a page: no such test, one of several, or a file that tells nothing apart."""
    file, _, test = named.rpartition("::")
    files = defined().get(test, [])
    meant = [path for path in files if path.endswith(f"/{file}")] if file else files
    if not meant:
        return f"{named}: no such test"
    if len(meant) > 1:
        return f"{named}: one of {', '.join(meant)}; write file.py::{test}"
    shorter = file.partition("/")[2] if "/" in file else ""
    if file and (len(files) == 1 or (shorter and sum(path.endswith(f"/{shorter}") for path in files) == 1)):
        return f"{named}: a shorter name is clear enough"
    return None

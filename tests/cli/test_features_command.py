"""`tickserve features list`: every default spec, or the columns of one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from tickserve.cli.commands import app
from tickserve.cli.output import out
from tickserve.config import Config
from tickserve.errors import UsageError
from tickserve.features.spec import MOST_LEVELS, default_spec


def listed(*options: str) -> Any:
    done = CliRunner().invoke(app, ["features", "list", "--json", *options])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_every_default_spec_is_listed_with_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = listed()
    assert [one["spec"] for one in found] == ["bars", *(f"book-l{levels}" for levels in range(1, MOST_LEVELS + 1))]
    assert len({one["digest"] for one in found}) == len(found)
    for one in found:
        spec = default_spec(one["kind"], one["levels"] or 0)
        assert (one["digest"], one["column_count"]) == (spec.digest, len(spec.columns))
    monkeypatch.setattr(out, "width", 160)  # the console was as wide as the terminal that started the tests
    text = CliRunner().invoke(app, ["features", "list"]).stdout
    assert all(one["digest"] in text for one in found)


def test_as_many_levels_are_listed_as_can_be_asked_for() -> None:
    """The configuration takes no more, so no spec that a bundle may name is left out."""
    limits = {type(one).__name__: one for one in type(Config().features).model_fields["levels"].metadata}
    assert limits["Le"].le == MOST_LEVELS


def test_the_columns_of_one() -> None:
    assert listed("--kind", "book") == listed("--levels", "5")
    assert listed("--kind", "bars")["columns"] == list(default_spec("bars", 0).columns)
    assert len(listed("--levels", "1")["columns"]) < len(listed("--levels", "20")["columns"])


@pytest.mark.parametrize("options", [["--kind", "ticks"], ["--kind", "bars", "--levels", "5"]])
def test_what_names_no_spec_is_refused(options: list[str]) -> None:
    done = CliRunner().invoke(app, ["features", "list", *options])
    assert isinstance(done.exception, UsageError)

"""The dashboards: laid out, committed, and valid by the classes that Grafana publishes for its dashboards."""

from __future__ import annotations

import enum
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import dashboard as schema
from grafana_foundation_sdk.models import prometheus

from monitoring import render
from monitoring.dashboards import dashboards
from monitoring.dashboards.panel import COLUMNS, Dashboard
from monitoring.dashboards.variables import concrete
from tickserve.settings import load_settings

register_default_plugins()
SETTINGS = load_settings(profile="production", environ={}).config.monitoring
PAGES = dashboards(SETTINGS)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.uid)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def lost(board: dict[str, Any]) -> dict[str, Any]:
    """What Grafana's own classes do not know or change, on the way through them."""
    back = dict(leaves(json.loads(json.dumps(schema.Dashboard.from_json(board), cls=JSONEncoder))))
    return {path: value for path, value in leaves(board) if back.get(path, "nothing") != value}


@each_page
def test_grafanas_own_classes_keep_every_value(page: Dashboard) -> None:
    board = page.json()
    assert lost(board) == {}
    read = schema.Dashboard.from_json(board)
    for panel in read.panels or []:
        targets = getattr(panel, "targets", None) or []
        assert all(isinstance(target, prometheus.Dataquery) and target.ref_id for target in targets)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("panels", 1, "gridpos"), {}),
        (("panels", 1, "fieldConfig", "defaults", "limit"), 1),
        (("panels", 1, "fieldConfig", "defaults", "custom", "lineWeight"), 3),
        (("panels", 1, "options", "legend", "position"), "left"),
        (("panels", 1, "targets", 0, "query"), "up"),
        (("templating", "list", 1, "values"), []),
        (("datasource",), "prometheus"),
    ],
)
def test_a_key_that_grafana_does_not_know_is_noticed(path: tuple[Any, ...], value: Any) -> None:
    board = json.loads(PAGES[0].text())
    place = board
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value or "text"
    assert lost(board)


@each_page
def test_panels_lie_beside_each_other(page: Dashboard) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in page.json()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
    numbers = [panel["id"] for panel in page.json()["panels"]]
    assert numbers == sorted(set(numbers))
    assert all(panel.about and panel.queries for panel in page.panels)
    assert len({panel.title for panel in page.panels}) == len(page.panels)


def test_titles_and_uids_differ() -> None:
    assert len({page.uid for page in PAGES}) == len({page.title for page in PAGES}) == 5


def test_the_committed_files_are_what_the_code_says(root: Path) -> None:
    """Write them again with `tickserve monitor render --out k8s/chart/files --profile production`."""
    folder, expected = root / "k8s" / "chart" / "files", render.files(SETTINGS)
    found = {
        f"{kind}/{path.name}": path.read_text()
        for kind in ("rules", "dashboards")
        for path in (folder / kind).iterdir()
    }
    assert found == expected


def test_a_query_without_grafana() -> None:
    expr = 'rate(x{namespace=~"$namespace", job=~"${job}"}[$__rate_interval])'
    assert concrete(expr, "5m") == 'rate(x{namespace=~".*", job=~".*"}[5m])'


@each_page
def test_every_variable_of_a_query_is_there_to_choose(page: Dashboard) -> None:
    for panel in page.panels:
        for query in panel.queries:
            rest = query.expr.replace("$__rate_interval", "")
            for name in page.variables:
                rest = rest.replace(f"${name}", "")
            assert "$" not in rest, query.expr


def test_what_the_chart_promises_is_drawn(root: Path) -> None:
    recorded = set(re.findall(r"tickserve:slo:\w+", (root / "k8s/chart/templates/prometheusrule.yaml").read_text()))
    assert len(recorded) == 2
    drawn = " ".join(query.expr for page in PAGES for panel in page.panels for query in panel.queries)
    assert all(name in drawn for name in recorded)


def test_a_dashboard_is_drawn_in_the_docs(root: Path) -> None:
    folder = root / "docs" / "pictures" / "dashboards"
    text = (root / "docs" / "monitoring.md").read_text()
    for page in PAGES:
        picture = folder / f"{page.uid}.png"
        assert picture.stat().st_size <= 150_000
        assert f"(pictures/dashboards/{picture.name})" in text


def mistyped(value: Any, hint: Any, path: str) -> Iterator[str]:
    """Where a value of Grafana's classes is not of the type that they declare; they do not check it themselves."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is list and isinstance(value, list):
        for index, each in enumerate(value):
            yield from mistyped(each, inner[0], f"{path}[{index}]")
    elif origin is dict and isinstance(value, dict):
        for key, each in value.items():
            yield from mistyped(each, inner[1], f"{path}.{key}")
    elif not fits(value, hint):
        yield f"{path}: {value!r}"
    elif type(value).__module__.startswith("grafana_foundation_sdk") and not isinstance(value, enum.Enum):
        for name, each in typing.get_type_hints(type(value)).items():
            yield from mistyped(getattr(value, name), each, f"{path}.{name}")


def fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(not any(mistyped(value, each, "")) for each in inner)
    if origin is typing.Literal:
        return value in inner
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in list(hint)
    if isinstance(value, bool):
        return hint in (bool, object)
    return isinstance(value, (int, float) if hint is float else origin or hint)


@each_page
def test_every_value_has_the_type_that_grafanas_classes_declare(page: Dashboard) -> None:
    assert list(mistyped(schema.Dashboard.from_json(page.json()), schema.Dashboard, "")) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schemaVersion",), "38"),
        (("panels", 1, "gridPos", "w"), "12"),
        (("panels", 1, "fieldConfig", "defaults", "unit"), 3),
        (("panels", 1, "fieldConfig", "defaults", "thresholds", "mode"), "relative"),
        (("panels", 1, "fieldConfig", "defaults", "custom", "showPoints"), "sometimes"),
        (("panels", 1, "options", "legend", "placement"), "left"),
        (("panels", 1, "targets", 0, "expr"), ["up"]),
        (("panels", 1, "targets", 0, "format"), "series"),
        (("templating", "list", 1, "refresh"), 9),
        (("tags",), "tickserve"),
    ],
)
def test_a_value_of_another_type_is_noticed(path: tuple[Any, ...], value: Any) -> None:
    board = json.loads(PAGES[0].text())
    place = board
    for key in path[:-1]:
        place = place[key]
    assert path[-1] in place
    place[path[-1]] = value
    assert list(mistyped(schema.Dashboard.from_json(board), schema.Dashboard, ""))

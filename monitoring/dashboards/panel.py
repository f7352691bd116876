"""Panels and dashboards as typed values, and the JSON that Grafana reads.

The layout follows from the widths: panels of a row are set from left to right on Grafana's grid of 24 columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any, Literal

Kind = Literal["timeseries", "stat", "table", "heatmap", "bargauge"]
Json = dict[str, Any]
COLUMNS = 24
# Grafana migrates older dashboards by itself; this is what its release 10.1, the oldest this is for, writes.
SCHEMA_VERSION = 38
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
GREEN, RED = "green", "red"


@dataclass(frozen=True)
class Query:
    """One PromQL expression and the legend of its series."""

    expr: str
    legend: str = ""

    def json(self, ref: str, kind: Kind) -> Json:
        """One target of a panel of `kind`."""
        now = kind in ("stat", "table", "bargauge")
        return {
            "refId": ref,
            "datasource": DATASOURCE,
            "expr": self.expr,
            "legendFormat": self.legend or "__auto",
            "format": {"heatmap": "heatmap", "table": "table"}.get(kind, "time_series"),
            "instant": now,
            "range": not now,
        }


@dataclass(frozen=True)
class Panel:
    """What one picture shows. `limit` is drawn as a line, from which on it is `bad` to be above or below.

    `unit` is one of Grafana's ids: s, reqps, percentunit, bytes, short. `width` is in 24ths of the page.
    """

    title: str
    about: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 8
    limit: float | None = None
    bad: Literal["above", "below"] = "above"
    minimum: float | None = 0

    def json(self, number: int, x: int, y: int) -> Json:
        """The panel as Grafana reads it."""
        targets = [query.json(letter, self.kind) for letter, query in zip(ascii_uppercase, self.queries, strict=False)]
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.about,
            "datasource": DATASOURCE,
            "gridPos": {"h": self.height, "w": self.width, "x": x, "y": y},
            "targets": targets,
            "fieldConfig": {"defaults": self._defaults(), "overrides": []},
            "options": OPTIONS[self.kind],
        }

    def _defaults(self) -> Json:
        defaults: Json = {"unit": self.unit, "thresholds": self._thresholds(), "color": {"mode": "palette-classic"}}
        if self.minimum is not None:
            defaults["min"] = self.minimum
        if self.kind == "timeseries":
            style = {"mode": "off" if self.limit is None else "line"}
            defaults["custom"] = {"fillOpacity": 8, "showPoints": "never", "thresholdsStyle": style}
        elif self.kind in ("stat", "bargauge"):
            defaults["color"] = {"mode": "thresholds"}
        return defaults

    def _thresholds(self) -> Json:
        below, above = (GREEN, RED) if self.bad == "above" else (RED, GREEN)
        # Below its first step a threshold has no value: JSON's null.
        steps: list[Json] = [{"value": None, "color": GREEN if self.limit is None else below}]
        if self.limit is not None:
            steps.append({"value": self.limit, "color": above})
        return {"mode": "absolute", "steps": steps}


OPTIONS: dict[Kind, Json] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "graphMode": "none",
        "colorMode": "value",
        "justifyMode": "auto",
        "textMode": "auto",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"]},
    },
    "table": {"frameIndex": 0, "showHeader": True},
    "heatmap": {},
    "bargauge": {
        "displayMode": "basic",
        "valueMode": "color",
        "orientation": "horizontal",
        "showUnfilled": True,
        "reduceOptions": {"calcs": ["lastNotNull"]},
    },
}


@dataclass(frozen=True)
class Dashboard:
    """One page: rows of panels under their titles."""

    uid: str
    title: str
    about: str
    rows: Mapping[str, Sequence[Panel]]
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.uid}.json"

    @property
    def panels(self) -> tuple[Panel, ...]:
        """Every panel, from the top."""
        return tuple(panel for row in self.rows.values() for panel in row)

    def json(self) -> Json:
        """The dashboard as Grafana reads it; without id and version, which belong to a server."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.about,
            "tags": ["tickserve"],
            "timezone": "utc",
            "editable": True,
            "graphTooltip": 1,
            "schemaVersion": SCHEMA_VERSION,
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "templating": {"list": [_datasource(), *(_variable(*pair) for pair in self.variables.items())]},
            "annotations": {"list": []},
            "links": [LINK],
            "panels": list(self._laid_out()),
        }

    def text(self) -> str:
        """The text of its file."""
        return json.dumps(self.json(), indent=2) + "\n"

    def _laid_out(self) -> Iterator[Json]:
        number, y = 1, 0
        for title, panels in self.rows.items():
            yield _row(number, title, y)
            number, y, x, tallest = number + 1, y + 1, 0, 0
            for panel in panels:
                if x + panel.width > COLUMNS:
                    x, y, tallest = 0, y + tallest, 0
                yield panel.json(number, x, y)
                number, x, tallest = number + 1, x + panel.width, max(tallest, panel.height)
            y += tallest


LINK: Json = {
    "title": "Tickserve",
    "type": "dashboards",
    "icon": "external link",
    "tooltip": "",
    "tags": ["tickserve"],
    "asDropdown": False,
    "targetBlank": False,
    "includeVars": True,
    "keepTime": True,
}


def _row(number: int, title: str, y: int) -> Json:
    place = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _datasource() -> Json:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0}


def _variable(name: str, query: str) -> Json:
    """All values of a label, and `.*` for all of them: where no series has the label, that still finds every one."""
    return {
        "name": name,
        "type": "query",
        "query": {"query": query, "refId": name},
        "datasource": DATASOURCE,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "hide": 0,
        "sort": 1,
    }

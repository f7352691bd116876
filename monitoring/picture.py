"""Dashboards drawn from a live Prometheus by matplotlib: every panel's queries, as a person would see them.

These are no screenshots of Grafana, and each picture says so.
"""

from __future__ import annotations

import http.client
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitoring.dashboards import dashboards
from monitoring.dashboards.panel import COLUMNS, Dashboard, Panel, Query
from monitoring.dashboards.variables import concrete
from tickserve.config import MonitoringSettings
from tickserve.errors import ComponentError, ProtocolError, UsageError
from tickserve.store import unwritable

TIMEOUT_S = 30.0
POINTS = 120
MAX_LINES = 12
DPI, COLOURS = 72, 64
UNITS = {"s": "s", "percentunit": "share", "reqps": "/s", "ops": "/s", "bytes": "bytes"}
CAPTION = "drawn from Prometheus by matplotlib; no screenshot of Grafana"


@dataclass(frozen=True)
class Line:
    """One series of a query."""

    label: str
    times: tuple[float, ...]
    values: tuple[float, ...]


def draw(
    url: str, settings: MonitoringSettings, folder: Path, *, seconds: float = 3_600.0, interval: str = "5m"
) -> list[Path]:
    """A PNG of each dashboard below `folder`, over the last `seconds`; `interval` stands for `$__rate_interval`.

    Raises UsageError, ComponentError (nobody answers, the folder cannot be written) and ProtocolError.
    """
    if not url.startswith(("http://", "https://")):
        raise UsageError("wrong address", field="--url", expected="http://host:port", was=repr(url[:100]))
    end = time.time()
    source = _Source(url.rstrip("/"), end - seconds, end, interval)
    return [_page(page, source, folder / f"{page.uid}.png") for page in dashboards(settings)]


@dataclass(frozen=True)
class _Source:
    """Where queries go, and for which time."""

    url: str
    start: float
    end: float
    interval: str

    def over_time(self, query: Query) -> list[Line]:
        """Every series that was there at any time of the picture."""
        step = max((self.end - self.start) / POINTS, 0.5)
        asked = {"start": f"{self.start:.3f}", "end": f"{self.end:.3f}", "step": f"{step:.3f}"}
        return self._lines("query_range", query, asked)

    def now(self, query: Query) -> list[Line]:
        """Every series that is there at the end: what has ended is not what a table shows."""
        return self._lines("query", query, {"time": f"{self.end:.3f}"})

    def _lines(self, path: str, query: Query, asked: dict[str, str]) -> list[Line]:
        try:
            found = self._ask(path, {"query": concrete(query.expr, self.interval), **asked})
            return [_line(query, series) for series in found["data"]["result"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ProtocolError("not the answer of a Prometheus", field="--url") from error

    def _ask(self, path: str, asked: dict[str, str]) -> Any:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(asked)}"
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:  # noqa: S310 - the scheme is checked
                return json.load(answer)
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ComponentError(f"no Prometheus at {self.url[:100]}: {reason}", field="--url") from error


def _line(query: Query, series: Any) -> Line:
    labels = {name: value for name, value in series["metric"].items() if name != "__name__"}
    label = query.legend
    for name, value in labels.items():
        label = label.replace(f"{{{{{name}}}}}", value)
    samples = series["values"] if "values" in series else [series["value"]]
    points = [(float(when), float(value)) for when, value in samples]
    return Line(label or ", ".join(labels.values()), *(tuple(column) for column in zip(*points, strict=True)))


def _page(page: Dashboard, source: _Source, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [panels for row in page.rows.values() for panels in _shelves(row)]
    figure = Figure(figsize=(15, 3.2 * len(rows) + 0.6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{page.title} ({CAPTION})", fontsize=12)
    across = max(len(row) for row in rows)
    grid = figure.subplots(len(rows), across, squeeze=False)
    for axes, panels in zip(grid, rows, strict=True):
        for index, axis in enumerate(axes):
            if index < len(panels):
                _panel(axis, panels[index], source)
            else:
                axis.set_axis_off()
    _save(figure, path)
    return path


def _save(figure: Any, path: Path) -> None:
    """As a PNG of few colours: a fifth of the size."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(drawn).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    except OSError as error:
        raise unwritable(path, error) from error


def _shelves(panels: Sequence[Panel]) -> list[list[Panel]]:
    """The panels of a row as they break on the page."""
    shelves: list[list[Panel]] = [[]]
    for panel in panels:
        if sum(each.width for each in shelves[-1]) + panel.width > COLUMNS:
            shelves.append([])
        shelves[-1].append(panel)
    return shelves


def _panel(axis: Any, panel: Panel, source: _Source) -> None:
    ask = source.now if panel.kind in ("table", "bargauge") else source.over_time
    lines = [line for query in panel.queries for line in ask(query)]
    axis.set_title(panel.title, fontsize=10, loc="left")
    if panel.kind != "heatmap" and len(lines) > MAX_LINES:
        axis.set_title(f"and {len(lines) - MAX_LINES} more", fontsize=8, loc="right", color="grey")
    axis.tick_params(labelsize=7)
    if not lines:
        axis.text(0.5, 0.5, "no data", ha="center", va="center", color="grey", transform=axis.transAxes)
        axis.set_xticks([])
        axis.set_yticks([])
        return
    if panel.kind == "table":
        _table(axis, lines)
    elif panel.kind == "bargauge":
        _bars(axis, panel, lines)
    elif panel.kind == "heatmap":
        _heatmap(axis, lines, source)
    else:
        _curves(axis, panel, lines, source)


def _curves(axis: Any, panel: Panel, lines: Sequence[Line], source: _Source) -> None:
    shown = sorted(lines, key=lambda line: -max(line.values))[:MAX_LINES]
    for line in shown:
        axis.plot([when - source.end for when in line.times], line.values, linewidth=1, label=line.label[:40])
    if panel.limit is not None:
        axis.axhline(panel.limit, color="red", linewidth=0.8, linestyle="--")
    axis.set_xlim(source.start - source.end, 0)
    axis.set_ylabel(UNITS.get(panel.unit, ""), fontsize=7)
    axis.set_xlabel("seconds before now", fontsize=7)
    axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False)


def _bars(axis: Any, panel: Panel, lines: Sequence[Line]) -> None:
    shown = lines[:MAX_LINES]
    axis.barh([line.label[:40] for line in shown], [line.values[-1] for line in shown], height=0.6)
    if panel.limit is not None:
        axis.axvline(panel.limit, color="red", linewidth=0.8, linestyle="--")


def _heatmap(axis: Any, lines: Sequence[Line], source: _Source) -> None:
    """Cumulative buckets by `le`, made into counts of each."""
    import numpy as np

    ordered = sorted(lines, key=lambda line: float(line.label))
    times = sorted({when for line in ordered for when in line.times})
    place = {when: index for index, when in enumerate(times)}
    cumulative = np.zeros((len(ordered), len(times)))
    for row, line in enumerate(ordered):
        cumulative[row, [place[when] for when in line.times]] = line.values
    counts = np.diff(cumulative, axis=0, prepend=0).clip(0)
    axis.imshow(
        counts, aspect="auto", origin="lower", extent=(times[0] - source.end, times[-1] - source.end, 0, len(ordered))
    )
    marks = range(0, len(ordered), 5)
    axis.set_yticks([mark + 0.5 for mark in marks], [ordered[mark].label for mark in marks])


def _table(axis: Any, lines: Sequence[Line]) -> None:
    axis.set_axis_off()
    text = "\n".join(f"{line.label[:60]:<60} {line.values[-1]:g}" for line in lines[:MAX_LINES])
    axis.text(0, 0.95, text, fontsize=6, family="monospace", va="top", transform=axis.transAxes)

"""Rules and dashboards as files: what Prometheus, the chart and Grafana are given."""

from __future__ import annotations

from pathlib import Path

from monitoring.dashboards import dashboards
from monitoring.rules import groups
from tickserve.config import MonitoringSettings
from tickserve.store import unwritable


def files(settings: MonitoringSettings) -> dict[str, str]:
    """Text by path: `rules/<group>.yaml` and `dashboards/<uid>.json`."""
    rules = {f"rules/{group.file}": group.yaml(settings.runbook_url) for group in groups(settings)}
    return rules | {f"dashboards/{page.file}": page.text() for page in dashboards(settings)}


def write(settings: MonitoringSettings, folder: Path) -> list[Path]:
    """Write them below `folder`, and say which. Raises ComponentError when it cannot be written."""
    written = []
    for name, text in files(settings).items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise unwritable(path, error) from error
        written.append(path)
    return written

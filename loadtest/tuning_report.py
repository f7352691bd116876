"""A study's report: one HTML page without anything outside it, drawn from the study's `result.json` alone."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2

from loadtest.formats import FILTERS
from loadtest.pareto_plot import draw_pareto
from tickserve.errors import ArtifactError
from tickserve.store import write_atomic

RESULT, REPORT = "result.json", "report.html"


def write_tuning_report(folder: Path) -> Path:
    """Write `folder/report.html` and return its path. Raises ArtifactError for what is no result, ComponentError."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters.update(FILTERS)
    try:
        result = json.loads((folder / RESULT).read_bytes())
        page = environment.get_template("tuning.html.j2").render(result=result, plot=draw_pareto(result))
    except (OSError, ValueError, KeyError, TypeError, jinja2.TemplateError) as error:
        raise ArtifactError(f"not the result of a search: {str(error)[:100]}", field=RESULT) from error
    write_atomic(folder / REPORT, page.encode())
    return folder / REPORT

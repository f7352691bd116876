"""`tickserve monitor`: rules for Prometheus and dashboards for Grafana, written or pushed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tickserve import stages
from tickserve.cli import options
from tickserve.cli.output import emit, out

app = typer.Typer(help="Write alert rules and dashboards, and bring dashboards to Grafana.", no_args_is_help=True)


@app.command("render")
def render(
    folder: Annotated[Path, typer.Option("--out", help="rules/ and dashboards/ are written below it.")],
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Write the rules and dashboards with the thresholds of [monitoring]."""
    settings = options.settings_of(config, profile).config.monitoring
    written = stages.load("monitoring.render").write(settings, folder)
    value = {"files": [str(path) for path in written]}

    def show() -> None:
        for path in written:
            out.print(str(path), markup=False)
        out.print("check the rules with 'promtool check rules'; dashboards go to Grafana with 'tickserve monitor push'")

    emit(value, as_json, show)

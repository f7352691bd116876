"""`tickserve monitor`: rules for Prometheus and dashboards for Grafana, written, drawn, pushed or compared."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import stages
from tickserve.cli import monitor_clear, monitor_export, options
from tickserve.cli.output import emit, out, table
from tickserve.errors import UsageError

app = typer.Typer(help="Alert rules, dashboards, and the drift of what is served.", no_args_is_help=True)

app.command("export")(monitor_export.export)
app.command("clear")(monitor_clear.clear)

TOKEN_ENV = "GRAFANA_TOKEN"  # noqa: S105 - the name of a variable
Url = Annotated[str, typer.Option("--url", help="Of Grafana, e.g. http://127.0.0.1:3000.")]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help=f"A file with a service account's token; else ${TOKEN_ENV}.")
]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for each answer.")]
CaFile = Annotated[Path | None, typer.Option("--ca", help="PEM authority of Grafana's certificate.", exists=True)]
SHOWN = 60


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
    _emit_files(
        value,
        "check the rules with 'promtool check rules'; 'tickserve monitor push' takes dashboards to Grafana",
        as_json,
    )


@app.command("picture")
def picture(
    url: Annotated[str, typer.Option("--url", help="Of Prometheus, e.g. http://127.0.0.1:9090.")],
    folder: Annotated[Path, typer.Option("--out", help="A PNG of each dashboard is written here.")],
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="How far back.")] = 3_600.0,
    interval: Annotated[str, typer.Option("--rate-interval", help="In place of Grafana's $__rate_interval.")] = "1m",
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Draw every panel's queries from a live Prometheus, without Grafana."""
    settings = options.settings_of(config, profile).config.monitoring
    stages.load_core("matplotlib")
    drawn = stages.load("monitoring.picture").draw(url, settings, folder, seconds=seconds, interval=interval)
    _emit_files({"files": [str(path) for path in drawn]}, "these are no screenshots of Grafana", as_json)


@app.command("push")
def push(
    url: Url,
    token_file: TokenFile = None,
    folder: Annotated[str, typer.Option("--folder", help="Title of the folder, when it is made.")] = "Tickserve",
    ca: CaFile = None,
    timeout: Timeout = 10.0,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Bring the dashboards into a folder of Grafana; what is the same there already stays as it is."""
    grafana, pages = _grafana(url, token_file, ca, timeout), _pages(profile, config)
    rows = [asdict(each) for each in grafana.push(pages, folder)]

    def show() -> None:
        _show("dashboards", rows)
        out.print("they are in Grafana's folder; 'tickserve monitor diff' says when somebody changes one", markup=False)

    emit(rows, as_json, show)


@app.command("diff")
def diff(
    url: Url,
    token_file: TokenFile = None,
    ca: CaFile = None,
    timeout: Timeout = 10.0,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Show panel by panel what Grafana has otherwise. Exit code 1 when there is a difference."""
    grafana, pages = _grafana(url, token_file, ca, timeout), _pages(profile, config)
    rows = [asdict(each) for each in grafana.diff(pages)]

    def show() -> None:
        if rows:
            _show("differences", rows)
        else:
            out.print("Grafana has what the code says")

    emit(rows, as_json, show)
    if rows:
        raise typer.Exit(1)


def _grafana(url: str, token_file: Path | None, ca: Path | None, timeout: float) -> Any:
    module = stages.load("monitoring.grafana")
    stages.load_core("grafana_api")
    return module.Grafana(url, _token(token_file), timeout_s=timeout, verify=str(ca) if ca else True)


def _token(path: Path | None) -> str:
    """From the file, else from the environment; never from an option, which any process of the machine can read."""
    if path is None:
        token = os.environ.get(TOKEN_ENV, "")
    else:
        try:
            token = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise UsageError(f"cannot read it: {reason}", field="--token-file") from None
    if not token.strip():
        raise UsageError("no token", field="--token-file", expected=f"a file that holds one, or ${TOKEN_ENV}")
    return token.strip()


def _pages(profile: str | None, config: Path | None) -> Any:
    settings = options.settings_of(config, profile).config.monitoring
    return stages.load("monitoring.dashboards").dashboards(settings)


def _emit_files(value: dict[str, list[str]], then: str, as_json: bool) -> None:
    def show() -> None:
        for path in value["files"]:
            out.print(path, markup=False)
        out.print(then, markup=False)

    emit(value, as_json, show)


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0])
    table(title, columns, [[str(row[name])[:SHOWN] for name in columns] for row in rows])

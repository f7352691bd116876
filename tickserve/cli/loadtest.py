"""`tickserve loadtest`: Locust against served models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import pipeline, signing, stages
from tickserve.cli import options
from tickserve.cli.output import emit, out, says, table
from tickserve.errors import UsageError
from tickserve.store import check_writable

app = typer.Typer(help="Measure served latency under load.", no_args_is_help=True)


@app.command("run")
def run(
    repository: options.Repository = options.DEFAULT_REPOSITORY,
    model: Annotated[list[str] | None, typer.Option("--model", help="Only this model; may be repeated.")] = None,
    http: Annotated[str | None, typer.Option("--http", help="host:port of a running server.")] = None,
    grpc: Annotated[str | None, typer.Option("--grpc", help="host:port of a running server.")] = None,
    users: Annotated[int | None, typer.Option("--users", min=1, help="Concurrent users.")] = None,
    duration_s: Annotated[float | None, typer.Option("--duration-s", min=0.5, help="Length of the test.")] = None,
    out_folder: Annotated[Path, typer.Option("--out", help="Where the results go.")] = Path("runs/loadtest"),
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Load the given server, or an embedded one started for the test, over HTTP and gRPC."""
    overrides = {"loadtest.users": users, "loadtest.duration_s": duration_s}
    settings = options.settings_of(config, profile, overrides).config
    if (http is None) != (grpc is None):
        raise UsageError("--http and --grpc go together", field="--http, --grpc")
    names = model or pipeline.models_in(repository)
    versions = {name: pipeline.newest_version(repository, name) for name in names}
    if not versions:
        raise UsageError("no published model in the repository", field="--repository", hint="tickserve export first")
    check_writable(out_folder)
    load = stages.load("loadtest.run").run_load
    if http and grpc:
        results = load(http, grpc, versions, settings.loadtest, out_folder)
    else:
        says("starting the embedded Triton on free ports")
        free = settings.serve.model_copy(update={"http_port": 0, "grpc_port": 0, "metrics_port": 0})
        embedded, trusted = stages.load("serving.embedded"), signing.trusted_keys(settings.repository)
        with embedded.EmbeddedTriton(repository, free, models=list(versions), trusted=trusted) as server:
            results = load(server.http_url, server.grpc_url, versions, settings.loadtest, out_folder)
    emit(results, as_json, lambda: _show(results, out_folder))


def _show(results: dict[str, Any], folder: Path) -> None:
    columns = ("model", "transport", "requests", "failures", "rps", "p50_us", "p99_us")
    rows = [[row.get(column, "") for column in columns] for row in results["rows"]]
    table("load test", columns, rows)
    out.print(f"{folder / 'loadtest.json'}, {folder / 'latency.svg'}")

"""The tree of commands over the stages; each stage is imported only when its command runs."""

from __future__ import annotations

import sys

import typer

from tickserve import __version__
from tickserve.cli import (
    batching,
    bench,
    compress,
    config,
    data,
    demo,
    deploy,
    doctor,
    export,
    features,
    journal,
    loadtest,
    models,
    monitor,
    predict,
    profile,
    replay,
    repo,
    runtime,
    serve,
    tensorrt,
    train,
    tune,
    universe,
)

# What follows the first argument belongs to the program that the command starts.
PASSED_ON = {"allow_interspersed_args": False}

app = typer.Typer(
    name="tickserve",
    help="From market data to a served signal: train, export, serve and prove trading models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.add_typer(data.app, name="data")
app.add_typer(features.app, name="features")
app.command("train")(train.train)
app.command("tune")(tune.tune)
app.command("compress")(compress.compress)
app.add_typer(universe.app, name="universe")
app.command("export")(export.export)
app.add_typer(repo.app, name="repo")
app.add_typer(runtime.app, name="runtime")
app.add_typer(tensorrt.app, name="tensorrt")
app.command("serve")(serve.serve)
app.add_typer(models.app, name="models")
app.command("predict")(predict.predict)
app.add_typer(journal.app, name="journal")
app.command("replay")(replay.replay)
app.add_typer(loadtest.app, name="loadtest")
app.add_typer(batching.app, name="batching")
app.add_typer(deploy.app, name="deploy")
app.add_typer(monitor.app, name="monitor")
app.add_typer(config.app, name="config")
app.command("profile", context_settings=PASSED_ON)(profile.profile)
app.command("bench", context_settings=PASSED_ON)(bench.bench)
app.command("doctor")(doctor.doctor)


def _version(show: bool) -> None:
    if show:
        sys.stdout.write(f"tickserve {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Hold the options of the command itself."""

"""`tickserve config`: what is in force, and where each value came from."""

from __future__ import annotations

import typer

from tickserve.cli import options
from tickserve.cli.output import emit, out, table
from tickserve.settings import flatten

app = typer.Typer(help="Show or check the configuration.", no_args_is_help=True)


@app.command("show")
def show(profile: options.Profile = None, config: options.ConfigFile = None, as_json: options.AsJson = False) -> None:
    """Print every key, its value, and where the value came from."""
    settings = options.settings_of(config, profile)
    values = flatten(settings.config.model_dump(mode="json"))
    result = {key: {"value": value, "origin": settings.origin[key]} for key, value in values.items()}
    rows = [(key, value, settings.origin[key]) for key, value in values.items()]
    emit(result, as_json, lambda: table("configuration in force", ("key", "value", "from"), rows))


@app.command("check")
def check(profile: options.Profile = None, config: options.ConfigFile = None) -> None:
    """Exit 0 when the configuration is valid, 2 with the reason when it is not."""
    options.settings_of(config, profile)
    out.print("the configuration is valid")

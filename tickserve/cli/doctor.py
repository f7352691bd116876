"""`tickserve doctor`: what this machine and environment allow, and the fix for what is missing."""

from __future__ import annotations

from typing import Annotated

import typer

from tickserve.cli import options
from tickserve.cli.output import emit, table
from tickserve.doctor import accelerator, installed, jitter, kernel, optimizations, threads
from tickserve.errors import ComponentError


def doctor(
    optimisations: Annotated[
        bool,
        typer.Option("--optimizations", help="Which optimisations the configuration in force uses, and why not."),
    ] = False,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """List what is there, what is not, and the fix. Exits 4 when something that `tickserve demo` needs is missing."""
    settings = options.settings_of(config, profile).config
    if optimisations:
        found = optimizations.optimizations(settings, optimizations.machine_here())
        rows = [(each.name, "active" if each.active else "inactive", each.why, each.key) for each in found]
        columns = ("optimisation", "", "why", "set by")
        emit([each.to_json() for each in found], as_json, lambda: table("optimisations", columns, rows))
        return
    # Jitter first: libraries that load have the machine busy for a while after.
    shaken = jitter.findings()
    findings = [*installed.findings(), *threads.findings(), *kernel.findings(), *shaken, *accelerator.findings()]
    lines = [(item.what, item.found, item.word, "" if item.ok else item.fix) for item in findings]
    columns = ("what", "found", "", "fix")
    emit([item.to_json() for item in findings], as_json, lambda: table("doctor", columns, lines))
    missing = [item.what for item in findings if item.needed and not item.ok]
    if missing:
        raise ComponentError(f"missing for 'tickserve demo': {', '.join(missing)}")

"""`tickserve data`: what is in a market data file, and the same in the canonical form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import pipeline, stages
from tickserve.cli import options
from tickserve.cli.output import counting, emit, out, table
from tickserve.errors import UsageError

app = typer.Typer(help="Look at market data, convert it, or simulate some.", no_args_is_help=True)
Out = Annotated[Path, typer.Option("--out", help="The Parquet file to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that exists.")]


@app.command("inspect")
def inspect(
    data: Annotated[list[Path], typer.Argument(help="Files or folders.")],
    symbol: options.Symbol = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Read market data to its end and say what is in it, quirks counted."""
    settings = options.settings_of(config, profile).config
    source = pipeline.open_source(data, settings, symbol=symbol)
    with counting(f"reading {source.symbol}", "events") as advance:
        report = pipeline.inspect(source, settings, advance)
    emit(report, as_json, lambda: _show(report))


@app.command("convert")
def convert(
    data: Annotated[list[Path], typer.Argument(help="Files or folders.")],
    out_file: Out,
    force: Force = False,
    symbol: options.Symbol = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Write market data as one canonical Parquet file (zstd), readable by every other command."""
    settings = options.settings_of(config, profile).config
    _check_target(out_file, force)
    source = pipeline.open_source(data, settings, symbol=symbol)
    if any(path.resolve() == out_file.resolve() for path in source.files):
        raise UsageError("the output is one of the inputs", field="--out")
    _write(source, out_file, as_json)


@app.command("simulate")
def simulate(
    out_file: Out,
    events: Annotated[int, typer.Option("--events", min=1_000, help="How many events.")] = 60_000,
    force: Force = False,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="The seed; the configuration's by default.")] = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a simulated order book (labelled as simulated) in the canonical form."""
    settings = options.settings_of(config, profile, {"seed": seed}).config
    _check_target(out_file, force)
    simulator = stages.load("market.simulator")
    source = simulator.SimulatedSource(seed=settings.seed, events=events, levels=settings.features.levels)
    _write(source, out_file, as_json)


def _check_target(path: Path, force: bool) -> None:
    if path.is_dir() or (path.exists() and not force):
        kind = "folder" if path.is_dir() else "file"
        raise UsageError(
            f"the {kind} {path.name!r} exists", field="--out", hint="name another, or say --force for a file"
        )


def _write(source: Any, path: Path, as_json: bool) -> None:
    stages.load("market.readers.canonical").write_events(path, source)
    report = pipeline.describe(source) | {"written": str(path), "quality": source.quality.to_json()}
    emit(report, as_json, lambda: out.print(f"wrote {path}; next: tickserve features build --data {path}"))


def _show(report: dict[str, Any]) -> None:
    head = "SIMULATED " if report["simulated"] else ""
    shape = f"order book, {report['levels']} levels" if report["kind"] == "book" else "bars"
    out.print(f"{head}{report['symbol']} from {report['venue']}: {shape}")
    quality = {key: value for key, value in report["quality"].items() if not isinstance(value, dict | list)}
    table("summary", ("what", "value"), [(key, _shown(value)) for key, value in quality.items()])
    quirks = report["quality"]["quirks"]
    rows = [(name, _shown(quirk["count"]), quirk["meaning"]) for name, quirk in quirks.items()]
    table("quirks", ("what", "count", "meaning"), rows)
    for note in report["quality"]["notes"]:
        out.print(f"note: {note}", markup=False)


def _shown(value: Any) -> str:
    return f"{value:,}" if type(value) is int else str(value)

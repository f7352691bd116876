"""`tickserve universe`: the models of many symbols in one run, and the features of many symbols."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import stages
from tickserve.cli import options
from tickserve.cli.output import emit, out, says, table
from tickserve.config import Config
from tickserve.errors import UsageError

app = typer.Typer(help="Many symbols in one run.", no_args_is_help=True)
Engine = Annotated[str | None, typer.Option("--engine", help="local or ray.", show_default=False)]
Workers = Annotated[int | None, typer.Option("--workers", help="Symbols at the same time.", show_default=False)]


@app.command("train")
def train(
    data: options.Data = None,
    run: Annotated[str | None, typer.Option("--run", help="The run's name; by default its time.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with --run, or with the newest run.")] = False,
    engine: Engine = None,
    workers: Workers = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Train the enabled families for every symbol in --data, and one model of each for all symbols together.

    A symbol that fails does not end the run. Exits 0 when all is done, 1 when something failed; when every symbol
    failed in the same way, with the code of that (3: bad data).
    """
    settings = _settings(config, profile, engine, workers)
    job = stages.load("training.universe")
    result = job.train_universe(_paths(data), settings, says, run=run, resume=resume)
    emit(result, as_json, lambda: _show(result))
    _leave(result)


def build(data: list[Path] | None, symbol: str | None, settings: Config, as_json: bool) -> None:
    """`tickserve features build --all-symbols`."""
    if symbol:
        raise UsageError("give one of them", field="--symbol, --all-symbols")
    result = stages.load("training.universe").build_universe(_paths(data), settings, says)
    emit(result, as_json, lambda: _show_features(result))
    _leave(result)


def _settings(config: Path | None, profile: str | None, engine: str | None, workers: int | None) -> Config:
    return options.settings_of(config, profile, {"universe.engine": engine, "universe.workers": workers}).config


def _paths(data: list[Path] | None) -> list[Path]:
    if not data:
        raise UsageError("no data", field="--data", expected="files or folders of many symbols", was="none")
    return data


def _leave(result: dict[str, Any]) -> None:
    if result["exit_code"]:
        raise typer.Exit(result["exit_code"])


def _show(result: dict[str, Any]) -> None:
    table("symbols", ("symbol", "status", "rows", "seconds", "model", "IC", "IC pooled"), _symbol_rows(result))
    rows = [row for record in result["pooled"] for row in _bundle_rows(record)]
    if rows:
        table("all symbols together", ("model", "status", "rows", "IC", "verdict"), rows)
    _show_failures([*result["symbols"], *result["pooled"]])
    peak = "" if result["peak_memory_mb"] is None else f", {result['peak_memory_mb']:,.0f} MB at most"
    out.print(f"{result['seconds']:,.1f} s{peak}; {result['folder']}.json")
    out.print(f"next: tickserve export {result['folder']}/bundles")


def _symbol_rows(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for record in result["symbols"]:
        known = record.get("features", {})
        start = (record["name"], record["status"], known.get("rows", ""), record.get("seconds", ""))
        mains = [bundle for bundle in record.get("bundles", ()) if "pooled" in bundle]
        rows += [(*start, each["name"], _ic(each), _ic_pooled(result, record["name"], each)) for each in mains]
        rows += [] if mains else [(*start, "", "", "")]
    return rows


def _ic(bundle: dict[str, Any]) -> str:
    return _signed(bundle["pooled"]["model"])


def _signed(metrics: dict[str, Any] | None) -> str:
    return "-" if metrics is None or metrics["ic"] is None else f"{metrics['ic']:+.4f}"


def _ic_pooled(result: dict[str, Any], symbol: str, own: dict[str, Any]) -> str:
    """What the pooled model of the same family reaches on this symbol's rows."""
    for record in result["pooled"]:
        for bundle in record.get("bundles", ()):
            if symbol in bundle.get("symbols", {}) and bundle["family"] == own["family"]:
                return _signed(bundle["symbols"][symbol])
    return "-"


def _bundle_rows(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    mains = [bundle for bundle in record.get("bundles", ()) if "pooled" in bundle]
    return [(each["name"], record["status"], record["rows"], _ic(each), each["verdict"]) for each in mains]


def _show_failures(records: list[dict[str, Any]]) -> None:
    for record in records:
        if "error" in record:
            error = record["error"]
            out.print(
                f"failed: {record['name']} ({record['stage']}): {error['type']}: {error['message']}", markup=False
            )


def _show_features(result: dict[str, Any]) -> None:
    rows = [
        (each["name"], each["status"], each.get("reused", ""), each.get("rows", ""), each.get("folder", ""))
        for each in result["symbols"]
    ]
    table("features", ("symbol", "status", "reused", "rows", "folder"), rows)
    _show_failures(result["symbols"])
    out.print(f"{result['seconds']:,.1f} s\nnext: tickserve universe train with the same --data")

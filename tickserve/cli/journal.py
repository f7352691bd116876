"""`tickserve journal`: what a journal of decisions holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve.cli import options
from tickserve.cli.output import emit, out, table
from tickserve.journal import read_journal, summarize

app = typer.Typer(help="Look into a journal of decisions.", no_args_is_help=True)

JournalPath = Annotated[Path, typer.Argument(help="The journal's folder, or one of its files.")]
Tolerant = Annotated[
    bool, typer.Option("--tolerant", help="Let a file end where a crash cut it, or while it is written.")
]


@app.command("inspect")
def inspect(journal: JournalPath, tolerant: Tolerant = False, as_json: options.AsJson = False) -> None:
    """Count decisions by model and status, with the range of time, latency, gaps and actions; every crc is checked."""
    result = summarize(read_journal(journal, tolerant=tolerant))
    emit(result, as_json, lambda: _show(result))


def _show(result: dict[str, Any]) -> None:
    out.print(f"{result['decisions']:,} decisions, {result['actions']:,} actions, {result['lost']:,} records lost")
    if result["first"]:
        out.print(f"from {result['first']} to {result['last']}")
    if result["models"]:
        columns = ("model", "version", "bundle", "status", "count")
        rows = [(m["model"], m["version"], m["bundle_digest"][:19], m["status"], m["count"]) for m in result["models"]]
        table("decisions", columns, rows)
    spent = dict(result["stage_us"])
    if result["not_sent"]:
        spent[f"total of {result['not_sent']:,} never sent"] = result["not_sent_us"]
    if spent:
        quantiles = list(next(iter(spent.values())))
        stages = [(name, *(values[quantile] for quantile in quantiles)) for name, values in spent.items()]
        table("microseconds", ("stage", *quantiles), stages)
    if result["actions_without_decision"]:
        out.print(f"{result['actions_without_decision']:,} actions name no decision before them")
    for gap in result["gaps"]:
        out.print(f"gap: {gap['count']:,} records between {gap['from']} and {gap['to']}: {gap['reason']}", markup=False)

"""`tickserve journal`: what a journal of decisions holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve.cli import options
from tickserve.cli.output import emit, out, table
from tickserve.errors import CorruptFileError
from tickserve.journal import Record, read_journal, summarize

app = typer.Typer(help="Look into a journal of decisions.", no_args_is_help=True)

JournalPath = Annotated[Path, typer.Argument(help="The journal's folder, or one of its files.")]
Tolerant = Annotated[
    bool,
    typer.Option(
        "--tolerant",
        help="Let a file end where a crash cut it, or while it is written; after damage go on with the next.",
    ),
]


class Readable:
    """The records of `journal` that can be read; `damage` is the error that ended them, once they were taken."""

    def __init__(self, journal: Path, *, tolerant: bool) -> None:
        self._journal, self._tolerant = journal, tolerant
        self._count = 0
        self.damage: CorruptFileError | None = None

    def __iter__(self) -> Iterator[Record]:
        try:
            for record in read_journal(self._journal, tolerant=self._tolerant):
                self._count += 1
                yield record
        except CorruptFileError as error:
            self.damage = error

    @property
    def told(self) -> str | None:
        """The damage in words."""
        return None if self.damage is None else str(self.damage)

    def check_any(self) -> None:
        """Raises CorruptFileError where damage left nothing to tell of."""
        if not self._count:
            self.check()

    def check(self) -> None:
        """Raises CorruptFileError where something is damaged: file and offset."""
        if self.damage is not None:
            raise self.damage


@app.command("inspect")
def inspect(journal: JournalPath, tolerant: Tolerant = False, as_json: options.AsJson = False) -> None:
    """Count decisions by model and status, with the range of time, latency, gaps and actions; every crc is checked.

    What lies before damage is counted, then the damage is told of, with exit code 3.
    """
    records = Readable(journal, tolerant=tolerant)
    result = summarize(records)
    records.check_any()
    emit(result | {"damage": records.told}, as_json, lambda: _show(result))
    records.check()


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

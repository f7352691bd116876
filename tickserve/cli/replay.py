"""`tickserve replay`: ask a server, or the models in this process, again what a journal recorded."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve.cli import options
from tickserve.cli.journal import JournalPath, Readable, Tolerant
from tickserve.cli.output import emit, out, table
from tickserve.client._open import open_transport
from tickserve.errors import ComponentError, EmptyDataError, GateRefusedError, UsageError
from tickserve.journal import Replay
from tickserve.journal import replay as ask_again


def replay(
    journal: JournalPath,
    url: Annotated[
        str | None, typer.Option("--url", help="host:port, grpc://host:port or local://folder. [127.0.0.1:8000]")
    ] = None,
    repository: Annotated[
        Path | None, typer.Option("--repository", help="Score in this process, from this model repository.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="Largest difference of a number that passes; 0: bit for bit.")
    ] = 0.0,
    deadline_ms: Annotated[float, typer.Option("--deadline-ms", min=1, max=600_000, help="For each request.")] = 5_000,
    shown: Annotated[int, typer.Option("--show", min=0, max=10_000, help="Differences that are printed.")] = 10,
    tolerant: Tolerant = False,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Send every recorded request again, as it was, and compare the answers bit for bit.

    Any difference exits 1. Without one, what could not be replayed (server or version missing) exits 4. A damaged
    journal exits 3, whatever came of the records before the damage.
    """
    if url is not None and repository is not None:
        raise UsageError("give one of them", field="--url, --repository")
    settings = options.settings_of(config, profile).config
    where = f"local://{repository}" if repository is not None else url or "127.0.0.1:8000"
    records = Readable(journal, tolerant=tolerant)
    with closing(open_transport(where, options.transport_to(where, settings))) as transport:
        result = ask_again(records, transport, deadline_ms=deadline_ms, tolerance=tolerance, shown=shown)
    records.check_any()
    told = result.to_json() | {"tolerance": tolerance, "damage": records.told}
    emit(told, as_json, lambda: _show(told))
    records.check()
    _judge(result, journal.name)


def _judge(result: Replay, name: str) -> None:
    """Raises GateRefusedError for a difference; else ComponentError for what got no answer, EmptyDataError for none."""
    if result.different:
        raise GateRefusedError(
            f"{result.different:,} of {result.replayed:,} answers differ from the recorded ones", field=name
        )
    if result.not_replayed:
        first = next(iter(result.unanswered.values()))
        raise ComponentError(
            f"{result.not_replayed:,} of {result.not_replayed + result.replayed:,} requests could not be replayed, "
            f"the first: {first.model} {first.version}: {first.message}",
            field=name,
        )
    if not result.replayed:
        raise EmptyDataError("no recorded answer to ask for again", field=name)


def _show(told: dict[str, Any]) -> None:
    out.print(f"{told['replayed']:,} requests sent again, {told['identical']:,} answers identical")
    for model, count in told["models"].items():
        out.print(f"  {model}: {count:,}", markup=False)
    for reason, count in told["skipped"].items():
        out.print(f"  not asked: {reason}: {count:,}", markup=False)
    for one in told["unanswered"]:
        what = "{model} {version}: {error}: {message}".format(**one)
        out.print(f"  could not be replayed: {what}: {one['count']:,}", markup=False)
    if told["differences"]:
        out.print(f"  largest difference of a number: {told['max_abs_difference']:.3e}")
        rows = [list(one.values()) for one in told["differences"]]
        table(f"differences, {len(rows):,} of {told['different']:,} requests", list(told["differences"][0]), rows)

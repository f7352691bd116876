"""`tickserve features`: market data to a feature matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from tickserve import pipeline, stages
from tickserve.cli import options, universe
from tickserve.cli.output import counting, emit, out, says, table
from tickserve.errors import UsageError
from tickserve.limits import of_features

app = typer.Typer(help="Compute features.", no_args_is_help=True)
DEFAULT_LEVELS = 5


@app.command("build")
def build(
    data: options.Data = None,
    symbol: options.Symbol = None,
    all_symbols: Annotated[
        bool, typer.Option("--all-symbols", help="Of every symbol in --data, universe.workers at a time, or on Ray.")
    ] = False,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Compute the default features of market data (the simulator without --data), or find them in the cache."""
    settings = options.settings_of(config, profile).config
    if all_symbols:
        universe.build(data, symbol, settings, as_json)
        return
    source = pipeline.open_source(data, settings, symbol=symbol)
    with counting(f"features of {source.symbol}", "events") as advance:
        built = pipeline.build_features(source, settings, advance, says)
    held = [gate.model_dump(mode="json") for gate in of_features(settings.limits, built.took["seconds"])]
    result = {"folder": str(built.folder), "reused": built.reused, "took": built.took, "limits": held, **built.meta}
    emit(result, as_json, lambda: _show(str(built.folder), built.reused, built.meta))


def _show(folder: str, reused: bool, meta: dict[str, object]) -> None:
    out.print("reused the feature cache: nothing changed" if reused else "built")
    for key in ("symbol", "events_read", "stride", "rows"):
        if key in meta:
            out.print(f"  {key}: {meta[key]}")
    out.print(f"{folder}\nnext: tickserve train with the same --data")


@app.command("list")
def list_features(
    kind: Annotated[str | None, typer.Option("--kind", help="The columns of one spec: book or bars.")] = None,
    levels: Annotated[
        int | None, typer.Option("--levels", min=1, max=20, help="Order-book levels of that one.", show_default="5")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """List the default feature specs, each with its digest; with --kind or --levels the columns of one, in order."""
    if kind not in (None, "book", "bars"):
        raise UsageError("unknown kind", field="--kind", expected="book or bars", was=repr(kind))
    if kind == "bars" and levels is not None:
        raise UsageError("bars have no levels", field="--levels", hint="leave it out")
    specs = stages.load_core("tickserve.features.spec")
    if kind is None and levels is None:
        _list_specs(specs.default_specs(), as_json)
    else:
        _list_columns(specs.default_spec(kind or "book", DEFAULT_LEVELS if levels is None else levels), as_json)


def _list_specs(specs: Sequence[Any], as_json: bool) -> None:
    told = [
        {
            "spec": spec.name,
            "kind": spec.kind,
            "levels": spec.levels or None,
            "column_count": len(spec.columns),
            "digest": spec.digest,
        }
        for spec in specs
    ]

    def show() -> None:
        rows = [(one["spec"], one["column_count"], one["digest"]) for one in told]
        table("default feature specs", ("spec", "columns", "digest"), rows)
        out.print("next: tickserve features list --kind book --levels 5")

    emit(told, as_json, show)


def _list_columns(spec: Any, as_json: bool) -> None:
    result = {"spec": spec.name, "digest": spec.digest, "columns": list(spec.columns)}
    rows = [(index, name) for index, name in enumerate(spec.columns)]
    emit(result, as_json, lambda: table(f"{spec.name} {spec.digest}", ("column", "name"), rows))

"""`tickserve features`: market data to a feature matrix."""

from __future__ import annotations

from typing import Annotated

import typer

from tickserve import pipeline, stages
from tickserve.cli import options
from tickserve.cli.output import counting, emit, out, table
from tickserve.errors import UsageError

app = typer.Typer(help="Compute features.", no_args_is_help=True)


@app.command("build")
def build(
    data: options.Data = None,
    symbol: options.Symbol = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Compute the default features of market data (the simulator without --data), or find them in the cache."""
    settings = options.settings_of(config, profile).config
    source = pipeline.open_source(data, settings, symbol=symbol)
    with counting(f"features of {source.symbol}", "events") as advance:
        built = pipeline.build_features(source, settings, advance)
    result = {"folder": str(built.folder), "reused": built.reused, **built.meta}
    emit(result, as_json, lambda: _show(str(built.folder), built.reused, built.meta))


def _show(folder: str, reused: bool, meta: dict[str, object]) -> None:
    out.print("reused the feature cache: nothing changed" if reused else "built")
    for key in ("symbol", "events_read", "stride", "rows"):
        if key in meta:
            out.print(f"  {key}: {meta[key]}")
    out.print(f"{folder}\nnext: tickserve train with the same --data")


@app.command("list")
def list_features(
    kind: Annotated[str, typer.Option("--kind", help="book or bars.")] = "book",
    levels: Annotated[int, typer.Option("--levels", min=1, max=20, help="Order-book levels.")] = 5,
    as_json: options.AsJson = False,
) -> None:
    """List the columns of the default feature spec, in order, with its digest."""
    if kind not in ("book", "bars"):
        raise UsageError("unknown kind", field="--kind", expected="book or bars", was=repr(kind))
    spec = stages.load_core("tickserve.features.spec").default_spec(kind, levels)
    result = {"spec": spec.name, "digest": spec.digest, "columns": list(spec.columns)}
    rows = [(index, name) for index, name in enumerate(spec.columns)]
    emit(result, as_json, lambda: table(f"{spec.name} {spec.digest}", ("column", "name"), rows))

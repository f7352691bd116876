"""`tickserve train`: a feature matrix to validated bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import pipeline
from tickserve.cli import options
from tickserve.cli.output import counting, emit, out, says, table
from tickserve.store import check_writable


def train(
    data: options.Data = None,
    symbol: options.Symbol = None,
    out_folder: Annotated[Path, typer.Option("--out", help="Where the bundles go.")] = Path("runs/bundles"),
    name: Annotated[str | None, typer.Option("--name", help="Model name prefix; from the data by default.")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest checkpoints of this job (docs/trainer.md)."),
    ] = False,
    checkpoints: Annotated[
        Path | None, typer.Option("--checkpoints", help="Their folder; [trainer] checkpoint_folder by default.")
    ] = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Train the enabled families on market data (the simulator without --data), walk-forward, beside baselines."""
    chosen = {"trainer.resume": resume or None, "trainer.checkpoint_folder": checkpoints and str(checkpoints)}
    settings = options.settings_of(config, profile, chosen).config
    source = pipeline.open_source(data, settings, symbol=symbol)
    check_writable(out_folder)
    with counting(f"features of {source.symbol}", "events") as advance:
        built = pipeline.build_features(source, settings, advance, says)
    says("features: reused from the cache" if built.reused else "features: built")
    bundles = pipeline.train(built, settings, out_folder, name=name, progress=says)
    result = [{"bundle": str(item.path), "digest": item.manifest.digest(), **item.report} for item in bundles]
    emit(result, as_json, lambda: _show(bundles, out_folder))


def _show(bundles: list[Any], folder: Path) -> None:
    rows = [(item.manifest.name, item.manifest.digest()[:19], item.path) for item in bundles]
    table("bundles", ("model", "digest", "folder"), rows)
    out.print(f"next: tickserve export {folder}")

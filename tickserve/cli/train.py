"""`tickserve train`: a feature matrix to validated bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import pipeline
from tickserve.cli import options
from tickserve.cli.export import refused_json
from tickserve.cli.output import counting, emit, out, says, table
from tickserve.errors import GateRefusedError
from tickserve.manifest import Manifest
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
    require_gate: Annotated[
        bool,
        typer.Option("--require-gate", help="Refuse models that the validation gate refuses (docs/validation.md)."),
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="First show that no fit changes when the future is another one.")
    ] = False,
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
    try:
        bundles = pipeline.train(
            built, settings, out_folder, name=name, progress=says, require_gate=require_gate, probe=probe
        )
    except GateRefusedError as error:
        if as_json:
            emit(refused_json(error), as_json, lambda: None)
        raise
    result = [{"bundle": str(item.path), "digest": item.manifest.digest(), **item.report} for item in bundles]
    emit(result, as_json, lambda: _show(bundles, out_folder))


def _show(bundles: list[Any], folder: Path) -> None:
    rows = [(item.manifest.name, _gate(item.manifest), item.manifest.digest()[:19], item.path) for item in bundles]
    table("bundles", ("model", "validation gate", "digest", "folder"), rows)
    out.print(f"next: tickserve export {folder}")


def _gate(manifest: Manifest) -> str:
    """What the gate said of a model, in words; a child's is its teacher's."""
    gate = manifest.metrics.get("gate")
    if gate is None:
        return "not judged"
    of = f" (of {gate['of']})" if "of" in gate else ""
    return ("passed" if gate["passed"] else "NOT PASSED") + of

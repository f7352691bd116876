"""`tickserve export`: bundles to versions in the Triton model repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import pipeline
from tickserve.cli import options
from tickserve.cli.output import emit, out, table
from tickserve.errors import GateRefusedError


def export(
    bundles: Annotated[Path, typer.Argument(help="A bundle, or a folder of bundles.")],
    repository: options.Repository = options.DEFAULT_REPOSITORY,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Convert bundles to ONNX, hold them to parity with the research model, and publish them."""
    settings = options.settings_of(config, profile).config
    try:
        published = [pipeline.export(bundle, repository, settings) for bundle in pipeline.bundles_in(bundles)]
    except GateRefusedError as error:
        if as_json:
            emit(refused_json(error), as_json, lambda: None)
        raise
    emit([published_json(item) for item in published], as_json, lambda: _show(published, repository))


def refused_json(error: GateRefusedError) -> dict[str, Any]:
    """A refusal as JSON, with the smallest case that shows it where the gate made one."""
    return {"refused": str(error), "counterexample": error.counterexample}


def published_json(item: Any) -> dict[str, Any]:
    """A published version as JSON, for `--json` and for the run report."""
    return {
        "model": item.model,
        "version": item.version,
        "path": str(item.path),
        "bundle_digest": item.manifest.export.bundle_digest,
        "bundle_id": item.manifest.export.bundle_id,
        "gates": [gate.model_dump(mode="json") for gate in item.gates],
        "parity": item.parity,
        "runtime": _runtime(item.manifest.export),
    }


def _show(published: list[Any], repository: Path) -> None:
    rows = [(item.model, item.version, item.manifest.export.bundle_id, _gates(item)) for item in published]
    table("published", ("model", "version", "bundle_id", "gates"), rows)
    out.print(f"next: tickserve serve --repository {repository}")


def _runtime(record: Any) -> Any:
    return None if record is None or record.runtime is None else record.runtime.model_dump(mode="json")


def _gates(item: Any) -> str:
    return ", ".join(f"{gate.name} {'ok' if gate.passed else 'refused'}" for gate in item.gates)

"""`tickserve export`: bundles to versions in the Triton model repository."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import pipeline, stages
from tickserve.cli import options
from tickserve.cli.output import emit, out, table
from tickserve.errors import ComponentError, GateRefusedError


def export(
    bundles: Annotated[Path, typer.Argument(help="A bundle, or a folder of bundles.")],
    repository: options.Repository = options.DEFAULT_REPOSITORY,
    no_activate: options.NoActivate = False,
    require_gate: options.RequireGate = False,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Convert bundles to ONNX, hold them to parity with the research model, publish them and put them in force."""
    settings = options.settings_of(config, profile).config
    with refusal_told(as_json):
        found = pipeline.bundles_to_publish(bundles, settings, require_gate=require_gate)
        published = [pipeline.export(bundle, repository, settings, activate=not no_activate) for bundle in found]
    told = [published_json(item) | {"in_force": _in_force(item, repository)} for item in published]
    emit(told, as_json, lambda: _show(published, repository))


@contextmanager
def refusal_told(as_json: bool) -> Iterator[None]:
    """With `--json`, a gate's refusal is on standard output too, before it ends the command."""
    try:
        yield
    except GateRefusedError as error:
        if as_json:
            emit(refused_json(error), as_json, lambda: None)
        raise


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
        "stages": item.manifest.export.stages,
    }


def _in_force(item: Any, repository: Path) -> int | None:
    """The version of a published one's model that is in force."""
    place = stages.load("export.repository.places").Local(repository)
    found: int | None = stages.load("export.repository.force").in_force(place, item.model)
    return found


def _show(published: list[Any], repository: Path) -> None:
    columns = ("model", "version", "in force", "bundle_id", "gates")
    forced = {item.model: _in_force(item, repository) for item in published}
    rows = [
        (item.model, item.version, forced[item.model] or "", item.manifest.export.bundle_id, _gates(item))
        for item in published
    ]
    table("published", columns, rows)
    waiting = [item for item in published if forced[item.model] != item.version]
    for command in _next(published, waiting, repository):
        out.print(f"next: {command}", markup=False)


def _next(published: list[Any], waiting: list[Any], repository: Path) -> list[str]:
    """What brings them to engines: swaps where a server serves this repository; else a server, with all in force."""
    try:
        runfile = stages.load("serving.runfile")
        here, several = runfile.serving(repository), len(runfile.running()) > 1
    except ComponentError:  # no such stage, or no folder for such files: then nothing is known to run
        here, several = [], False
    if here:
        which = f" --pid {here[0].pid}" if several else ""
        return [f"tickserve models swap {item.model}{_older(item)}{which}" for item in published]
    where = "" if repository == options.DEFAULT_REPOSITORY else f" --repository {repository}"
    force = [f"tickserve repo rollback {item.model} --to {item.version}{where}" for item in waiting]
    return [*force, f"tickserve serve --repository {repository}"]


def _older(item: Any) -> str:
    """How to name a version that was published before: a newer one may be there by now, which a swap would take."""
    return f" --version {item.version}" if item.reused else ""


def _runtime(record: Any) -> Any:
    return None if record is None or record.runtime is None else record.runtime.model_dump(mode="json")


def _gates(item: Any) -> str:
    return ", ".join(f"{gate.name} {'ok' if gate.passed else 'refused'}" for gate in item.gates)

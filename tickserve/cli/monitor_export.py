"""`tickserve monitor export`: drift, calibration and age from a journal, as metrics and as an action for clients."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import stages
from tickserve.cli import options
from tickserve.cli.output import emit, out, says, table
from tickserve.errors import UsageError

Journal = Annotated[Path, typer.Option("--journal", help="The journal's folder; it may be written to meanwhile.")]
Repository = Annotated[
    list[Path] | None, typer.Option("--repository", help="Whose manifests hold the references; may be repeated.")
]
ManifestPath = Annotated[
    list[Path] | None, typer.Option("--manifest", help="A manifest, or the folder of one; may be repeated.")
]
Port = Annotated[int | None, typer.Option("--port", min=0, max=65_535, help="Of /metrics, in place of drift.port.")]
Address = Annotated[str | None, typer.Option("--address", help="Bound to, in place of drift.address.")]
ActionFile = Annotated[Path | None, typer.Option("--action-file", help="Written for clients that obey it.")]
Once = Annotated[bool, typer.Option("--once", help="Measure what is there, print it, and end.")]


def export(
    journal: Journal,
    repository: Repository = None,
    manifest: ManifestPath = None,
    port: Port = None,
    address: Address = None,
    action_file: ActionFile = None,
    once: Once = False,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Follow a journal and export PSI, feature age, calibration and outcomes; `[drift]` maps them to an action."""
    if as_json and not once:
        raise UsageError("goes with --once", field="--json")
    settings = options.settings_of(config, profile, {"drift.port": port, "drift.address": address}).config.drift
    follow = stages.load("monitoring.drift.follow")
    places = [*(repository or []), *(manifest or [])] or [options.DEFAULT_REPOSITORY]
    known_manifests = stages.load("monitoring.drift.monitor").known_manifests
    exporter = follow.DriftExporter(
        journal, known_manifests(places), settings, action_file, once=once, look=lambda: known_manifests(places)
    )
    if not once:
        follow.run(exporter, settings, says, option="--port" if port is not None else "drift.port")
    told = exporter.look()
    result = {
        "models": [asdict(each) for each in told.measured],
        "actions": {model: asked.model_dump() for model, asked in told.asked.items()},
        "records": sum(told.counted.statuses.values()),
        "outcomes_unmatched": told.counted.outcomes_unmatched,
        "outcomes_unread": told.counted.outcomes_unread,
        "lost": told.counted.lost,
        "damaged_frames": exporter.damaged,
    }
    emit(result, as_json, lambda: _show(result))


def _show(result: dict[str, Any]) -> None:
    rows = [
        (
            each["model"],
            each["version"],
            each["rows"],
            _number(each["psi_max"]),
            _number(each["psi_score"]),
            _number((each["calibration"] or {}).get("error")),
            result["actions"].get(each["model"], {}).get("action", "none"),
            "; ".join(each["notes"]),
        )
        for each in result["models"]
    ]
    columns = ("model", "version", "rows", "PSI max", "PSI score", "calibration error", "action", "")
    table(f"{result['records']:,} decisions, {result['lost']:,} lost", columns, rows)
    for each in result["models"]:
        worst = sorted(each["psi"].items(), key=lambda pair: -pair[1])[:5]
        if worst:
            told = ", ".join(f"{name} {value:.3f}" for name, value in worst)
            out.print(f"{each['model']} {each['version']}: largest PSI: {told}", markup=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

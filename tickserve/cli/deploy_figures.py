"""What `deploy render` is computed from, gathered: rates, memory and service times of the models to be served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from tickserve import pipeline, stages
from tickserve.cli.batching import measured_service, recorded_peak, served
from tickserve.cli.output import says
from tickserve.config import Config
from tickserve.errors import ArtifactError, UsageError
from tickserve.manifest import load_manifest


class MemoryFrom(StrEnum):
    """Where the memory of a pod is from."""

    MEASURE = "measure"
    MANIFEST = "manifest"
    CHART = "chart"


@dataclass(frozen=True)
class Asked:
    """The options of `deploy render` that say where figures are from."""

    models: Sequence[str]
    repository: Path
    tables: Path
    memory: MemoryFrom
    rates: Sequence[str]
    rows_per_request: float
    arrivals: Path | None
    deadline_ms: float | None


def gather(asked: Asked, config: Config) -> tuple[list[Any], Any]:
    """The figures of each model, and the memory of a pod that serves them all (None where it is not known)."""
    figures = stages.load("export.deployment.figures")
    tables = {name: figures.read_derived(asked.tables, name) for name in asked.models}
    rates = _rates(asked, config, figures)
    known = {name: rates.get(name) or (table.rate if table else None) for name, table in tables.items()}
    times, cpu, memory = _measured(asked, config, [name for name, table in tables.items() if table is None], known)
    models = []
    for name in asked.models:
        model = figures.read_model(
            asked.repository,
            name,
            derived=tables[name],
            deadline_us=None if asked.deadline_ms is None else asked.deadline_ms * 1_000,
            default_deadline_us=float(config.export.deadline_us),
            measured=times.get(name),
        )
        models.append(replace(model, rate=known[name], cpu=cpu.get(name)))
    if asked.memory is MemoryFrom.MANIFEST:
        memory = _of_manifests(models)
    return models, memory


def _rates(asked: Asked, config: Config, figures: Any) -> dict[str, Any]:
    if asked.rates and asked.arrivals is not None:
        raise UsageError("contradict each other", field="--rate, --arrivals")
    if asked.arrivals is None:
        return {
            name: figures.Rate(per_second, asked.rows_per_request, "--rate")
            for name, per_second in parse_rates(asked.rates, asked.models).items()
        }
    if len(asked.models) > 1 and not asked.arrivals.is_dir():
        hint = "a journal knows the model of each request; or name rates with --rate MODEL=RATE"
        raise UsageError("a file of times is of one model", field="--arrivals", hint=hint)
    found = {}
    for name in asked.models:
        peak = recorded_peak(config, name, None, None, asked.arrivals, 0, 1.0)
        span = max(peak.seconds, 1e-9)
        source = f"busiest {min(span, config.batching.peak_s):.3g} s of {asked.arrivals.name}"
        found[name] = figures.Rate(len(peak) / span, float(peak.rows.mean()), source)
    return found


def parse_rates(texts: Sequence[str], models: Sequence[str]) -> dict[str, float]:
    """`--rate 120` of one model, `--rate MODEL=120` of several. Raises UsageError."""
    found: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        if not equals and len(models) > 1:
            raise UsageError(
                "of which model?", field="--rate", expected="MODEL=RATE with several models", was=text[:40]
            )
        name = name if equals else models[0]
        if name not in models:
            raise UsageError(
                "of a model that is not deployed", field="--rate", expected=", ".join(models), was=name[:60]
            )
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if not 0 < rate < float("inf"):
            raise UsageError("not a rate", field="--rate", expected="requests a second above 0", was=number[:40])
        found[name] = rate
    return found


def _measured(
    asked: Asked, config: Config, untimed: Sequence[str], rates: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Service times of the models without a table, processor times, and the memory, on one server with all of them."""
    if asked.memory is not MemoryFrom.MEASURE:
        return {}, {}, None
    figures, sizing = stages.load("export.deployment.figures"), stages.load("export.deployment.sizing")
    says(f"measuring {', '.join(asked.models)} on the embedded server")
    times = {}
    rows = {name: 1 if rates[name] is None else max(1, round(rates[name].rows)) for name in asked.models}
    with served(asked.repository, list(asked.models), config) as server:
        for name in untimed:
            folder = pipeline.newest_version(asked.repository, name)
            times[name] = measured_service(server, name, folder, load_manifest(folder), config)
        found = stages.load("serving.footprint").measure(server, asked.repository, rows)
    cpu = {
        name: figures.Cpu(us, f"processor time of the embedded server for requests of {rows[name]} rows")
        for name, us in found.cpu_us.items()
    }
    source = (
        f"the embedded server of this machine, {found.versions} loaded versions, every instance scoring full batches: "
        "highest resident size"
    )
    return times, cpu, sizing.Memory(found.peak_bytes, source)


def _of_manifests(models: Sequence[Any]) -> Any:
    """The peak of the exporting process while the runtimes were timed: an upper bound for each model, added up."""
    sizing = stages.load("export.deployment.sizing")
    total = 0.0
    for model in models:
        recorded = (model.manifest.export.stages or {}).get("measure", {}).get("peak_memory_mb")
        if recorded is None:
            raise ArtifactError(
                f"the manifest of {model.name} has no memory of the stage 'measure'",
                field="export.stages",
                hint="let --memory measure load the models instead",
            )
        total += recorded
    source = "export.stages.measure of the manifests: the exporting processes, added up, not a server"
    return sizing.Memory(int(total * 2**20), source)

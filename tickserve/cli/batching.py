"""`tickserve batching`: the dynamic batcher's settings from the engine's deadline and recorded arrivals."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tickserve import pipeline, signing, stages
from tickserve.cli import options
from tickserve.cli.output import emit, out, says, table
from tickserve.config import Config, ExportSettings
from tickserve.errors import ArtifactError, GateRefusedError, UsageError
from tickserve.manifest import Manifest, load_manifest
from tickserve.model_config import CONFIG_NAME, served_rows
from tickserve.store import check_writable, write_json_atomic

app = typer.Typer(
    help="Batching derived from a deadline and recorded arrivals, verified and linted.", no_args_is_help=True
)

Model = Annotated[str, typer.Option("--model", help="A published model.")]
ArrivalsFile = Annotated[
    Path | None, typer.Option("--arrivals", help="A journal folder, or a file of whole nanoseconds, one per line.")
]
Deadline = Annotated[float | None, typer.Option("--deadline-ms", min=0.001, help="The engine's deadline.")]
BulkRows = Annotated[int, typer.Option("--bulk-rows", min=0, help="Rows of a bulk scoring request; 0: no bulk lane.")]
BulkRate = Annotated[float, typer.Option("--bulk-per-s", min=0.001, help="Bulk requests per second.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the derived tables.")]
DEFAULT_OUT = Path("runs/batching")


@app.command("derive")
def derive(
    model: Model,
    data: options.Data = None,
    symbol: options.Symbol = None,
    arrivals: ArrivalsFile = None,
    deadline_ms: Deadline = None,
    bulk_rows: BulkRows = 0,
    bulk_per_s: BulkRate = 10.0,
    bounded: Annotated[bool, typer.Option("--bounded/--unbounded", help="A queue that refuses, or none.")] = True,
    apply: Annotated[bool, typer.Option("--apply", help="Write the choice into the published config.pbtxt.")] = False,
    repository: options.Repository = options.DEFAULT_REPOSITORY,
    out_folder: Out = DEFAULT_OUT,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure the model, simulate every setting over the recorded peak, and choose by p99 inside the deadline."""
    settings = options.settings_of(config, profile).config
    check_writable(out_folder)
    version = pipeline.newest_version(repository, model)
    manifest = load_manifest(version)
    batching = stages.load("export.batching")
    peak = recorded_peak(settings, model, data, symbol, arrivals, bulk_rows, bulk_per_s)
    says(f"peak: {len(peak)} requests in {peak.seconds:.2f} s; measuring the model on the embedded Triton")
    with served(repository, [model], settings) as server:
        service = measured_service(server, model, version, manifest, settings)
    found = batching.derive(
        peak,
        service,
        deadline_us=_deadline_us(deadline_ms, settings.export),
        max_batch=_max_batch(version, manifest),
        max_instances=settings.batching.max_instances,
        allowed=settings.batching.misses,
        bounded=bounded,
    )
    result = {"model": model} | found.to_json()
    write_json_atomic(out_folder / f"{model}.json", result)
    emit(result, as_json, lambda: _show(result, out_folder / f"{model}.json"))
    if not found.satisfied:
        raise GateRefusedError(
            "no setting answers every request of the recorded peak inside the deadline",
            field="--deadline-ms",
            hint="a longer deadline, more cores, or a smaller model",
        )
    if apply:
        batching.apply_to_config(repository / model / CONFIG_NAME, found.chosen.setting)
        says(
            f"applied to {model}/{CONFIG_NAME}; without the [export] keys above in the configuration the next export "
            "undoes it"
        )


@app.command("verify")
def verify(
    model: Model,
    data: options.Data = None,
    symbol: options.Symbol = None,
    arrivals: ArrivalsFile = None,
    bulk_rows: BulkRows = 0,
    bulk_per_s: BulkRate = 10.0,
    repository: options.Repository = options.DEFAULT_REPOSITORY,
    out_folder: Out = DEFAULT_OUT,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Serve the derived setting, send the recorded peak at its own times, and put measured beside predicted."""
    settings = options.settings_of(config, profile).config
    derived = _derived(out_folder / f"{model}.json")
    batching = stages.load("export.batching")
    peak = recorded_peak(settings, model, data, symbol, arrivals, bulk_rows, bulk_per_s)
    version = pipeline.newest_version(repository, model)
    manifest = load_manifest(version)
    setting = batching.Setting(
        **(derived["chosen"]["setting"] | {"preferred": tuple(derived["chosen"]["setting"]["preferred"])})
    )
    inputs, _ = pipeline.golden_inputs(version, manifest)
    driver = stages.load("loadtest.open_loop")
    deadline_us = float(derived["deadline_us"])
    with _applied(repository, model, setting) as copy, served(copy, [model], settings) as server:
        feed = driver.Feed(server.http_url, model, inputs, deadline_us / 1e3, setting.lanes)
        says(f"sending {len(peak)} requests over {peak.seconds:.2f} s, at the recorded times")
        measured = driver.drive(feed, peak).to_json()
    result = {
        "model": model,
        "deadline_us": deadline_us,
        "predicted": derived["chosen"]["predicted"],
        "measured": measured,
    }
    write_json_atomic(out_folder / f"{model}.verify.json", result)
    emit(result, as_json, lambda: _show_verified(result))
    late = measured["requests"] - measured["outcomes"].get("answered", 0)
    if late > settings.batching.misses * measured["requests"]:
        raise GateRefusedError(f"{late} of {measured['requests']} requests were not answered inside the deadline")


@app.command("lint")
def lint(
    model: Annotated[
        str | None, typer.Option("--model", help="A published model; without it, the configuration.")
    ] = None,
    deadline_ms: Deadline = None,
    two_lanes: Annotated[bool, typer.Option("--two-lanes", help="Bulk scoring shares the model.")] = False,
    repository: options.Repository = options.DEFAULT_REPOSITORY,
    out_folder: Out = DEFAULT_OUT,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Hold a published config.pbtxt, or the configuration's [export] values, against the rules of the derivation."""
    settings = options.settings_of(config, profile).config
    rules = stages.load("export.batching.rules")
    service = None
    if model is None:
        setting = rules.setting_of_settings(settings.export)
    else:
        setting = rules.setting_of_config(repository / model / CONFIG_NAME)
        if (out_folder / f"{model}.json").is_file():
            times = stages.load("export.batching").ServiceTimes
            service = times.from_json(_derived(out_folder / f"{model}.json")["service"])
    deadline_us = _deadline_us(deadline_ms, settings.export)
    found = rules.lint(setting, deadline_us=deadline_us, service=service, two_lanes=two_lanes)
    findings, notes = (
        [{"field": item.field, "reason": item.reason} for item in found if item.note is note] for note in (False, True)
    )
    result = {"setting": setting.to_json(), "findings": findings, "notes": notes}
    emit(result, as_json, lambda: _show_findings(findings, notes))
    if findings:
        raise GateRefusedError(
            f"{len(findings)} of the batching rules broken: " + ", ".join(f["field"] for f in findings)
        )


def _deadline_us(deadline_ms: float | None, export: ExportSettings) -> float:
    return float(export.deadline_us) if deadline_ms is None else deadline_ms * 1e3


def _max_batch(version: Path, manifest: Manifest) -> int:
    rows = served_rows(version, manifest)
    if rows is None:
        raise ArtifactError("expected a published version, was a bundle", field="export")
    return rows


def recorded_peak(
    config: Config,
    model: str,
    data: Any,
    symbol: str | None,
    arrivals: Path | None,
    bulk_rows: int,
    bulk_per_s: float,
) -> Any:
    """The busiest recorded stretch, with bulk requests where they are asked for."""
    module = stages.load("export.batching.arrivals")
    if (arrivals is None) == (not data):
        raise UsageError("expected one of --data and --arrivals", field="--data, --arrivals")
    if arrivals is not None and arrivals.is_dir():
        recorded = _journalled(arrivals, model)
    elif arrivals is not None:
        recorded = module.read_arrivals(arrivals)
    else:
        source = pipeline.open_source(data, config, symbol=symbol)
        times = np.concatenate([chunk.ts_ns for chunk in source.chunks()])
        recorded = module.decisions(module.of_times(times), config.batching.decide_us)
    peak = module.busiest(recorded, config.batching.peak_s, config.batching.peak_requests)
    return module.with_bulk(peak, bulk_rows, bulk_per_s) if bulk_rows else peak


def _journalled(folder: Path, model: str) -> Any:
    """The requests for `model` in a journal, with their rows; what was refused before it was sent is none."""
    journal = stages.load_core("tickserve.journal")
    sent = [
        (record.wall_ns, record.tensors[0].shape[0])
        for record in journal.read_journal(folder, tolerant=True)
        if isinstance(record, journal.DecisionRecord) and record.model == model and record.tensors
    ]
    times, rows = np.array(sent, np.int64).reshape(-1, 2).T
    return stages.load("export.batching.arrivals").of_requests(times, rows)


@contextmanager
def served(repository: Path, models: Sequence[str], config: Config) -> Iterator[Any]:
    """The embedded server on free ports."""
    free = config.serve.model_copy(update={"http_port": 0, "grpc_port": 0, "metrics_port": 0})
    embedded, trusted = stages.load("serving.embedded"), signing.trusted_keys(config.repository)
    with embedded.EmbeddedTriton(repository, free, models=models, trusted=trusted) as server:
        yield server


@contextmanager
def _applied(repository: Path, model: str, setting: Any) -> Iterator[Path]:
    """A copy of the published model with `setting` in its configuration: the repository itself is left alone."""
    with tempfile.TemporaryDirectory(prefix="tickserve-batching-") as folder:
        shutil.copytree(repository / model, Path(folder) / "models" / model)
        stages.load("export.batching").apply_to_config(Path(folder) / "models" / model / CONFIG_NAME, setting)
        yield Path(folder) / "models"


def measured_service(server: Any, model: str, version: Path, manifest: Manifest, config: Config) -> Any:
    """The service times of a served model."""
    from tickserve.client import Client

    inputs, _ = pipeline.golden_inputs(version, manifest)
    measure = stages.load("loadtest.service_times").measure_service
    with Client(server.http_url, manifest=manifest) as client:
        return measure(
            server.http_url, client, model, inputs, _max_batch(version, manifest), config.batching.service_calls
        )


def _derived(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if not {"chosen", "deadline_us", "service"} <= found.keys():
            raise ValueError
    except OSError as error:
        raise ArtifactError("no derived table", field=path.name, hint="run tickserve batching derive first") from error
    except (ValueError, AttributeError) as error:
        raise ArtifactError("not a table that derive writes", field=path.name) from error
    return found


def _cells(row: dict[str, Any]) -> list[Any]:
    setting, single = row["setting"], row["predicted"]["single"]
    return [
        setting["instances"],
        setting["delay_us"],
        ",".join(map(str, setting["preferred"])) or "none",
        setting["queue_size"] or "none",
        setting["queue_timeout_us"] or "none",
        _us(single["p50_us"]),
        _us(single["p99_us"]),
        single["misses"],
    ]


def _us(value: float | None) -> str:
    return "refused" if value is None else f"{value:.0f}"


def _show(result: dict[str, Any], path: Path) -> None:
    columns = ("instances", "delay_us", "preferred", "queue", "timeout_us", "p50_us", "p99_us", "misses")
    title = f"predicted at the peak ({result['peak']['requests']} requests, deadline {result['deadline_us']:.0f} us)"
    table(title, columns, [_cells(row) for row in result["candidates"]])
    table("chosen" if result["satisfied"] else "none satisfies; nearest", columns, [_cells(result["chosen"])])
    for field, reason in result["reasons"].items():
        out.print(f"{field}: {reason}", markup=False)
    out.print("[export]", markup=False)
    for key, value in result["export"].items():
        out.print(f"{key} = {json.dumps(value)}", markup=False)
    out.print(f"{path}; next: tickserve batching verify --model {result['model']} with the same data", markup=False)


def _show_verified(result: dict[str, Any]) -> None:
    rows = [
        (lane, quantile, _us(result["predicted"][lane][quantile]), _us(result["measured"][lane][quantile]))
        for lane in ("single", "bulk")
        for quantile in ("p50_us", "p99_us")
        if lane in result["measured"] and lane in result["predicted"]
    ]
    table("predicted and measured", ("lane", "quantile", "predicted_us", "measured_us"), rows)
    out.print(f"outcomes: {result['measured']['outcomes']}", markup=False)
    out.print(f"driver late, p99: {result['measured']['driver_late_p99_us']:.0f} us", markup=False)


def _show_findings(findings: list[dict[str, str]], notes: list[dict[str, str]]) -> None:
    for kind, items in (("", findings), ("note: ", notes)):
        for item in items:
            out.print(f"{kind}{item['field']}: {item['reason']}", markup=False)
    if not findings:
        out.print("no rule is broken")

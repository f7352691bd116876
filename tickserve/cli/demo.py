"""`tickserve demo`: the main job, one stage after the other, with a report a person can look at.

Runs the stages themselves, through the same functions as the single commands, and writes what each returned into
`runs/<id>/` as JSON; the report is drawn from those files alone.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tickserve import __version__, pipeline, signing, stages
from tickserve.cli import options
from tickserve.cli.export import published_json, refused_json
from tickserve.cli.output import counting, emit, out, says
from tickserve.client import Client
from tickserve.config import Config
from tickserve.errors import ComponentError, GateRefusedError, TickserveError
from tickserve.machine import fingerprint
from tickserve.manifest import Manifest, load_manifest
from tickserve.meter import Meter, Stage
from tickserve.pipeline import FloatArray
from tickserve.store import check_writable, write_json_atomic

SIGNAL_ROWS = 64
VERSIONS = ("numpy", "xgboost", "torch", "onnx", "onnxruntime", "nvidia-pytriton", "tritonclient", "locust")


@dataclass
class Run:
    """One run: where it writes, what it runs with, and what it has measured."""

    folder: Path
    config: Config
    repository: Path
    meter: Meter
    started: float = field(default_factory=time.perf_counter)
    began: datetime = field(default_factory=lambda: datetime.now(UTC))

    def write(self, name: str, value: Any) -> None:
        """Keep a stage's result as `runs/<id>/<name>`."""
        write_json_atomic(self.folder / name, value)


def demo(
    data: options.Data = None,
    symbol: options.Symbol = None,
    repository: options.Repository = options.DEFAULT_REPOSITORY,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of the run folders.")] = Path("runs"),
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Run market data (the simulator without --data) to a trained, exported, served and load-tested model."""
    settings = options.settings_of(config, profile).config
    source = pipeline.open_source(data, settings, symbol=symbol)
    check_writable(repository)
    folder = _run_folder(runs, source.symbol)
    if not data:
        says("no --data: SIMULATED order book, not market data")
    with Meter() as meter:
        run = Run(folder, settings, repository, meter)
        try:
            result = _stages(run, source)
        except BaseException as error:
            _unfinished(run, source, error)
            raise
        report = _report(run, source, result)
    emit(result | {"report": str(report)}, as_json, lambda: _show(run, result, report))


def _run_folder(runs: Path, symbol: str) -> Path:
    """A folder of this run's own, also where another starts in the same second."""
    check_writable(runs)
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{symbol}"
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        with suppress(FileExistsError):
            (runs / (name + suffix)).mkdir()
            return runs / (name + suffix)
    raise ComponentError("too many runs in one second", field="--runs")


def _unfinished(run: Run, source: Any, error: BaseException) -> None:
    """Mark the folder of a run that did not end well, so that nobody takes its files for a result."""
    reason = str(error) if isinstance(error, TickserveError) else type(error).__name__
    refused = refused_json(error) if isinstance(error, GateRefusedError) else {}
    with suppress(TickserveError):
        record = {"id": run.folder.name, "status": "failed", "symbol": source.symbol, "reason": reason}
        run.write("run.json", record | refused)


def _stages(run: Run, source: Any) -> dict[str, Any]:
    feature_set = _features(run, source)
    bundles = _train(run, feature_set)
    published = _export(run, bundles)
    return _serve(run, feature_set, published)


def _features(run: Run, source: Any) -> Any:
    says(f"1/5 data and features: {source.symbol} from {source.venue}")
    with run.meter.stage("features") as stage, counting("events", "events") as advance:
        built = pipeline.build_features(source, run.config, advance, says)
        table = built.load()
        stage.rows = 0 if built.reused else table.events_read
    run.write("quality.json", pipeline.describe(source) | {"quality": built.meta["quality"]})
    run.write("features.json", _feature_summary(built, table))
    rule = f"one event in {table.stride} kept" if table.stride > 1 else "every event kept"
    how = "reused from the cache: nothing changed" if built.reused else "built"
    says(f"    {table.events_read:,} events, {len(table.ts_ns):,} rows ({rule}), {how}")
    return built


def _feature_summary(built: Any, table: Any) -> dict[str, Any]:
    keys = ("stride", "events_read")
    return {
        "spec": built.spec.name,
        "digest": built.spec.digest,
        "columns": list(built.spec.columns),
        "rows": len(table.ts_ns),
        "reused": built.reused,
        "table": [_column(name, table.features[:, index]) for index, name in enumerate(built.spec.columns)],
    } | {key: getattr(table, key) for key in keys}


def _column(name: str, values: FloatArray) -> dict[str, Any]:
    finite = values[np.isfinite(values)].astype(np.float64)
    summary = (
        {"mean": finite.mean(), "std": finite.std(), "min": finite.min(), "max": finite.max()} if len(finite) else {}
    )
    shown = {key: float(value) for key, value in summary.items()}
    return {"name": name, **shown, "nan_share": float(1 - len(finite) / max(len(values), 1))}


def _train(run: Run, feature_set: Any) -> list[Any]:
    says("2/5 train: walk-forward, beside baselines")
    with run.meter.stage("train"):
        bundles = pipeline.train(
            feature_set, run.config, run.folder / "bundles", progress=lambda text: says(f"    {text}")
        )
    run.write("train.json", [item.report for item in bundles])
    return bundles


def _export(run: Run, bundles: list[Any]) -> list[Any]:
    says("3/5 export: ONNX, parity, publish")
    published = []
    with run.meter.stage("export"):
        for bundle in bundles:
            published.append(pipeline.export(bundle.path, run.repository, run.config))
            says(f"    {published[-1].model} version {published[-1].version}: parity gates passed, published")
    run.write("export.json", [published_json(item) for item in published])
    return published


def _serve(run: Run, feature_set: Any, published: list[Any]) -> dict[str, Any]:
    says("4/5 serve: embedded Triton, golden pairs, signals over HTTP and gRPC")
    free = run.config.serve.model_copy(update={"http_port": 0, "grpc_port": 0, "metrics_port": 0})
    names = [item.model for item in published]
    embedded = stages.load("serving.embedded")
    trusted = signing.trusted_keys(run.config.repository)
    log = run.folder / "triton.log"
    server = embedded.EmbeddedTriton(run.repository, free, models=names, log=log, trusted=trusted)
    with run.meter.stage("serve") as stage:
        server.start()
    try:
        with run.meter.stage("score") as stage:
            served = [_score(run, server, item, feature_set, stage) for item in published]
        says("5/5 load test")
        with run.meter.stage("loadtest") as stage:
            load = _load(run, server, published, stage)
        counts = stages.load("monitoring.triton_metrics").signals_counted(server.metrics_url)
    finally:
        server.stop()
    signals = {name: counts.get(name, 0) for name in names}
    total = sum(signals.values())
    asked = {
        "scored": sum(2 * model["rows"] for model in served),
        "load test": sum(row["requests"] for row in load["rows"]),
    }
    # What is left are the golden rows at each check and the load test's own warm-up.
    parts = asked | {"golden rows and warm-up": total - sum(asked.values())}
    result = {"models": served, "metrics": signals, "signals_counted": total, "parts": parts}
    run.write("served.json", result)
    return {"run": run.folder.name, **result, "loadtest": load["rows"]}


def _score(run: Run, server: Any, item: Any, feature_set: Any, stage: Stage) -> dict[str, Any]:
    manifest: Manifest = item.manifest
    rows, _ = pipeline.last_inputs(feature_set, manifest, SIGNAL_ROWS)
    bundle = run.folder / "bundles" / item.model
    research = stages.load("export.research").load_research(bundle, load_manifest(bundle))
    inputs = {manifest.inputs[0].name: rows}
    if manifest.state is not None:  # a stream that starts here
        inputs = pipeline.stepped_inputs(rows, manifest, len(rows), research.answer)
    expected = research.predict(stages.load("export.packed").pack(inputs, manifest))
    golden = stages.load("serving.golden").check_golden(server.http_url, item.model, item.version, item.path)
    answers = {}
    for transport, url in (("http", server.http_url), ("grpc", server.grpc_url)):
        with Client(f"{transport}://{url}", manifest=manifest, deadline_ms=2_000) as client:
            one = [{name: array[index : index + 1] for name, array in inputs.items()} for index in range(len(rows))]
            signals = [client.score(manifest.name, each) for each in one]
        answers[transport] = np.concatenate([signal.probabilities for signal in signals])
        stage.rows = (stage.rows or 0) + len(rows)
    return {
        "model": item.model,
        "version": item.version,
        "bundle_id": manifest.export.bundle_id if manifest.export else None,
        "rows": len(rows),
        "golden_rows": golden["rows"],
        "golden_max_abs_diff": golden["max_abs_diff"],
        "http_max_abs_diff": float(np.max(np.abs(answers["http"] - expected))),
        "grpc_max_abs_diff": float(np.max(np.abs(answers["grpc"] - expected))),
        "decisions": np.bincount(answers["http"].argmax(axis=1), minlength=3).tolist(),
    }


def _load(run: Run, server: Any, published: list[Any], stage: Stage) -> dict[str, Any]:
    versions = {item.model: item.path for item in published}
    load = stages.load("loadtest.run").run_load
    results: dict[str, Any] = load(server.http_url, server.grpc_url, versions, run.config.loadtest, run.folder)
    stage.rows = sum(row["requests"] for row in results["rows"])
    return results


def _report(run: Run, source: Any, result: dict[str, Any]) -> Path:
    total = round(time.perf_counter() - run.started, 2)
    limits = run.config.limits
    run.write("stages.json", [stage.to_json() for stage in run.meter.stages])
    run.write(
        "run.json",
        {
            "id": run.folder.name,
            "status": "done",
            "started": run.began.isoformat(timespec="seconds"),
            "command": shlex.join(["tickserve", *sys.argv[1:]]),
            "data": [path.name for path in source.files],
            "symbol": source.symbol,
            "simulated": source.simulated,
            "profile": run.config.profile,
            "machine": f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores, no GPU used",
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS} | {"tickserve": __version__},
            "total_s": total,
            "peak_memory_mb": run.meter.peak_memory_mb,
            "limits": {"run_s": limits.run_s, "memory_mb": limits.memory_mb},
            "fingerprint": fingerprint(),
            "next_steps": _next_steps(run, result),
        },
    )
    report: Path = stages.load("loadtest.report").write_report(run.folder)
    return report


def _next_steps(run: Run, result: dict[str, Any]) -> list[str]:
    repository = "" if run.repository == options.DEFAULT_REPOSITORY else f" --repository {run.repository}"
    first = result["models"][0]["model"]
    return [
        f"tickserve serve{repository}",
        f"tickserve predict {first}{repository}",
        f"tickserve loadtest run{repository}",
    ]


def _show(run: Run, result: dict[str, Any], report: Path) -> None:
    total = time.perf_counter() - run.started
    limits = run.config.limits
    out.print(f"{result['signals_counted']:,} signals counted by Triton's metrics endpoint")
    for row in result["loadtest"]:
        out.print(
            f"  {row['model']:<28} {row['transport']}: {row['requests']:,} requests, {row['failures']} failed, "
            f"p50 {row['p50_us']:,.0f} us, p99 {row['p99_us']:,.0f} us"
        )
    memory = f"peak {run.meter.peak_memory_mb:,.0f} MB (limit {limits.memory_mb:,})"
    out.print(f"{total:.1f} s (limit {limits.run_s:.0f}), {memory}")
    out.print(f"report: {report}")
    out.print(f"next: {_next_steps(run, result)[0]}")

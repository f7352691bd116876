"""Bundle to repository version: convert, check, hold against research, publish. The stage's one entry point."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from onnx import ModelProto

from export import check_model, gates, onnx_graph, optimization, parity, publish, runtime
from export.packed import feed
from export.parity import Recorded, Rows, Served
from export.repository.lock import locked
from export.research import Research, load_research
from export.runtimes.survey import Options, open_chosen, options_of, survey, without
from export.stepping import state_gates
from export.triton_config import chosen_by_policy, parse_config
from export.verify import versions_of
from models.latency_shapes import UNTRAINED, is_untrained
from tickserve.config import ExportSettings
from tickserve.errors import ArtifactError, GateRefusedError
from tickserve.manifest import GOLDEN_NAME, TREES, ExportRecord, GateResult, Manifest, load_bundle, load_manifest
from tickserve.meter import Meter
from tickserve.model_config import CONFIG_NAME
from tickserve.runtimes import Gated, RuntimeRecord
from tickserve.store import sha256_bytes

PARITY_NAME = "parity.npz"
LATENCY_CALLS = 200
# A gate over fewer rows would say little more than the golden pairs; the settings ask for no fewer either.
MIN_PARITY_ROWS = 16
# Families that read a row; the others read a window of rows.
ROWS = TREES | {"mlp"}
Progress = Callable[[str], None]
Measure = Literal["off", "quick", "full"]


@dataclass(frozen=True)
class Published:
    """A version in the repository. `reused` when this bundle was published before; `parity` is for the report."""

    model: str
    version: int
    path: Path
    manifest: Manifest
    gates: tuple[GateResult, ...]
    parity: dict[str, Any]
    reused: bool = False


def to_onnx(manifest: Manifest, research: Research) -> ModelProto:
    """The graph that is served for a bundle, checked: its tensors are the manifest's, its content is safe."""
    served = onnx_graph.serve_graph(
        research.to_onnx(),
        manifest.bundle_id(),
        input_name=manifest.inputs[0].name,
        bundle_digest=manifest.digest(),
        state=manifest.state.tensors if manifest.state else (),
    )
    check_model.check_signature(served, manifest.inputs, manifest.outputs)
    return served


def export_bundle(
    bundle: Path,
    repository: Path,
    settings: ExportSettings,
    progress: Progress | None = None,
    terms: publish.Terms = publish.NO_TERMS,
    measure: Measure = "off",
) -> Published:
    """Publish the model of `bundle` into `repository`, once every gate has passed.

    Unless `measure` is off, runtimes are measured first, and the gates judge the one that is chosen.

    Raises ArtifactError and below (what is in the bundle), GateRefusedError with the smallest counterexample (nothing
    is published then), and ComponentError (the repository cannot be written).
    """
    say = progress or (lambda _: None)
    terms.check()
    manifest = load_bundle(bundle)
    _check_bundle(manifest)
    version = publish.find_published(repository, manifest, settings, terms.trusted)
    if version is not None:
        say(f"{manifest.name}: published before, as version {version}")
        return _again(repository, manifest, version, settings)
    started = time.perf_counter()
    say(f"{manifest.name}: converting")
    with Meter() as meter:
        with meter.stage("convert"):
            research = load_research(bundle, manifest)
            served = to_onnx(manifest, research)
            parity.check_rounding(manifest, (node.op_type for node in served.graph.node))
            graph = served.SerializeToString(deterministic=True)
        say(f"{manifest.name}: {len(served.graph.node)} operators, {len(graph)} bytes; holding it against research")
        recorded = publish.read_pairs(bundle / PARITY_NAME, manifest, MIN_PARITY_ROWS).head(settings.parity_rows)
        surveyed = _surveyed(meter, graph, manifest, recorded, research, settings, measure)
        with meter.stage("gates") as stage:
            surveyed, passed = _judged(manifest, research, graph, recorded, settings, surveyed)
            options = options_of(surveyed, settings)
            passed = (_graph_gate(served, graph, options.graph_level), *passed)
            stage.rows = len(recorded.rows)
    golden = (bundle / GOLDEN_NAME).read_bytes()
    record = _record(manifest, served, graph, golden, passed, settings)
    gated = Gated(threads=options.threads, graph_level=options.graph_level, asked=settings.threads or None)
    known = {"gated": gated, "stages": meter.recorded()}
    record = record.model_copy(update=known | ({"runtime": surveyed} if surveyed is not None else {}))
    exported = manifest.model_copy(update={"export": record})
    version, path = publish.publish(publish.Release(exported, graph, golden), repository, settings, terms)
    say(f"{manifest.name}: published version {version}")
    _say_rows(repository / manifest.name, version, settings, say)
    extra = {
        "latency": _latency(bundle, manifest, graph, surveyed, settings),
        "cross_check": gates.cross_check(research, recorded),
        "export_s": time.perf_counter() - started,
    }
    return Published(
        manifest.name, version, path, load_manifest(path), passed, _report(manifest, version, passed) | extra
    )


def _surveyed(
    meter: Meter,
    graph: bytes,
    manifest: Manifest,
    recorded: Recorded,
    research: Research,
    settings: ExportSettings,
    measure: Measure,
) -> RuntimeRecord | None:
    """The runtimes, measured as a stage of its own; None where `measure` is off."""
    if measure == "off":
        return None
    with meter.stage("measure"):
        return survey(graph, manifest, recorded, research, settings, measure)


def _check_bundle(manifest: Manifest) -> None:
    if manifest.export is not None:
        raise ArtifactError("expected a bundle, was a published version", field="export")
    if is_untrained(manifest.architecture):
        hint = "time it with 'python -m benchmarks.stepped_lstm'"
        expected, was = "a trained model", UNTRAINED
        raise ArtifactError("never published", field="architecture.status", expected=expected, was=was, hint=hint)
    for name in (manifest.model_file, GOLDEN_NAME, PARITY_NAME):
        if name not in manifest.files:
            raise ArtifactError("the bundle does not name a file that export needs", field=name[:100])
    tensor, wanted = manifest.inputs[0], 1 if manifest.family in ROWS or manifest.state is not None else 2
    if len(tensor.shape) != wanted:
        expected = "(F,)" if wanted == 1 else "(T, F)"
        raise ArtifactError(
            f"wrong input of a {manifest.family}", field="inputs.0", expected=expected, was=str(tensor.shape)
        )
    parity.check_tolerance(manifest)


def _again(repository: Path, manifest: Manifest, version: int, settings: ExportSettings) -> Published:
    path = repository / manifest.name / str(version)
    with locked(repository):
        publish.refresh_config(repository, manifest.name, settings)
    published = load_manifest(path)
    passed = published.export.gates if published.export else ()
    return Published(manifest.name, version, path, published, passed, _report(manifest, version, passed), reused=True)


def _say_rows(folder: Path, version: int, settings: ExportSettings, say: Progress) -> None:
    """Say where the version is loaded with fewer rows than it was gated for, which engines are told."""
    text = (folder / CONFIG_NAME).read_text("utf-8")
    most = parse_config(text).max_batch
    if version in chosen_by_policy(text, versions_of(folder)) and most < settings.max_batch:
        say(f"{folder.name}: a request may have {most} rows, while a version is loaded that was gated for no more")


def _judged(
    manifest: Manifest,
    research: Research,
    graph: bytes,
    recorded: Recorded,
    settings: ExportSettings,
    surveyed: RuntimeRecord | None,
) -> tuple[RuntimeRecord | None, tuple[GateResult, ...]]:
    """The parity gates on the chosen runtime, or, where they refuse that one, on the next best or the default."""
    while True:
        options = options_of(surveyed, settings)
        try:
            return surveyed, _parity_gates(manifest, research, graph, recorded, settings, options)
        except GateRefusedError as error:
            surveyed = without(surveyed, settings, str(error)) if surveyed else None
            if surveyed is None:
                raise


def _graph_gate(served: ModelProto, graph: bytes, level: int) -> GateResult:
    """What `check_model` let through, and what ONNX Runtime makes of it when it loads it, for the record."""
    check_model.read_model(graph)
    optimized = optimization.measure_optimization(graph, level)
    measured: dict[str, float | int | str | None] = {
        "operators": len(served.graph.node),
        "bytes": len(graph),
        "opset": _opset(served),
        "optimization": onnx_graph.OPTIMIZATION,
        "optimization_at_load": optimized.level,
        "operators_at_load": optimized.nodes_after,
        "runtime": optimized.runtime,
    }
    limits = {"bytes": check_model.MAX_MODEL_BYTES, "operators": check_model.MAX_NODES}
    return GateResult(name="graph", passed=True, measured=measured, limits=dict(limits))


def _opset(model: ModelProto) -> int:
    return next(int(opset.version) for opset in model.opset_import if opset.domain in ("", "ai.onnx"))


def _parity_gates(
    manifest: Manifest,
    research: Research,
    graph: bytes,
    recorded: Recorded,
    settings: ExportSettings,
    options: Options,
) -> tuple[GateResult, ...]:
    session = open_chosen(graph, options)

    def answer(inputs: dict[str, Rows]) -> Served:
        try:
            return runtime.run(session, inputs)
        except Exception as error:  # onnxruntime raises a type of its own per cause, all from Exception
            rows = len(next(iter(inputs.values())))
            was = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise GateRefusedError(
                f"the graph does not score a batch of {rows}", field="batch", expected="an answer", was=was
            ) from error

    def score(rows: Rows) -> Served:
        return answer(feed(rows, manifest))

    batches = gates.served_batches(settings.preferred_batch_rows, settings.max_batch)
    passed = gates.run_gates(score, recorded, research, manifest, batches, threads=options.threads)
    if research.answer is None:
        return passed
    return (*passed, *state_gates(answer, recorded.rows, research.answer, manifest))


def _record(
    manifest: Manifest,
    served: ModelProto,
    graph: bytes,
    golden: bytes,
    passed: tuple[GateResult, ...],
    settings: ExportSettings,
) -> ExportRecord:
    return ExportRecord(
        bundle_digest=manifest.digest(),
        bundle_id=manifest.bundle_id(),
        onnx_sha256=sha256_bytes(graph),
        golden_sha256=sha256_bytes(golden),
        opset=_opset(served),
        ir_version=served.ir_version,
        gates=passed,
        max_batch=settings.max_batch,
    )


def _latency(
    bundle: Path, manifest: Manifest, graph: bytes, surveyed: RuntimeRecord | None, settings: ExportSettings
) -> dict[str, float]:
    if surveyed is not None:
        taken = surveyed.candidate(surveyed.chosen).timings[0]
    else:
        row = publish.read_pairs(bundle / GOLDEN_NAME, manifest).rows[:1]
        threads = options_of(None, settings).threads
        (taken,) = runtime.measure_latency(graph, feed(row, manifest), calls=LATENCY_CALLS, threads=threads)
    return {"calls": taken.calls, "rows": taken.rows, "p50_us": taken.p50_us, "p99_us": taken.p99_us}


def _report(manifest: Manifest, version: int, passed: tuple[GateResult, ...]) -> dict[str, Any]:
    return {
        "model": manifest.name,
        "version": version,
        "family": manifest.family,
        "precision": manifest.precision,
        "tolerance": manifest.tolerance.model_dump(),
        "gates": [gate.model_dump(mode="json") for gate in passed],
    }

"""`train`: labels, walk-forward folds, every family and baseline on them, and the bundles of what came out.

Each fold trains a model of its own, on everything before its test rows. What is published is the model of the *last*
fold: it never saw its test rows, so the last fold's numbers are out of sample and about the published model itself.
The report of a bundle is JSON: `folds` (rows, n_eff, metrics, baselines), `pooled` (all folds, see `metrics.pool`),
`resampling` (how intervals were drawn), `comparison` with the best baseline, `beats_baselines`, `verdict`, `deflation`,
`regimes`, `gate` (docs/validation.md), `costs`, `calibration`, `importance`, `children`, `seconds`, `rows_per_s`,
`stages` (what the manifest's provenance has), `limits` (those of `[limits]`, kept or not), and `probe` where it was
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.validation import sentence
from tickserve.config import Config
from tickserve.errors import UsageError
from tickserve.limits import hold, of_features, of_training
from tickserve.manifest import GateResult, StageFigures, TensorSpec
from tickserve.meter import Meter
from training import baselines
from training.bundles import TrainedBundle, feature_contract, provenance, stream_contract, write_bundle
from training.examples import DataMeta, IntArray, Rows, evenly, prepare
from training.families import fitting, job_of
from training.gate import refuse_models
from training.job import Fit
from training.leakage import refuse_leaks
from training.reference import training_reference
from training.walk import Judged, Run, Say, walk

if TYPE_CHECKING:
    from market.build import FeatureSet, FeatureTable

FAMILIES = ("gbdt", "lstm")


@dataclass(frozen=True)
class Demands:
    """What a training has to show beside its scores: that it passes the gate, and that its job sees no future."""

    gate: bool = False
    probe: bool = False


NO_DEMANDS = Demands()


def train(
    feature_set: FeatureSet,
    config: Config,
    out: Path,
    families: Sequence[str] = FAMILIES,
    name_prefix: str | None = None,
    progress: Say | None = None,
    demands: Demands = NO_DEMANDS,
) -> list[TrainedBundle]:
    """Train `families` on a feature set and write their bundles to `out/<name>/`; `progress` gets a line per step.

    Raises InsufficientDataError, ComponentError, and GateRefusedError: a feature that knows the label, a model or a job
    that does not meet `demands`.
    """
    from market.feature_matrix import load_table

    table = load_table(feature_set, config.trainer)
    meta = meta_of(feature_set)
    return train_table(table, meta, config, out, families, name_prefix, progress, demands=demands)


def meta_of(feature_set: FeatureSet) -> DataMeta:
    """What a feature set is made of."""
    return DataMeta(
        symbol=feature_set.symbol,
        kind=feature_set.kind,
        levels=feature_set.spec.levels,
        spec=feature_set.spec.name,
        feature_digest=feature_set.spec.digest,
        columns=feature_set.spec.columns,
        data=feature_set.source_digests,
        simulated=feature_set.simulated,
        definition=feature_set.spec.to_json(),
        stages={"features": feature_set.took} if feature_set.took else {},
    )


def train_table(
    table: FeatureTable,
    meta: DataMeta,
    config: Config,
    out: Path,
    families: Sequence[str] = FAMILIES,
    name_prefix: str | None = None,
    progress: Say | None = None,
    parts: Sequence[slice] = (),
    also: Callable[[Run, Sequence[Judged]], dict[str, Any]] | None = None,
    demands: Demands = NO_DEMANDS,
) -> list[TrainedBundle]:
    """As `train`, from a loaded table; `parts` as for `prepare`, and `also` adds what it finds to each report.

    A model that the gate refuses is not written where `demands` ask for it; the others are.
    Raises ConfigError too, for a family that this data has nothing for.
    """
    say = progress or (lambda text: None)
    families = fitting(families, meta, config, say)
    config = _counted(config, len(families))
    examples = prepare(table, meta, config, parts)
    refuse_leaks(examples, meta.columns)
    yardsticks = {fold.number: baselines.predict_all(examples, fold, meta.columns) for fold in examples.folds}
    say(f"{len(examples.folds)} folds over {len(examples.ret):,} rows, baselines judged")
    if demands.probe and parts:
        raise UsageError("one symbol's rows are probed at a time", field="probe", hint="probe each symbol's training")
    probed = {family: _probed(table, meta, config, family, say) for family in families} if demands.probe else {}
    runs = (Run(examples, meta, config, job_of(family, examples, config), yardsticks, say) for family in families)
    walked: Iterable[tuple[Run, list[Judged], dict[str, Any]]] = ((run, *_measured(run)) for run in runs)
    if config.limits.may_fail:  # then nothing is written before the last family has kept to the limits
        walked = list(walked)
    made: list[TrainedBundle] = []
    refused: dict[str, Any] = {}
    for run, judged, report in walked:
        name = f"{name_prefix or meta.tag}-{run.job.family}"
        report |= probed.get(run.job.family, {}) | (also(run, judged) if also else {})
        if demands.gate and not report["gate"]["passed"]:
            refused[name] = report["gate"]
            _say_scores(run, name, report)
            continue
        made += _publish(run, judged[-1].fit, report, out, name)
    refuse_models(refused)
    return made


def _counted(config: Config, families: int) -> Config:
    """Families that are trained beside each other are trials: the best of them is the best of that many."""
    tried = config.validation.trials * families
    return config.model_copy(update={"validation": config.validation.model_copy(update={"trials": tried})})


def _probed(table: FeatureTable, meta: DataMeta, config: Config, family: str, say: Say) -> dict[str, Any]:
    """What the probe found of a family's job, as a part of its report. Raises GateRefusedError."""
    from training.probe import refuse_seeing_the_future

    return {"probe": refuse_seeing_the_future(table, meta, config, family, say)}


def _say_scores(run: Run, name: str, report: dict[str, Any]) -> None:
    run.say(f"{name}: {report['verdict']}")
    run.say(f"{name}: {sentence(report['gate'])}")


def _measured(run: Run) -> tuple[list[Judged], dict[str, Any]]:
    """The walk over the folds, what it took, and whether that and its hit rate keep to the limits.

    Raises LimitExceededError.
    """
    with Meter() as meter, meter.stage("train") as stage:
        judged, report = walk(run)
    taken = {"train": stage.recorded() | {"seconds": report["seconds"], "rows_per_s": report["rows_per_s"]}}
    hit_rate = report["pooled"]["model"]["hit_rate"]
    settings, features = run.config.limits, run.meta.stages.get("features", {}).get("seconds")
    gates = of_features(settings, features) if features is not None else ()
    gates += (kept := of_training(settings, report["seconds"], stage.peak_memory_mb, hit_rate))
    hold(kept, lambda text: run.say(f"{run.job.family}: {text}"))
    held = [gate.model_dump(mode="json") for gate in gates]
    return judged, report | {"stages": {**run.meta.stages, **taken}, "limits": held}


def _publish(run: Run, fit: Fit, report: dict[str, Any], out: Path, name: str) -> list[TrainedBundle]:
    """Write the last fold's model as a bundle and make its children; the bundles, the teacher first."""
    teacher, inputs, rows = bundle_of(run, fit, report, out, name)
    _say_scores(run, name, report)
    return [teacher, *_children(run, fit, teacher, inputs, rows, out)]


def bundle_of(run: Run, fit: Fit, report: dict[str, Any], out: Path, name: str) -> tuple[TrainedBundle, Rows, IntArray]:
    """The bundle of the last fold's model, written to `out/<name>/`, the inputs it carries, and their table rows."""
    run, fit = _narrowed(run, fit)
    rows = parity_rows(run.job.eligible(run.examples.published.rows.test), run.config)
    inputs = run.job.inputs(rows)
    path, manifest = write_bundle(
        out,
        name=name,
        model_file=run.job.model_file,
        save=lambda file: run.job.save(fit, file),
        predict=lambda given: run.job.score(fit, given),
        tensor=run.job.tensor,
        parity_inputs=inputs,
        fields=_fields(run, fit, report),
    )
    described = {"model": name, "family": run.job.family, "precision": "fp32", **report}
    return TrainedBundle(path, manifest, described), inputs, rows


def _narrowed(run: Run, fit: Fit) -> tuple[Run, Fit]:
    """The run over the columns alone that the model takes: what is published is a model of a narrower feature spec."""
    if fit.columns is None:
        return run, fit
    meta = run.meta.narrowed(fit.columns)
    examples = replace(run.examples, features=run.examples.features[:, fit.columns], columns=meta.columns)
    job = job_of(run.job.family, examples, run.config)
    return replace(run, examples=examples, meta=meta, job=job), replace(fit, columns=None)


def parity_rows(rows: IntArray, config: Config) -> IntArray:
    """The out-of-sample rows that the bundle carries with the model's numbers, evenly spaced."""
    return evenly(rows, config.export.parity_rows)


def _fields(run: Run, fit: Fit, report: dict[str, Any]) -> dict[str, Any]:
    kept = (
        *("folds", "pooled", "resampling", "comparison", "deflation", "regimes", "costs", "beats_baselines", "verdict"),
        *("gate", "probe", "symbols"),
    )
    taken = {"train": {"seconds": report["seconds"], "rows_per_s": report["rows_per_s"]}}
    stages: dict[str, StageFigures] = report.get("stages", taken)  # a trial of a search is not metered
    stream = stream_contract(run.meta, run.examples)
    return {
        "family": run.job.family,
        "horizon": run.examples.horizon,
        "architecture": run.job.architecture(fit),
        "nan_policy": run.job.nan_policy,
        "features": feature_contract(run.meta, run.examples, run.examples.published.rows.train),
        "tolerance": run.job.tolerance,
        "metrics": {name: report[name] for name in kept if name in report},
        "gates": tuple(GateResult.model_validate(gate) for gate in report.get("limits", ())),
        "provenance": provenance(run.meta, run.config.seed, stages),
        "reference": training_reference(run.job, fit, run.examples),
    } | ({"stream": stream} if stream else {})


def _children(
    run: Run, fit: Fit, teacher: TrainedBundle, inputs: Rows, rows: IntArray, out: Path
) -> list[TrainedBundle]:
    """A net's children; `children` of the teacher's report holds a row for each, passed or refused."""
    if run.job.family != "lstm":
        return []
    from training.quantize import Teacher, children

    tensor: TensorSpec = run.job.tensor
    expected = run.job.score(fit, inputs)
    source = Teacher(fit.model, teacher, tensor, inputs, expected, run.examples.ret[rows])
    bundles, report = children(source, run.config.compress, out, run.say)
    if run.config.lstm.stepped and run.meta.definition is not None:
        from training.stepped import stepped_child

        child, row = stepped_child(fit.model, teacher, run.examples, rows, run.job.eligible, run.config, out)
        run.say(f"{row['model']}: {row['verdict']}")
        bundles.extend([child] if child else [])
        report.append(row)
    teacher.report["children"] = report
    return bundles

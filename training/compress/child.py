"""The bundle of what a step made: the last fold's model, judged in every fold as training judges a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tickserve.manifest import GateResult
from tickserve.meter import Stage
from training.bundles import provenance, write_bundle
from training.compress.generation import Generation
from training.compress.teacher import Data
from training.examples import IntArray, Rows
from training.job import Fit, Job
from training.metrics import Prediction
from training.reference import training_reference
from training.train import parity_rows
from training.walk import Run, judge_fold, report_of

# As training keeps them: the gate of validation is measured on the child itself, and export may insist on it.
KEPT = (
    *("folds", "pooled", "resampling", "comparison", "deflation", "regimes", "costs", "beats_baselines", "verdict"),
    "gate",
)


@dataclass(frozen=True)
class Told:
    """What the models of all folds answered on their test rows, and the report of it as training writes one."""

    answers: dict[int, Rows]
    report: dict[str, Any]


class _Answered:
    """A job that was asked already: each fold is answered for once, and judged from that."""

    def __init__(self, job: Job, answers: Mapping[int, Rows], places: Mapping[int, int]) -> None:
        self._job, self._answers, self._places = job, answers, places

    def __getattr__(self, name: str) -> Any:
        return getattr(self._job, name)

    def predict(self, fit: Fit, rows: IntArray) -> Rows:
        return self._answers[self._places[id(fit)]]


def described(
    job: Job, fits: Sequence[Fit], data: Data, yardsticks: Mapping[int, dict[str, Prediction]], stage: Stage
) -> Told:
    """Ask every fold's model about its test rows, and judge it beside the baselines; `stage` is what making it took."""
    folds = data.examples.folds
    answers = {
        place: job.predict(fit, job.eligible(fold.rows.test))
        for place, (fit, fold) in enumerate(zip(fits, folds, strict=True))
    }
    asked: Any = _Answered(job, answers, {id(fit): place for place, fit in enumerate(fits)})
    run = Run(data.examples, data.meta, data.config, asked, yardsticks, lambda text: None)
    each = stage.seconds / len(folds)
    judged = [judge_fold(run, fold, fit, each) for fold, fit in zip(folds, fits, strict=True)]
    report = report_of(run, judged, stage.seconds)
    return Told(answers, report | {"stages": {"compress": stage.recorded() | {"rows_per_s": report["rows_per_s"]}}})


def write_child(
    out: Path,
    name: str,
    job: Job,
    fits: tuple[Fit, ...],
    parents: Sequence[Generation],
    told: Told,
    gates: tuple[GateResult, ...],
    against: Mapping[str, Any],
    data: Data,
) -> Generation:
    """Write the bundle of the last fold's model to `out/<name>/`, and give all folds' models with it."""
    examples, fit = data.examples, fits[-1]
    rows = parity_rows(job.eligible(examples.published.rows.test), data.config)
    path, manifest = write_bundle(
        out,
        name=name,
        model_file=job.model_file,
        save=lambda file: job.save(fit, file),
        predict=lambda given: job.score(fit, given),
        tensor=job.tensor,
        parity_inputs=job.inputs(rows),
        fields=_fields(job, fit, parents, told.report, gates, against, data),
    )
    return Generation(job, fits, path, manifest, told.answers)


def _fields(
    job: Job,
    fit: Fit,
    parents: Sequence[Generation],
    report: Mapping[str, Any],
    gates: tuple[GateResult, ...],
    against: Mapping[str, Any],
    data: Data,
) -> dict[str, Any]:
    first = parents[0].manifest
    return {
        "family": job.family,
        "precision": "int8" if job.model_file.endswith(".onnx") else "fp32",
        "horizon": first.horizon,
        "parents": tuple(parent.manifest.digest() for parent in parents),
        "architecture": job.architecture(fit),
        "nan_policy": job.nan_policy,
        "features": first.features,
        "tolerance": job.tolerance,
        "metrics": {key: report[key] for key in KEPT if key in report} | dict(against),
        "gates": gates,
        "provenance": provenance(data.meta, data.config.seed, report["stages"]),
        "reference": training_reference(job, fit, data.examples),
    } | ({"stream": first.stream} if first.stream else {})

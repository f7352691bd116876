"""`train`: labels, walk-forward folds, every family and baseline on them, and the bundles of what came out.

Each fold trains a model of its own, on everything before its test rows. What is published is the model of the *last*
fold: it never saw its test rows, so the last fold's numbers are out of sample and about the published model itself.
The report of a bundle is JSON: `folds` (rows, n_eff, metrics, baselines), `pooled` (all folds, see `metrics.pool`),
`comparison` with the best baseline, `beats_baselines`, `verdict`, `costs`, `calibration`, `importance`, `children`,
`seconds`, `rows_per_s`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from market.labels import UP
from tickserve.config import Config
from tickserve.errors import GateRefusedError, UsageError
from tickserve.manifest import TensorSpec
from training import baselines
from training.bundles import TrainedBundle, feature_contract, provenance, stream_contract, write_bundle
from training.comparison import MODEL, Cells, judge
from training.examples import DataMeta, Examples, IntArray, LabelledFold, Rows, evenly, prepare
from training.job import Fit, Job
from training.leakage import refuse_leaks, refuse_too_good
from training.metrics import Metrics, Prediction, calibration, evaluate, pool

if TYPE_CHECKING:
    from market.build import FeatureSet, FeatureTable

Say = Callable[[str], None]
FAMILIES = ("gbdt", "lstm")


def train(
    feature_set: FeatureSet,
    config: Config,
    out: Path,
    families: Sequence[str] = FAMILIES,
    name_prefix: str | None = None,
    progress: Say | None = None,
) -> list[TrainedBundle]:
    """Train `families` on a feature set and write their bundles to `out/<name>/`; `progress` gets a line per step.

    Raises InsufficientDataError, GateRefusedError (a feature that knows the label) and ComponentError.
    """
    meta = DataMeta(
        symbol=feature_set.symbol,
        kind=feature_set.kind,
        levels=feature_set.spec.levels,
        spec=feature_set.spec.name,
        feature_digest=feature_set.spec.digest,
        columns=feature_set.spec.columns,
        data=feature_set.source_digests,
        simulated=feature_set.simulated,
        definition=feature_set.spec.to_json(),
    )
    return train_table(feature_set.load(), meta, config, out, families, name_prefix, progress)


def train_table(
    table: FeatureTable,
    meta: DataMeta,
    config: Config,
    out: Path,
    families: Sequence[str] = FAMILIES,
    name_prefix: str | None = None,
    progress: Say | None = None,
) -> list[TrainedBundle]:
    """As `train`, from a loaded table."""
    say = progress or (lambda text: None)
    examples = prepare(table, meta, config)
    refuse_leaks(examples, meta.columns)
    yardsticks = {fold.number: baselines.predict_all(examples, fold, meta.columns) for fold in examples.folds}
    say(f"{len(examples.folds)} folds over {len(examples.ret):,} rows, baselines judged")
    made: list[TrainedBundle] = []
    for family in families:
        run = _Run(examples, meta, config, _job(family, examples, config), yardsticks, say)
        made += _publish(run, *_walk(run), out, f"{name_prefix or meta.tag}-{family}")
    return made


def _job(family: str, examples: Examples, config: Config) -> Job:
    """The family's job; the other family's library is never imported."""
    if family == "gbdt":
        from training.gbdt import GbdtJob

        return GbdtJob(examples, config.gbdt, config.seed)
    if family == "lstm":
        from training.nets import LstmJob

        return LstmJob(examples, config.lstm, config.seed)
    raise UsageError("unknown family", field="families", expected=" or ".join(FAMILIES), was=family[:40])


@dataclass(frozen=True)
class _Run:
    """One family's run over the folds."""

    examples: Examples
    meta: DataMeta
    config: Config
    job: Job
    yardsticks: Mapping[int, dict[str, Prediction]]
    say: Say


@dataclass(frozen=True)
class _Judged:
    """One fold, trained and judged: its report row, what ranks are compared by, and what calibration is drawn from."""

    fit: Fit
    row: dict[str, Any]
    cells: Cells
    p_up: np.ndarray[Any, np.dtype[np.float64]]
    went_up: np.ndarray[Any, np.dtype[np.bool_]]


def _walk(run: _Run) -> tuple[Fit, dict[str, Any]]:
    """Every fold in turn; the last fold's fit, and the report."""
    started = time.perf_counter()
    judged = list(_judge_folds(run))
    seconds = time.perf_counter() - started
    rows = [item.row for item in judged]
    fitted = sum(row["fit_rows"] for row in rows)
    pooled = {
        "model": pool([row["metrics"] for row in rows]),
        "baselines": {name: pool([row["baselines"][name] for row in rows]) for name in rows[0]["baselines"]},
    }
    refuse_too_good(pooled["model"], run.job.family)
    judgement = judge(rows, pooled, [item.cells for item in judged], run.config.seed)
    return judged[-1].fit, {
        "horizon": run.examples.horizon.model_dump() | {"median_ms": run.examples.horizon_median_ms},
        "folds": rows,
        "pooled": pooled,
        "comparison": judgement.to_json(),
        "costs": run.config.costs.model_dump() | {"assumed_spreads": run.examples.assumed_spreads},
        "calibration": calibration(
            np.concatenate([item.p_up for item in judged]), np.concatenate([item.went_up for item in judged])
        ),
        "importance": run.job.importance(judged[-1].fit, run.meta.columns),
        "beats_baselines": judgement.outcome == "better",
        "verdict": judgement.sentence(pooled["model"]),
        "seconds": seconds,
        "rows_per_s": fitted / max(sum(row["fit_seconds"] for row in rows), 1e-9),
    }


def _judge_folds(run: _Run) -> Iterator[_Judged]:
    for fold in run.examples.folds:
        started = time.perf_counter()
        fit = run.job.fit(fold)
        seconds = time.perf_counter() - started
        judged = _judge(run, fold, fit, seconds)
        metrics = judged.row["metrics"]
        ic = "-" if metrics["ic"] is None else f"{metrics['ic']:+.3f}"
        run.say(
            f"{run.job.family} fold {fold.number}/{len(run.examples.folds)}: {fit.rows:,} rows in {seconds:.1f} s "
            f"({fit.rows / max(seconds, 1e-9):,.0f} rows/s), macro-F1 {metrics['macro_f1']:.3f}, IC {ic}"
        )
        yield judged


def _judge(run: _Run, fold: LabelledFold, fit: Fit, seconds: float) -> _Judged:
    rows = run.job.eligible(fold.rows.test)
    probabilities = run.job.predict(fit, rows)
    refuse_not_finite(probabilities, run.job.family)
    mask = baselines.judged_mask(rows, fold)

    said = {MODEL: Prediction.of(probabilities)}
    said |= {name: other.take(mask) for name, other in run.yardsticks[fold.number].items()}
    judged = {name: _evaluated(run, fold, rows, prediction) for name, prediction in said.items()}
    metrics = judged.pop(MODEL)
    row = {
        "fold": fold.number,
        "train": len(fold.rows.train),
        "validation": len(fold.rows.validation),
        "test": len(rows),
        "n_eff": metrics["n_eff"],
        "threshold": fold.threshold,
        "best_iteration": fit.best,
        "fit_rows": fit.rows,
        "fit_seconds": seconds,
        "metrics": metrics,
        "baselines": judged,
    }
    scores = {name: prediction.score for name, prediction in said.items()}
    cells = Cells.of(rows, run.examples.end[rows], run.examples.ret[rows], scores)
    went_up = run.examples.classes(rows, fold.threshold) == UP
    return _Judged(fit, row, cells, probabilities[:, UP].astype(np.float64), went_up)


def _evaluated(run: _Run, fold: LabelledFold, rows: IntArray, said: Prediction) -> Metrics:
    return evaluate(said, rows, run.examples, fold.threshold, run.config.costs.fee_bps)


def refuse_not_finite(probabilities: Rows, family: str) -> None:
    """Raise GateRefusedError for a model whose training diverged."""
    wrong = int((~np.isfinite(probabilities)).any(axis=1).sum())
    if wrong:
        raise GateRefusedError(
            "training diverged: the model's probabilities are not finite",
            field=family,
            expected="finite probabilities",
            was=f"{wrong} of {len(probabilities)} rows without",
            hint=f"use a smaller {family}.learning_rate",
        )


def _publish(run: _Run, fit: Fit, report: dict[str, Any], out: Path, name: str) -> list[TrainedBundle]:
    """Write the last fold's model as a bundle and make its children; the bundles, the teacher first."""
    fold = run.examples.published
    rows = parity_rows(run.job.eligible(fold.rows.test), run.config)
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
    teacher = TrainedBundle(path, manifest, {"model": name, "family": run.job.family, "precision": "fp32", **report})
    run.say(f"{name}: {report['verdict']}")
    return [teacher, *_children(run, fit, teacher, inputs, rows, out)]


def parity_rows(rows: IntArray, config: Config) -> IntArray:
    """The out-of-sample rows that the bundle carries with the model's numbers, evenly spaced."""
    return evenly(rows, config.export.parity_rows)


def _fields(run: _Run, fit: Fit, report: dict[str, Any]) -> dict[str, Any]:
    kept = ("folds", "pooled", "comparison", "costs", "beats_baselines", "verdict")
    stages = {"train": {"seconds": report["seconds"], "rows_per_s": report["rows_per_s"]}}
    stream = stream_contract(run.meta, run.examples)
    return {
        "family": run.job.family,
        "horizon": run.examples.horizon,
        "architecture": run.job.architecture(fit),
        "nan_policy": run.job.nan_policy,
        "features": feature_contract(run.meta, run.examples, run.examples.published.rows.train),
        "tolerance": run.job.tolerance,
        "metrics": {name: report[name] for name in kept},
        "provenance": provenance(run.meta, run.config.seed, stages),
    } | ({"stream": stream} if stream else {})


def _children(
    run: _Run, fit: Fit, teacher: TrainedBundle, inputs: Rows, rows: IntArray, out: Path
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

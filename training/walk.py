"""One family over the folds: a model of its own in each, judged beside the baselines on rows it never saw.

Training and the search for hyper-parameters measure a model by the same functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from market.labels import UP
from tickserve.config import Config
from tickserve.errors import GateRefusedError
from training import baselines
from training.cells import MODEL, Cells, pooled_intervals
from training.comparison import judge
from training.deflation import deflated
from training.examples import DataMeta, Examples, FloatArray, IntArray, LabelledFold, Rows
from training.gate import gate_of
from training.intervals import Resampling
from training.job import Fit, Job
from training.leakage import refuse_too_good
from training.metrics import Metrics, Outcome, Prediction, by_fees, calibration, evaluate, pool
from training.regimes import Placed, by_regime

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """One family's run over the folds."""

    examples: Examples
    meta: DataMeta
    config: Config
    job: Job
    yardsticks: Mapping[int, dict[str, Prediction]]
    say: Say


@dataclass(frozen=True)
class Judged:
    """One fold, trained and judged: its report row, and what intervals, regimes and calibration are drawn from."""

    fit: Fit
    row: dict[str, Any]
    cells: Cells
    placed: Placed
    p_up: np.ndarray[Any, np.dtype[np.float64]]
    went_up: np.ndarray[Any, np.dtype[np.bool_]]


def walk(run: Run) -> tuple[list[Judged], dict[str, Any]]:
    """Every fold in turn, trained and judged, and the report of all."""
    started = time.perf_counter()
    judged = list(_folds(run))
    return judged, report_of(run, judged, time.perf_counter() - started)


def report_of(run: Run, judged: Sequence[Judged], seconds: float) -> dict[str, Any]:
    """The report of judged folds. Raises GateRefusedError for metrics that no honest model reaches."""
    rows, cells = [item.row for item in judged], [item.cells for item in judged]
    seed, fitted = run.config.seed, sum(row["fit_rows"] for row in rows)
    pooled = {
        "model": pooled_of(MODEL, [row["metrics"] for row in rows], cells, run.config),
        "baselines": {
            name: pooled_of(name, [row["baselines"][name] for row in rows], cells, run.config)
            for name in rows[0]["baselines"]
        },
    }
    refuse_too_good(pooled["model"], run.job.family)
    judgement = judge(rows, pooled, cells, seed)
    report = {
        "horizon": run.examples.horizon.model_dump() | {"median_ms": run.examples.horizon_median_ms},
        "folds": rows,
        "pooled": pooled,
        "resampling": Resampling.of(sum(len(each.rows) for each in cells), seed).to_json(),
        "comparison": judgement.to_json(),
        "deflation": deflated(pooled["model"]["ic_t"], _profits(judged), run.config.validation.trials),
        "regimes": by_regime([item.placed for item in judged], seed),
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
    return report | {"gate": gate_of(report, run.config.validation)}


def pooled_of(name: str, folds: Sequence[Metrics], cells: Sequence[Cells], config: Config) -> dict[str, Any]:
    """A predictor's metrics over all folds, with their intervals and its profit at other fees."""
    pooled = pool(folds)
    pooled["pnl_bps_by_fees"] = by_fees(pooled["pnl_bps"], config.costs.fee_bps)
    return pooled | {"interval": pooled_intervals(cells, name, pooled, config.seed)}


def _profits(judged: Sequence[Judged]) -> FloatArray:
    """What each of the model's trades made after costs, in basis points."""
    outcomes = [item.placed.outcome for item in judged]
    return np.concatenate([outcome.net_bps[outcome.traded] for outcome in outcomes])


def _folds(run: Run) -> Iterator[Judged]:
    for fold in run.examples.folds:
        started = time.perf_counter()
        fit = run.job.fit(fold)
        seconds = time.perf_counter() - started
        judged = judge_fold(run, fold, fit, seconds)
        metrics = judged.row["metrics"]
        ic = "-" if metrics["ic"] is None else f"{metrics['ic']:+.3f}"
        run.say(
            f"{run.job.family} fold {fold.number}/{len(run.examples.folds)}: {fit.rows:,} rows in {seconds:.1f} s "
            f"({fit.rows / max(seconds, 1e-9):,.0f} rows/s), macro-F1 {metrics['macro_f1']:.3f}, IC {ic}"
            + (f", resumed at step {fit.resumed_at:,}" if fit.resumed_at else "")
        )
        yield judged


def judge_fold(run: Run, fold: LabelledFold, fit: Fit, seconds: float) -> Judged:
    """A fold's model on the fold's test rows, beside the baselines; `seconds` is what fitting it took."""
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
    outcomes = {name: _outcome(run, fold, rows, prediction) for name, prediction in said.items()}
    cells = cells_of(run.examples, rows, said, outcomes)
    placed = Placed.of(run.examples, fold, rows, said[MODEL].score, outcomes[MODEL])
    went_up = outcomes[MODEL].truth == UP
    return Judged(fit, row, cells, placed, probabilities[:, UP].astype(np.float64), went_up)


def cells_of(
    examples: Examples, rows: IntArray, said: Mapping[str, Prediction], outcomes: Mapping[str, Outcome]
) -> Cells:
    """Cells in the order of time, so that a block of them holds what all symbols did meanwhile."""
    at = examples.place(rows)
    turn = np.argsort(at, kind="stable")
    scores = {name: prediction.score[turn] for name, prediction in said.items()}
    ordered = {name: outcome.take(turn) for name, outcome in outcomes.items()}
    return Cells.of(at[turn], examples.place(examples.end[rows])[turn], examples.ret[rows][turn], scores, ordered)


def _outcome(run: Run, fold: LabelledFold, rows: IntArray, said: Prediction) -> Outcome:
    return Outcome.of(said, rows, run.examples, fold.threshold, run.config.costs.fee_bps)


def _evaluated(run: Run, fold: LabelledFold, rows: IntArray, said: Prediction) -> Metrics:
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

"""Leak probes of a whole training: the same fold is trained again where the future is another, and must not notice.

A fold may know what lies before its *cut*: the instant when the last label that it learns from, or stops by, is known.
Behind the cut the table is replaced, the training starts anew from that table (labels, folds, flat band, baselines,
regimes, the family's own scaler, selection and early stopping), and everything the fold made is compared bit for bit.
Whatever differs has seen the future, wherever in the job that happens.

The future is replaced twice. *Shuffled*: its rows and its price moves lie in another order, which what looks at
neighbours, labels or single rows cannot miss. *Recast*: its columns trade places and scales, its price moves turn round
and shrink, which moves what a shuffle leaves alone: a mean, a scale, a band, a ranking of columns.

Beside it, a column that is the label of the row before or after is refused by its correlation. What the probes do not
see: what happened before the table was made (`tickserve.features.lookahead` perturbs events); the times of the rows,
which are not replaced; the rows that fall into a fold, which are a share of all rows. Letters: N rows, F columns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from market.jumps import JUMP_FACTOR, priced
from tickserve.config import Config
from tickserve.errors import ComponentError, GateRefusedError
from tickserve.store import sha256_bytes
from training import baselines, leakage
from training.examples import DataMeta, Examples, FloatArray, LabelledFold, evenly, prepare
from training.families import job_of
from training.job import Job
from training.metrics import effective_rows
from training.regimes import Limits
from training.walk import Say

if TYPE_CHECKING:
    from market.build import FeatureTable

# The job is probed, not the data: the first rows of a long table show it as well.
PROBE_ROWS = 40_000
COMPARED_ROWS = 2_000
SCALE = 1.5
Mask = npt.NDArray[np.bool_]
Prepare = Callable[["FeatureTable", DataMeta, Config], Examples]
MakeJob = Callable[[str, Examples, Config], Job]
Trace = dict[str, str]


def refuse_seeing_the_future(
    table: FeatureTable,
    meta: DataMeta,
    config: Config,
    family: str,
    say: Say,
    *,
    prepared: Prepare = prepare,
    make: MakeJob = job_of,
) -> dict[str, Any]:
    """Probe the first and the last fold of a family's training; gives the report's `probe`.

    `prepared` and `make` are the two halves of the training that is probed. Raises GateRefusedError naming what changed
    with the future, ComponentError where the fit does not even repeat itself, and the errors of training.
    """
    table, config = _first_rows(table), _without_checkpoints(config)
    examples = prepared(table, meta, config)
    refuse_shifted_labels(examples, meta.columns)
    numbers = sorted({0, len(examples.folds) - 1})
    for number in numbers:
        _probe_fold(table, examples, number, lambda changed: prepared(changed, meta, config), family, config, make)
        say(f"{family} fold {number + 1}: the same, bit for bit, where the future is {' or '.join(FUTURES)}")
    return {"folds": [number + 1 for number in numbers], "futures": list(FUTURES), "rows": len(table)}


def _probe_fold(
    table: FeatureTable,
    examples: Examples,
    number: int,
    again: Callable[[FeatureTable], Examples],
    family: str,
    config: Config,
    make: MakeJob,
) -> None:
    future = table.ts_ns > cut_of(examples, examples.folds[number])
    known = trace(examples, number, make(family, examples, config))
    for name, changed in FUTURES.items():
        other = again(changed(table, future, np.random.default_rng(config.seed)))
        differ = _differing(known, trace(other, number, make(family, other, config)))
        if differ:
            _refuse_unsteady(known, trace(examples, number, make(family, examples, config)), family)
            raise GateRefusedError(
                f"the future reaches the training of fold {number + 1}",
                field=family,
                expected="the same fold whatever comes after the last label it learns from",
                was=f"another {', another '.join(differ)} where the future is {name}",
                hint="look for what is fitted, chosen or stopped on rows outside the fold",
            )


def _differing(known: Trace, found: Trace) -> list[str]:
    """What of a fold is another; with other rows, labels or features nothing that follows from them is named."""
    differ = [what for what, digest in known.items() if found.get(what) != digest]
    given = [what for what in differ if what in GIVEN]
    return given or differ


def _refuse_unsteady(known: Trace, repeated: Trace, family: str) -> None:
    differ = _differing(known, repeated)
    if differ:
        raise ComponentError(
            "the fit does not repeat itself, so that a probe can say nothing",
            field=family,
            expected="the same bits from the same rows",
            was=f"another {', another '.join(differ)}",
            hint="train on the CPU, without trainer.cudnn_benchmark",
        )


def cut_of(examples: Examples, fold: LabelledFold) -> int:
    """The instant, in ns, when the last label of the fold's training and validation rows is known.

    Raises GateRefusedError when that is not before the fold's first test row: the purge is missing.
    """
    times = _times(examples)
    cut = int(times[examples.end[np.concatenate([fold.rows.train, fold.rows.validation])]].max())
    first = int(times[fold.rows.test].min())
    if cut >= first:
        raise GateRefusedError(
            f"labels of fold {fold.number} reach into its test rows",
            field="validation",
            expected="every label it learns from known before the first test row",
            was=f"one known {(cut - first) / 1e9:,.3f} s after it",
        )
    return cut


def _times(examples: Examples) -> npt.NDArray[np.int64]:
    if examples.ts_ns is None:
        raise ComponentError("rows without times cannot be probed", field="ts_ns")
    return examples.ts_ns


# What a fold is given; the rest follows from it.
GIVEN = ("choice of rows", "label", "feature value")


def trace(examples: Examples, number: int, job: Job) -> Trace:
    """Digests of all that a fold may know and makes: what it is given, what is fitted on it, what the model says."""
    fold = examples.folds[number]
    learned = np.concatenate([fold.rows.train, fold.rows.validation])
    losses: list[tuple[int, float]] = []
    job.watch = lambda step, loss: losses.append((step, loss))
    fit = job.fit(fold)
    judged = evenly(job.eligible(fold.rows.validation), COMPARED_ROWS)
    within = replace(fold, rows=replace(fold.rows, test=fold.rows.validation))
    said = baselines.predict_all(examples, within, examples.columns)
    return {
        "choice of rows": _digest(fold.rows.train, fold.rows.validation),
        "label": _digest(examples.ret[learned], examples.end[learned]),
        "feature value": _digest(examples.features[learned]),
        "flat band": repr(fold.threshold),
        "regime": repr(Limits.of(examples, fold)),
        "baseline": _digest(*(array for each in said.values() for array in (each.classes, each.score))),
        "choice of columns": repr(None if fit.columns is None else fit.columns.tolist()),
        "validation loss": repr(losses),
        "model file": _saved(job, fit),
        "prediction": _digest(job.predict(fit, judged)),
    }


def _saved(job: Job, fit: Any) -> str:
    with tempfile.TemporaryDirectory(prefix="tickserve-probe-") as folder:
        path = Path(folder) / job.model_file
        job.save(fit, path)
        return sha256_bytes(path.read_bytes())


def _digest(*arrays: npt.NDArray[Any]) -> str:
    return sha256_bytes(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))


def shuffled(table: FeatureTable, future: Mask, rng: np.random.Generator) -> FeatureTable:
    """The rows of the future, a mask [N], in another order, and the moves of the price in another one."""
    told = np.flatnonzero(future & np.isfinite(table.features).any(axis=1))
    features = table.features.copy()
    features[told] = table.features[rng.permutation(told)]
    return replace(table, features=features, mid=_moved(table.mid, future, rng.permutation))


def recast(table: FeatureTable, future: Mask, rng: np.random.Generator) -> FeatureTable:
    """A future whose columns trade places and scales, and whose price goes the other way, in smaller steps."""
    features, spread = table.features.copy(), table.half_spread.copy()
    columns = features.shape[1]
    features[future] = np.roll(table.features[future], columns // 2 + 1, axis=1) * np.float32(SCALE)
    spread[future] *= SCALE
    return replace(
        table, features=features, half_spread=spread, mid=_moved(table.mid, future, lambda move: -0.5 * move)
    )


FUTURES = {"shuffled": shuffled, "recast": recast}


def _moved(mid: FloatArray, future: Mask, change: Callable[[FloatArray], FloatArray]) -> FloatArray:
    """The prices [N] with other moves in the future. Jumps stay where they are: no label spans one."""
    rows = np.flatnonzero(priced(mid))
    moves = np.diff(np.log(mid[rows]), prepend=np.log(mid[rows[0]]))
    free = future[rows] & (np.abs(moves) < np.log(JUMP_FACTOR) / 2)
    moves[free] = change(moves[free])
    made, later = mid.copy(), future[rows]
    made[rows[later]] = mid[rows[0]] * np.exp(np.cumsum(moves))[later]
    return made


def refuse_shifted_labels(examples: Examples, columns: Sequence[str]) -> None:
    """Raise GateRefusedError naming a column that is the label of the row before or after, or nearly so.

    The label of the row before is made of a move that is known and one that is not: a column may know the first one,
    and is judged by what it shares with the label beside that. The bound is that of `training.leakage`.
    """
    train = examples.published.rows.train
    if effective_rows(train, examples.end[train]) < leakage.MIN_EFFECTIVE_ROWS:
        return
    bound, rows = leakage.MAX_COLUMN[examples.horizon_unit], evenly(train, leakage.PROBE_ROWS)
    for index, column in enumerate(columns):
        values = examples.features[rows, index].astype(np.float64)
        for shift, found in _shares(values, examples, rows).items():
            if found > bound:
                raise GateRefusedError(
                    "the label of another row leaks into a feature",
                    field=column,
                    expected=f"a correlation with the label of the row {shift} of at most {bound}",
                    was=f"{found:.3f}",
                    hint="this column is shifted: look at how it is computed",
                )


def _shares(values: FloatArray, examples: Examples, rows: npt.NDArray[np.int64]) -> dict[str, float]:
    """How much a column [n] shares with the label of the row before and of the one after: 0 to 1."""
    found = {}
    for shift, other in (("before", rows - 1), ("after", rows + 1)):
        there = np.clip(other, 0, len(examples.ret) - 1)
        alike = (there == other) & (examples.session[there] == examples.session[rows])
        label = np.where(alike, examples.ret[there], np.nan)
        # What of the label of the row before is known at the row: all of it where the horizon is one row.
        seen = examples.mid[rows] / examples.mid[there] - 1 if shift == "before" else np.zeros(len(rows))
        both = np.isfinite(values) & np.isfinite(label) & np.isfinite(seen)
        varies = both.sum() >= leakage.MIN_FINITE_ROWS and min(np.ptp(values[both]), np.ptp(label[both])) > 0
        if varies:
            found[shift] = abs(leakage.partial_rank_correlation(values[both], label[both], seen[both]))
    return found


def _first_rows(table: FeatureTable) -> FeatureTable:
    """At most the first `PROBE_ROWS` rows, in memory."""
    names = ("ts_ns", "features", "mid", "half_spread", "session")
    kept: dict[str, Any] = {name: np.array(getattr(table, name)[:PROBE_ROWS]) for name in names}
    return replace(table, **kept)


def _without_checkpoints(config: Config) -> Config:
    """No fit of the probe may go on from, or write over, a checkpoint of the training."""
    return config.model_copy(
        update={"trainer": config.trainer.model_copy(update={"checkpoint_steps": 0, "resume": False})}
    )

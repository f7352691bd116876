"""One model for all symbols: their rows in one table, cut into folds by time, and judged symbol by symbol beside.

The rows lie symbol by symbol, so that no label, window or trailing return meets another symbol's; the folds are cut at
the same instants for all (`training.examples.prepare`), so that no symbol's future is in another's past. Letters: N
rows of all symbols, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from market.build import FeatureSet, FeatureTable
from tickserve.errors import UsageError
from training.cells import MODEL
from training.examples import DataMeta
from training.metrics import Outcome, Prediction, evaluate
from training.train import meta_of
from training.walk import Judged, Run, cells_of, pooled_of


def pooled_meta(name: str, sets: Mapping[str, FeatureSet]) -> DataMeta:
    """What the pooled rows are made of; every source file's digest is named `symbol/file`.

    Raises UsageError unless all symbols share a feature spec and a stride.
    """
    _refuse_unlike({symbol: each.spec.digest for symbol, each in sets.items()}, "feature spec")
    _refuse_unlike({symbol: each.meta["stride"] for symbol, each in sets.items()}, "stride", "set features.max_rows")
    files = {
        f"{symbol}/{file}": digest for symbol, each in sets.items() for file, digest in each.source_digests.items()
    }
    simulated = any(each.simulated for each in sets.values())
    return replace(meta_of(next(iter(sets.values()))), symbol=name, data=files, simulated=simulated)


def _refuse_unlike(found: Mapping[str, Any], what: str, hint: str = "pool those that are alike") -> None:
    usual = max(found.values(), key=list(found.values()).count)
    for symbol, value in found.items():
        if value != usual:
            raise UsageError(
                f"the symbols' rows cannot be pooled: another {what} than the others",
                field=symbol,
                expected=str(usual),
                was=str(value),
                hint=f"{hint}, or set universe.pooled = false",
            )


def pooled_table(sets: Mapping[str, FeatureSet]) -> tuple[FeatureTable, dict[str, slice]]:
    """All rows in one table, symbol by symbol, with sessions of their own, and the rows of each symbol.

    One symbol is read at a time. Raises UsageError for bars of different length.
    """
    rows = sum(each.rows for each in sets.values())
    first = next(iter(sets.values()))
    pooled = FeatureTable(
        ts_ns=np.empty(rows, np.int64),
        features=np.empty((rows, len(first.spec.columns)), np.float32),
        mid=np.empty(rows, np.float64),
        half_spread=np.empty(rows, np.float64),
        session=np.empty(rows, np.int32),
        stride=first.meta["stride"],
        events_read=sum(each.meta["events_read"] for each in sets.values()),
        quality={},
    )
    parts, steps, start, sessions = {}, {}, 0, 0
    for symbol, each in sets.items():
        table, parts[symbol] = each.load(), slice(start, start + each.rows)
        for name in ("ts_ns", "features", "mid", "half_spread"):
            getattr(pooled, name)[parts[symbol]] = getattr(table, name)
        pooled.session[parts[symbol]] = table.session + sessions
        start, sessions = start + each.rows, sessions + int(table.session[-1]) + 1
        steps[symbol] = _step_s(table) if each.kind == "bars" else 0.0
    _refuse_unlike(steps, "bar length (seconds)")
    return pooled, parts


def _step_s(table: FeatureTable) -> float:
    """The usual time between rows, in seconds."""
    return float(np.median(np.diff(table.ts_ns))) / 1e9 if len(table) > 1 else 0.0


class PooledMetrics:
    """Judges a pooled model on each symbol's own test rows, fold by fold; `{"symbols": {symbol: pooled metrics}}`."""

    def __init__(self, parts: Mapping[str, slice]) -> None:
        self._parts = parts

    def __call__(self, run: Run, judged: Sequence[Judged]) -> dict[str, Any]:
        """What a report of the pooled model gets besides."""
        return {"symbols": {symbol: self._of(part, run, judged) for symbol, part in self._parts.items()}}

    def _of(self, part: slice, run: Run, judged: Sequence[Judged]) -> dict[str, Any] | None:
        found, cells, fee_bps = [], [], run.config.costs.fee_bps
        for fold, item in zip(run.examples.folds, judged, strict=True):
            rows = run.job.eligible(fold.rows.test)
            rows = rows[(rows >= part.start) & (rows < part.stop)]
            if len(rows):
                said = Prediction.of(run.job.predict(item.fit, rows))
                found.append(evaluate(said, rows, run.examples, fold.threshold, fee_bps))
                outcome = Outcome.of(said, rows, run.examples, fold.threshold, fee_bps)
                cells.append(cells_of(run.examples, rows, {MODEL: said}, {MODEL: outcome}))
        return pooled_of(MODEL, found, cells, run.config) if found else None

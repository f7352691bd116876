"""From a feature table to labelled examples cut into folds: what every job learns from and is judged on.

Labels, folds, the flat band and what a trade costs are fixed here once, so that every family and every baseline answers
the same question on the same rows. Letters: N rows, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from market import labels
from market.walkforward import Fold, purged_walk_forward
from tickserve.config import Config
from tickserve.errors import InsufficientDataError
from tickserve.events import Kind
from tickserve.features.spec import FeatureSpec
from tickserve.manifest import Horizon, StageFigures
from tickserve.store import canonical_json, sha256_bytes

if TYPE_CHECKING:
    from market.build import FeatureTable

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]
BPS = 1e4
CHUNK_ROWS = 16_384


@dataclass(frozen=True)
class DataMeta:
    """What the table is made of: market, feature spec and the digests of the source files.

    `definition` is the whole spec (`FeatureSpec.to_json`); None for a table that was made otherwise. `stages` is what
    was measured while the table was made, by stage.
    """

    symbol: str
    kind: Kind
    levels: int
    spec: str
    feature_digest: str
    columns: tuple[str, ...]
    data: Mapping[str, str]
    simulated: bool = False
    definition: Mapping[str, Any] | None = None
    stages: Mapping[str, StageFigures] = field(default_factory=dict)

    def narrowed(self, keep: IntArray) -> DataMeta:
        """The same data with only the columns at the positions `keep`, under a spec and a digest of their own."""
        columns = tuple(self.columns[index] for index in keep)
        if self.definition is None:
            digest = sha256_bytes(canonical_json({"of": self.feature_digest, "columns": columns}))
            return replace(self, spec=f"{self.spec}-top{len(columns)}", feature_digest=digest, columns=columns)
        spec = FeatureSpec.from_json(self.definition).narrowed(columns)
        return replace(
            self, spec=spec.name, feature_digest=spec.digest, columns=spec.columns, definition=spec.to_json()
        )

    @property
    def tag(self) -> str:
        """`symbol-l5` for a book of five levels, `symbol-bars` for bars: the start of its models' names."""
        return f"{self.symbol}-{'bars' if self.kind == 'bars' else f'l{self.levels}'}"


@dataclass(frozen=True)
class LabelledFold:
    """One fold as table row indices, with the flat band fitted on its training rows only."""

    number: int
    rows: Fold
    threshold: float


@dataclass(frozen=True)
class Examples:
    """Every table row [N] with its label, and the folds over the rows that have one.

    `ret` is the forward return (NaN without label), `end` the row where it is known (-1 without), `trailing` the last
    move over the same horizon, `cost_bps` the half-spread crossed at that row; `assumed_spreads` is the share of rows
    that have no quote, whose half-spread is an assumption of the configuration. `mid` is the price, `columns` are the F
    names of the features. Rows of several symbols lie symbol by symbol, so that no window or label meets another's;
    `order` [N] is then each row's place in time. `ts_ns` [N] are their times.
    """

    features: Rows
    columns: tuple[str, ...]
    session: npt.NDArray[np.int32]
    mid: FloatArray
    ret: FloatArray
    end: IntArray
    trailing: FloatArray
    cost_bps: FloatArray
    assumed_spreads: float
    horizon_unit: Literal["ms", "rows"]
    horizon_value: int
    horizon_median_ms: float
    stride: int
    folds: tuple[LabelledFold, ...]
    order: IntArray | None = None
    ts_ns: IntArray | None = None

    def place(self, rows: IntArray) -> IntArray:
        """Where `rows` stand in time among the rows of all symbols; for one symbol the rows themselves."""
        return rows if self.order is None else self.order[rows]

    @property
    def published(self) -> LabelledFold:
        """The last fold: its model is the one published, so its out-of-sample numbers are about that very model."""
        return self.folds[-1]

    @property
    def horizon(self) -> Horizon:
        """The manifest's record, with the flat band of the published fold."""
        return Horizon(unit=self.horizon_unit, value=self.horizon_value, threshold=self.published.threshold)

    def classes(self, rows: IntArray, threshold: float) -> IntArray:
        """Class of each of `rows` under a fold's flat band."""
        return labels.to_classes(self.ret[rows], threshold)


def prepare(table: FeatureTable, meta: DataMeta, config: Config, parts: Sequence[slice] = ()) -> Examples:
    """Label the table and cut it into folds, by time.

    `parts` are the rows of each symbol where there are several: labels are made inside each, the folds are cut at the
    same instants for all, and no two symbols share a session.
    Raises InsufficientDataError: nothing finite, no labels, too few rows for the folds, or one class only.
    """
    features = _finite_or_nan(table.features)
    told = np.concatenate([np.isfinite(part).any(axis=1) for part in chunks(features)])
    if not told.any() or not np.isfinite(table.mid).any():
        raise InsufficientDataError("no finite value", field="features" if np.isfinite(table.mid).any() else "mid")
    unit, step, value = _horizon(table, meta, config)
    ret, end, trailing = _labelled(table, unit, step, parts or (slice(0, len(table)),))
    usable = np.flatnonzero((end >= 0) & told)
    if not usable.size:
        raise InsufficientDataError("no row has a label inside its session", field="labels", was=f"{len(end)} rows")
    span_ns = float(np.median(table.ts_ns[end[usable]] - table.ts_ns[usable]))
    return Examples(
        features=features,
        columns=meta.columns,
        session=table.session,
        mid=table.mid,
        ret=ret,
        end=end,
        trailing=trailing,
        cost_bps=_cost_bps(table, config),
        assumed_spreads=float((~np.isfinite(table.half_spread)).mean()),
        horizon_unit=unit,
        horizon_value=value,
        horizon_median_ms=span_ns / labels.NS_PER_MS,
        stride=table.stride,
        folds=_folds(table, ret, end, usable, round(span_ns * config.validation.embargo_horizons), config),
        order=_places(table.ts_ns) if parts else None,
        ts_ns=table.ts_ns,
    )


def chunks(features: Rows, rows: int = CHUNK_ROWS) -> Iterator[Rows]:
    """`features` [N, F], which may be mapped from a file, in views of at most `rows` rows; one at least."""
    for start in range(0, max(len(features), 1), rows):
        yield features[start : start + rows]


def _places(ts_ns: IntArray) -> IntArray:
    """Each row's place in time [N]; rows of one instant in table order."""
    place = np.empty(len(ts_ns), np.int64)
    place[np.argsort(ts_ns, kind="stable")] = np.arange(len(ts_ns))
    return place


def _finite_or_nan(features: Rows) -> Rows:
    """Infinite becomes "missing": the client refuses it, so no model may learn from it."""
    if not any(np.isinf(part).any() for part in chunks(features)):
        return features
    return np.where(np.isinf(features), np.float32(np.nan), features)


def _horizon(table: FeatureTable, meta: DataMeta, config: Config) -> tuple[Literal["ms", "rows"], int, int]:
    """Unit, length in table steps, and length in the unit published.

    A bar table that kept every k-th bar can only look ahead in multiples of k bars; what is published is the multiple.
    """
    if meta.kind == "book":
        return "ms", config.labels.book_horizon_ms, config.labels.book_horizon_ms
    step = max(1, round(config.labels.bars_horizon_rows / table.stride))
    return "rows", step, step * table.stride


def _labelled(
    table: FeatureTable, unit: str, step: int, parts: Sequence[slice]
) -> tuple[FloatArray, IntArray, FloatArray]:
    """Forward return, the row where it is known, and the last move, each [N], made inside each part alone."""
    ret, end, trailing = np.full(len(table), np.nan), np.full(len(table), labels.UNKNOWN), np.zeros(len(table))
    for part in parts:
        ts_ns, mid, session = table.ts_ns[part], table.mid[part], table.session[part]
        if unit == "ms":
            ret[part], ends = labels.forward_returns_ms(ts_ns, mid, step, session=session)
            trailing[part] = labels.trailing_returns_ms(ts_ns, mid, step, session=session)
        else:
            ret[part], ends = labels.forward_returns_rows(mid, step, session=session)
            trailing[part] = labels.trailing_returns_rows(mid, step, session=session)
        end[part] = np.where(ends >= 0, ends + part.start, labels.UNKNOWN)
    return ret, end, trailing


def _cost_bps(table: FeatureTable, config: Config) -> FloatArray:
    quoted = np.isfinite(table.half_spread)
    # A crossed book is not a rebate.
    return np.where(quoted, np.maximum(table.half_spread, 0.0) * BPS, config.costs.bar_half_spread_bps)


def _folds(
    table: FeatureTable, ret: FloatArray, end: IntArray, usable: IntArray, embargo_ns: int, config: Config
) -> tuple[LabelledFold, ...]:
    rules = config.validation
    usable = usable[np.argsort(table.ts_ns[usable], kind="stable")]
    cut = purged_walk_forward(
        table.ts_ns[usable], table.ts_ns[end[usable]], rules.folds, embargo_ns, rules.min_train_rows
    )
    made = []
    for number, fold in enumerate(cut, start=1):
        rows = Fold(*(np.sort(usable[side]) for side in (fold.train, fold.validation, fold.test)))
        threshold = labels.flat_threshold(ret[rows.train], config.labels.flat_quantile)
        _refuse_one_class(labels.to_classes(ret[rows.train], threshold), number)
        made.append(LabelledFold(number, rows, threshold))
    return tuple(made)


def _refuse_one_class(classes: IntArray, fold: int) -> None:
    present = np.unique(classes)
    if len(present) < 2:
        raise InsufficientDataError(
            f"one class only among the training rows of fold {fold}",
            field="labels",
            expected="at least 2 of down, flat, up",
            was=("down", "flat", "up")[present[0]],
            hint="a price that never moves teaches nothing: use a longer horizon or another recording",
        )


def evenly(rows: IntArray, limit: int) -> IntArray:
    """At most `limit` of `rows`, evenly spaced from first to last; all of them for 0."""
    if not limit or len(rows) <= limit:
        return rows
    chosen: IntArray = rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]
    return chosen

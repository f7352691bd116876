"""A feature spec: which features, over which rows, when a session ends, how long it warms up, as one digest.

The spec is data. `engine.py` compiles it to state machines; the digest travels with feature sets, bundles and signals,
so that a model is never fed columns it was not trained on.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from tickserve.errors import UsageError
from tickserve.events import Kind
from tickserve.features.catalog import KINDS, Number, check_parameter
from tickserve.store import canonical_json, sha256_bytes

# Part of every spec's digest: raise it when a formula of the engine changes.
ENGINE_VERSION: Final = 2
MOST_LEVELS: Final = 20
_KEYS: Final = ("name", "kind", "levels", "features", "session_gap_ns", "warmup_events")
_HOUR_NS: Final = 3_600 * 10**9
_DAY_NS: Final = 24 * _HOUR_NS


def _label(name: str, value: Number) -> str:
    """`tau_s=0.1` as `100ms`, `horizon_s=5` as `5s`, a count as itself."""
    if not name.endswith("_s"):
        return str(value)
    milliseconds = value * 1_000
    if value < 1 and milliseconds == int(milliseconds):
        return f"{int(milliseconds)}ms"
    return f"{int(value)}s" if value == int(value) else f"{value!r}s"


@dataclass(frozen=True)
class Feature:
    """One column: a kind of the catalogue and its parameters in the catalogue's order."""

    kind: str
    params: tuple[tuple[str, Number], ...] = ()

    @property
    def name(self) -> str:
        """The column name, unique in a spec: `mid_return_500ms`, `level_imbalance_1`."""
        return "_".join([self.kind, *(_label(name, value) for name, value in self.params)])

    @classmethod
    def of(cls, kind: str, **params: Number) -> Feature:
        """`Feature.of("mid_return", horizon_s=0.5)`."""
        return cls(kind, tuple(params.items()))


@dataclass(frozen=True)
class FeatureSpec:
    """Features over rows of one kind.

    A gap between events longer than `session_gap_ns` starts a new session: all state is reset. The first
    `warmup_events` events of a session are computed but not to be used. Raises UsageError for an unknown kind or
    parameter, a value out of range, or a repeated column.
    """

    name: str
    kind: Kind
    levels: int
    features: tuple[Feature, ...]
    session_gap_ns: int
    warmup_events: int

    def __post_init__(self) -> None:
        _check_spec(self)
        for feature in self.features:
            _check_feature(feature, self)
        _check_columns(self)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Column names in order, F of them."""
        return tuple(feature.name for feature in self.features)

    @cached_property
    def digest(self) -> str:
        """`sha256:...` over the spec and the engine's version."""
        return sha256_bytes(canonical_json({"engine": ENGINE_VERSION, "spec": self.to_json()}))

    def narrowed(self, columns: Collection[str]) -> FeatureSpec:
        """The spec of these of its columns alone, in its own order: the same rows and values, another digest.

        Each feature is a state machine of its own, so none is missed by another. Raises UsageError for a column that
        is not there.
        """
        unknown = sorted(set(columns) - set(self.columns))
        if unknown:
            raise UsageError("unknown column", field="columns", expected=", ".join(self.columns), was=unknown[0][:80])
        features = tuple(feature for feature in self.features if feature.name in set(columns))
        return replace(self, name=f"{self.name}-top{len(features)}", features=features)

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values; `from_json` reads it back."""
        return {
            "name": self.name,
            "kind": self.kind,
            "levels": self.levels,
            "features": [{"kind": feature.kind, "params": dict(feature.params)} for feature in self.features],
            "session_gap_ns": self.session_gap_ns,
            "warmup_events": self.warmup_events,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | str) -> FeatureSpec:
        """Read `to_json`'s value, or its text. Raises UsageError naming the key that is wrong."""
        tree = _parsed(value)
        if set(tree) != set(_KEYS):
            raise UsageError("wrong keys", field="spec", expected=", ".join(_KEYS), was=", ".join(sorted(tree))[:200])
        features = tuple(_feature_from(item) for item in _list(tree["features"]))
        return cls(**{**tree, "features": features})


def _parsed(value: Mapping[str, Any] | str) -> dict[str, Any]:
    try:
        tree = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise UsageError(f"not JSON: {error}", field="spec") from error
    if not isinstance(tree, Mapping):
        raise UsageError("wrong type", field="spec", expected="an object", was=type(tree).__name__)
    return dict(tree)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError("wrong type", field="spec.features", expected="a list", was=type(value).__name__)
    return value


def _feature_from(item: Any) -> Feature:
    if not isinstance(item, Mapping) or set(item) != {"kind", "params"} or not isinstance(item["params"], Mapping):
        raise UsageError("wrong feature", field="spec.features", expected='{"kind": ..., "params": {...}}')
    kind, params = item["kind"], item["params"]
    if kind not in KINDS or set(params) != set(KINDS[kind].parameters):
        return Feature(str(kind), tuple(params.items()))  # refused by the spec's own check, with its reason
    return Feature(kind, tuple((name, params[name]) for name in KINDS[kind].parameters))


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError("out of range", field=name, expected=f"an integer from {low} to {high}", was=repr(value)[:40])


def _check_spec(spec: FeatureSpec) -> None:
    if spec.kind not in ("book", "bars"):
        raise UsageError("unknown rows", field="spec.kind", expected="book or bars", was=repr(spec.kind)[:40])
    _check_integer("spec.levels", spec.levels, 0 if spec.kind == "bars" else 1, 1_000)
    _check_integer("spec.session_gap_ns", spec.session_gap_ns, 1, 2**62)
    _check_integer("spec.warmup_events", spec.warmup_events, 0, 10**9)
    if not spec.features:
        raise UsageError("no features", field="spec.features", expected="one at least", was="0")


def _check_columns(spec: FeatureSpec) -> None:
    names = [feature.name for feature in spec.features]
    if len(set(names)) != len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise UsageError("a column is there twice", field="spec.features", expected="unique names", was=repeated)


def _check_feature(feature: Feature, spec: FeatureSpec) -> None:
    kind = KINDS.get(feature.kind)
    if kind is None or kind.rows != spec.kind:
        known = sorted(name for name, entry in KINDS.items() if entry.rows == spec.kind)
        raise UsageError("unknown kind", field="spec.features", expected=" or ".join(known), was=feature.kind[:80])
    given = tuple(name for name, _ in feature.params)
    if given != kind.parameters:
        raise UsageError("wrong parameters", field=feature.kind, expected=str(kind.parameters), was=str(given)[:80])
    for name, value in feature.params:
        check_parameter(feature.kind, name, value, spec.levels)
    values = dict(feature.params)
    for low, high in (("fast", "slow"), ("short", "long")):
        if low in values and values[low] >= values[high]:
            raise UsageError("out of order", field=f"{feature.kind}.{low}", expected=f"less than {high}")


def default_book_spec(levels: int) -> FeatureSpec:
    """The default columns for an order book of `levels` levels (a quote feed without depth is levels=1).

    Formulas and sources are in `book_updates.py`. A gap of one hour resets; 200 events of warm-up fill the longest
    window counted in events, while windows in time start from the first event of the session.
    """
    deep = levels > 1
    features = [Feature.of("microprice_deviation"), Feature.of("relative_spread")]
    features += [Feature.of("level_imbalance", level=level) for level in range(1, levels + 1)]
    features += [Feature.of("depth_imbalance", levels=levels), Feature.of("depth_weighted_deviation", levels=levels)][
        : 2 * deep
    ]
    features += [Feature.of("order_flow_imbalance", tau_s=tau) for tau in (0.1, 1.0, 10.0)]
    features += [Feature.of("order_flow_imbalance_events", count=count) for count in (20, 200)]
    features += [Feature.of("signed_trade_flow", tau_s=tau) for tau in (1.0, 10.0, 60.0)]
    features += [Feature.of("realised_volatility", tau_s=tau) for tau in (1.0, 10.0, 60.0)]
    features += [Feature.of("mid_return", horizon_s=horizon) for horizon in (0.1, 0.5, 1.0, 5.0, 30.0)]
    features += [Feature.of("mid_return_events", count=count) for count in (10, 50, 200)]
    features += [Feature.of(kind, tau_s=tau) for kind in ("event_rate", "trade_rate") for tau in (1.0, 10.0)]
    features += [Feature.of(f"{kind}_deviation", tau_s=10.0) for kind in ("spread", "depth", "mid")]
    plain = ("trade_deviation", "time_since_trade", "time_since_event", "time_of_day_sin", "time_of_day_cos")
    features += [Feature.of(kind) for kind in plain]
    return FeatureSpec(f"book-l{levels}", "book", levels, tuple(features), _HOUR_NS, 200)


def default_bars_spec() -> FeatureSpec:
    """The default columns for bars of any length. Formulas and sources are in `bar_updates.py`.

    A gap of 30 days resets; 60 bars of warm-up fill the longest window.
    """
    features = [Feature.of("bar_return", count=count) for count in (1, 5, 15, 60)]
    features += [Feature.of("bar_volatility", count=20), Feature.of("average_true_range", count=14)]
    features += [Feature.of("relative_strength_index", count=14), Feature.of("macd", fast=12, slow=26)]
    features += [Feature.of("macd_histogram", fast=12, slow=26, signal=9), Feature.of("bollinger_position", count=20)]
    features += [Feature.of("stochastic_k", count=14), Feature.of("volume_zscore", count=60)]
    features += [Feature.of("vwap_deviation", count=60), Feature.of("obv_slope", count=20)]
    ranges = ("parkinson_volatility", "garman_klass_volatility", "rogers_satchell_volatility")
    features += [Feature.of(kind, count=20) for kind in ranges]
    plain = ("close_location", "bar_range", "opening_gap", "candle_body", "streak", "time_since_bar")
    features += [Feature.of(kind) for kind in plain]
    features += [Feature.of(kind, count=60) for kind in ("return_autocorrelation", "return_skewness", "drawdown")]
    features += [Feature.of("amihud_illiquidity", count=20), Feature.of("efficiency_ratio", count=20)]
    features += [Feature.of("volatility_ratio", short=10, long=60)]
    features += [Feature.of("bar_time_of_day_sin"), Feature.of("bar_time_of_day_cos")]
    return FeatureSpec("bars", "bars", 0, tuple(features), 30 * _DAY_NS, 60)


def default_spec(kind: Kind, levels: int) -> FeatureSpec:
    """The default spec for rows of this kind (`levels` is ignored for bars)."""
    return default_book_spec(levels) if kind == "book" else default_bars_spec()


def default_specs() -> tuple[FeatureSpec, ...]:
    """Every default spec: of bars, then of books with 1 to `MOST_LEVELS` levels. Each has a digest of its own."""
    return default_bars_spec(), *(default_book_spec(levels) for levels in range(1, MOST_LEVELS + 1))

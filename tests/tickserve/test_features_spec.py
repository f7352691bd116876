"""Feature specs: data that round-trips, digests that tell specs apart, and refusals that name the field."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tickserve.errors import UsageError
from tickserve.features.catalog import BAR_KINDS, BOOK_KINDS, KINDS
from tickserve.features.spec import Feature, FeatureSpec, default_bars_spec, default_book_spec, default_spec


@given(st.integers(1, 20))
def test_default_book_spec_holds_for_any_depth_and_round_trips(levels: int) -> None:
    spec = default_book_spec(levels)
    assert FeatureSpec.from_json(json.dumps(spec.to_json())) == spec
    assert FeatureSpec.from_json(json.loads(json.dumps(spec.to_json(), sort_keys=True))).digest == spec.digest
    assert sum(column.startswith("level_imbalance") for column in spec.columns) == levels


def test_default_specs_use_many_distinct_formulas() -> None:
    assert 30 <= len(default_book_spec(5).columns) <= 45
    assert {feature.kind for feature in default_book_spec(5).features} == set(BOOK_KINDS)
    assert {feature.kind for feature in default_bars_spec().features} == set(BAR_KINDS)
    assert len(BAR_KINDS) >= 20
    assert default_spec("bars", 5) == default_bars_spec()


def test_kind_ids_are_unique() -> None:
    assert len({kind.id for kind in KINDS.values()}) == len(KINDS)


def test_digest_changes_with_everything_in_the_spec() -> None:
    base = default_book_spec(2).to_json()
    changes = [
        {"name": "other"},
        {"session_gap_ns": 1},
        {"warmup_events": 0},
        {"levels": 3},
        {"features": base["features"][::-1]},
        {"features": base["features"][:-1]},
    ]
    digests = {FeatureSpec.from_json(base | change).digest for change in [{}, *changes]}
    assert len(digests) == len(changes) + 1


def test_column_names_say_the_window() -> None:
    names = [Feature.of("mid_return", horizon_s=value).name for value in (0.1, 0.25, 1, 5.0, 1.5)]
    assert names == [f"mid_return_{text}" for text in ("100ms", "250ms", "1s", "5s", "1.5s")]


@pytest.mark.parametrize(
    ("feature", "named"),
    [
        (Feature.of("mid_retrun", horizon_s=1.0), "mid_retrun"),
        (Feature.of("bar_return", count=5), "bar_return"),
        (Feature.of("mid_return"), "mid_return"),
        (Feature.of("mid_return", tau_s=1.0), "mid_return"),
        (Feature.of("mid_return", horizon_s=0.0), "horizon_s"),
        (Feature.of("mid_return", horizon_s=float("nan")), "horizon_s"),
        (Feature.of("mid_return", horizon_s=1e9), "horizon_s"),
        (Feature.of("mid_return_events", count=0), "count"),
        (Feature.of("mid_return_events", count=1.5), "count"),
        (Feature.of("mid_return_events", count=True), "count"),
        (Feature.of("level_imbalance", level=3), "level"),
        (Feature("event_rate", (("tau_s", "1"),)), "tau_s"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_feature_is_refused_by_name(feature: Feature, named: str) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        FeatureSpec("x", "book", 2, (feature,), 1, 0)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "trades"},
        {"levels": 0},
        {"session_gap_ns": 0},
        {"warmup_events": -1},
        {"warmup_events": True},
        {"features": []},
        {"features": {}},
        {"features": [1]},
        {"features": [{"kind": "relative_spread", "params": {}}] * 2},
        {"extra": 1},
    ],
)
def test_a_wrong_spec_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        FeatureSpec.from_json(default_book_spec(1).to_json() | change)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_spec_that_is_not_an_object_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="spec"):
        FeatureSpec.from_json(text)


def test_fast_windows_are_shorter_than_slow_ones() -> None:
    with pytest.raises(UsageError, match=r"macd\.fast"):
        FeatureSpec("x", "bars", 0, (Feature.of("macd", fast=26, slow=12),), 1, 0)


def test_reading_a_spec_loads_no_compiler() -> None:
    code = "import sys; from tickserve.features.spec import default_spec; default_spec('book', 5).digest; "
    code += "assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

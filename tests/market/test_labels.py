"""Labels look ahead by exactly their horizon, stay inside their session, and say so where they cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from market import labels
from market.readers import open_source
from tickserve.errors import InsufficientDataError, SchemaError, UsageError
from tickserve.events import CLOSE

MS = 1_000_000
Market = tuple[np.ndarray, np.ndarray, np.ndarray]


@st.composite
def markets(draw: st.DrawFn) -> Market:
    n = draw(st.integers(2, 60))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    ts = np.cumsum(rng.integers(0, 5, n)).astype(np.int64) * MS
    mid = 100.0 + rng.normal(0, 1, n)
    mid[rng.random(n) < 0.05] = np.nan
    session = np.cumsum(rng.random(n) < 0.1).astype(np.int32)
    return ts, mid, session


@given(markets(), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_ms_label_is_the_first_row_at_or_after_the_horizon_in_the_session(market: Market, horizon: int) -> None:
    ts, mid, session = market
    ret, end = labels.forward_returns_ms(ts, mid, horizon, session=session)
    for i in range(len(ts)):
        later = [j for j in range(len(ts)) if ts[j] >= ts[i] + horizon * MS]
        j = later[0] if later else None
        known = j is not None and session[j] == session[i] and np.isfinite(mid[i]) and np.isfinite(mid[j])
        assert end[i] == (j if known else labels.UNKNOWN)
        if known:
            assert j > i
            assert ret[i] == mid[j] / mid[i] - 1.0
        else:
            assert np.isnan(ret[i])


@given(markets(), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_labels_never_use_rows_before_their_own(market: Market, rows: int, data: st.DataObject) -> None:
    ts, mid, session = market
    cut = data.draw(st.integers(0, len(ts) - 1))
    moved = mid.copy()
    moved[:cut] *= 3.0
    for before, after in (
        (
            labels.forward_returns_rows(mid, rows, session=session),
            labels.forward_returns_rows(moved, rows, session=session),
        ),
        (
            labels.forward_returns_ms(ts, mid, rows, session=session),
            labels.forward_returns_ms(ts, moved, rows, session=session),
        ),
    ):
        np.testing.assert_array_equal(before[0][cut:], after[0][cut:])
        known = before[1] != labels.UNKNOWN
        assert (before[1][known] > np.flatnonzero(known)).all()
        assert (session[before[1][known]] == session[known]).all()


@given(markets(), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_trailing_returns_never_look_ahead(market: Market, rows: int, data: st.DataObject) -> None:
    ts, mid, session = market
    cut = data.draw(st.integers(0, len(ts) - 1))
    moved = mid.copy()
    moved[cut + 1 :] *= 3.0
    for before, after in (
        (
            labels.trailing_returns_rows(mid, rows, session=session),
            labels.trailing_returns_rows(moved, rows, session=session),
        ),
        (
            labels.trailing_returns_ms(ts, mid, rows, session=session),
            labels.trailing_returns_ms(ts, moved, rows, session=session),
        ),
    ):
        np.testing.assert_array_equal(before[: cut + 1], after[: cut + 1])
        assert np.isfinite(before).all()


def test_trailing_is_the_forward_return_seen_from_its_end() -> None:
    mid = 100.0 + np.random.default_rng(1).normal(0, 1, 50)
    ret, end = labels.forward_returns_rows(mid, 4)
    known = end != labels.UNKNOWN
    np.testing.assert_array_equal(labels.trailing_returns_rows(mid, 4)[end[known]], ret[known])


def test_threshold_calls_the_asked_share_flat_and_classes_split_on_it() -> None:
    ret = np.linspace(-0.003, 0.003, 301)
    threshold = labels.flat_threshold(ret, 1 / 3)
    classes = labels.to_classes(ret, threshold)
    assert threshold == pytest.approx(0.001, rel=0.02)
    assert np.mean(classes == labels.FLAT) == pytest.approx(1 / 3, abs=0.02)
    np.testing.assert_array_equal(labels.to_classes(np.array([-0.2, -0.1, 0.0, 0.1, 0.2]), 0.1), [0, 1, 1, 1, 2])


def test_bad_input_is_a_typed_error() -> None:
    mid = np.array([1.0, 2.0, 3.0])
    with pytest.raises(SchemaError, match="ts_ns"):
        labels.forward_returns_ms(np.array([3, 2, 1]), mid, 1)
    with pytest.raises(UsageError, match="rows"):
        labels.forward_returns_rows(mid, 0)
    with pytest.raises(SchemaError, match="NaN"):
        labels.to_classes(np.array([np.nan]), 0.0)
    with pytest.raises(InsufficientDataError, match="no training row"):
        labels.flat_threshold(np.array([np.nan]), 0.5)


def test_no_label_and_no_trailing_return_spans_a_jump() -> None:
    mid = np.array([100.0, 101, 100, 50, 51, np.nan, 50, 51, 52, 51])  # a 2-for-1 split at row 3
    ret, end = labels.forward_returns_rows(mid, 2)
    assert np.flatnonzero(end >= 0).tolist() == [0, 4, 6, 7]
    assert np.isnan(ret[[1, 2]]).all()
    assert labels.jump_spans(mid, labels.span_ends_rows(len(mid), 2)).tolist() == [False, True, True] + [False] * 7
    assert labels.trailing_returns_rows(mid, 2)[[3, 4]].tolist() == [0.0, 0.0]
    ts = np.arange(10, dtype=np.int64) * MS
    np.testing.assert_array_equal(labels.forward_returns_ms(ts, mid, 2)[1], end)
    assert labels.trailing_returns_ms(ts, mid, 2)[[3, 4]].tolist() == [0.0, 0.0]


def test_a_jump_over_rows_without_a_price_is_seen() -> None:
    ret, end = labels.forward_returns_rows(np.array([100.0, np.nan, np.nan, 20.0, 20.0]), 3)
    assert end.tolist() == [labels.UNKNOWN] * 5
    assert np.isnan(ret).all()


@pytest.mark.parametrize(("ratio", "jump"), [(1.45, False), (1.55, True), (0.7, False), (0.65, True), (0.5, True)])
def test_a_jump_is_a_factor_either_way(ratio: float, jump: bool) -> None:
    _, end = labels.forward_returns_rows(np.array([10.0, 10.0 * ratio]), 1)
    assert end[0] == (labels.UNKNOWN if jump else 1)


@pytest.mark.parametrize("name", ["aapl", "aig", "bac", "iwm", "uso"])
def test_no_label_of_unadjusted_bars_holds_a_split(market_data: Path, name: str) -> None:
    """One-step labels of real bars with known splits; without the rule the largest moves by far more than half."""
    close = next(open_source([market_data / f"bars_1d/lean_us/{name}.zip"]).chunks()).values[:, CLOSE]
    ret, _ = labels.forward_returns_rows(close, 1)
    raw = close[1:] / close[:-1]
    assert np.nanmax(np.abs(ret)) <= 0.5
    assert np.maximum(raw, 1 / raw).max() > 1.9
    voided = labels.jump_spans(close, labels.span_ends_rows(len(close), 1)).sum()
    assert voided == np.isnan(ret[:-1]).sum() > 0

"""Rows of several symbols: labels stay inside a symbol, folds are cut at the same instants for all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from market.build import FeatureTable
from tests.training.conftest import meta_of, quick_config
from tickserve.config import Config
from tickserve.errors import SchemaError
from training.examples import Examples, prepare
from training.metrics import Prediction, evaluate

HALF = 4_000


def two_symbols(table: FeatureTable, late: bool = False) -> tuple[FeatureTable, tuple[slice, slice]]:
    """Two symbols over the same minutes (`late`: the second begins in the middle of the first)."""
    first = {name: getattr(table, name)[:HALF] for name in ("ts_ns", "features", "mid", "half_spread", "session")}
    second = {name: getattr(table, name)[HALF:] for name in first}
    shift = first["ts_ns"][HALF // 2 if late else 0] - second["ts_ns"][0]
    second["ts_ns"] = second["ts_ns"] + shift
    second["session"] = second["session"] + first["session"].max() + 1
    joined = {name: np.concatenate([first[name], second[name]]) for name in first}
    return replace(table, **joined), (slice(0, HALF), slice(HALF, len(table)))


@pytest.fixture(scope="module", params=[False, True], ids=["together", "late"])
def pooled(table: FeatureTable, request: pytest.FixtureRequest) -> tuple[FeatureTable, tuple[slice, slice], Examples]:
    joined, parts = two_symbols(table, late=request.param)
    return joined, parts, prepare(joined, meta_of(), quick_config(), parts)


Pooled = tuple[FeatureTable, tuple[slice, slice], Examples]


def test_labels_are_each_symbols_own(pooled: Pooled, config: Config) -> None:
    table, parts, examples = pooled
    names = ("ts_ns", "features", "mid", "half_spread", "session")
    for part in parts:
        own = prepare(replace(table, **{name: getattr(table, name)[part] for name in names}), meta_of(), config)
        np.testing.assert_array_equal(examples.ret[part], own.ret)
        np.testing.assert_array_equal(examples.trailing[part], own.trailing)
        np.testing.assert_array_equal(examples.end[part], np.where(own.end >= 0, own.end + part.start, -1))


def test_no_symbols_future_is_in_anothers_past(pooled: Pooled) -> None:
    table, _, examples = pooled
    for fold in examples.folds:
        for earlier, later in (("train", "validation"), ("validation", "test"), ("train", "test")):
            known = table.ts_ns[examples.end[getattr(fold.rows, earlier)]].max()
            assert known < table.ts_ns[getattr(fold.rows, later)].min()
        assert (np.diff(fold.rows.train) > 0).all()


def test_a_row_cut_is_not_a_cut_by_time(table: FeatureTable) -> None:
    """The control: the same rows cut as if they were one symbol's are refused."""
    joined, _ = two_symbols(table)
    with pytest.raises(SchemaError, match="time goes back"):
        prepare(joined, replace(meta_of(), kind="book"), quick_config())


def test_symbols_that_move_together_are_not_twice_the_evidence(pooled: Pooled) -> None:
    table, _, examples = pooled
    rows = examples.published.rows.test
    said = Prediction(np.ones(len(rows), np.int64), np.arange(len(rows), dtype=np.float64))
    n_eff = evaluate(said, rows, examples, examples.published.threshold, 1.0)["n_eff"]
    minutes = len(np.unique(table.ts_ns[rows]))
    horizon = quick_config().labels.bars_horizon_rows
    assert n_eff is not None
    assert n_eff <= 1.3 * minutes / horizon


def test_one_symbol_as_a_part_is_the_same_examples(table: FeatureTable, examples: Examples, config: Config) -> None:
    whole = prepare(table, meta_of(), config, (slice(0, len(table)),))
    for one, other in zip(whole.folds, examples.folds, strict=True):
        assert one.threshold == other.threshold
        for side in ("train", "validation", "test"):
            np.testing.assert_array_equal(getattr(one.rows, side), getattr(other.rows, side))

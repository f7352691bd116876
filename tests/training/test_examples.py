"""Examples: labels per kind, the flat band from training rows only, and typed errors for data that cannot teach."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from market.build import FeatureTable
from tickserve.config import Config
from tickserve.errors import InsufficientDataError
from tickserve.settings import load_settings
from training.examples import DataMeta, Examples, evenly, prepare


def test_bars_look_ahead_in_rows_and_the_band_is_of_training_rows_only(
    table: FeatureTable, meta: DataMeta, config: Config, examples: Examples
) -> None:
    assert examples.horizon.unit == "rows"
    assert examples.horizon.value == config.labels.bars_horizon_rows
    for fold in examples.folds:
        moves = np.abs(examples.ret[fold.rows.train])
        assert fold.threshold == np.quantile(moves, config.labels.flat_quantile)
        assert examples.end[fold.rows.train].max() < fold.rows.validation[0]
        assert examples.end[fold.rows.validation].max() < fold.rows.test[0]
    wild = table.mid.copy()
    wild[examples.published.rows.test] *= np.exp(np.linspace(0, 3, len(examples.published.rows.test)))
    assert prepare(replace(table, mid=wild), meta, config).published.threshold == examples.published.threshold


def test_a_thinned_bar_table_publishes_the_horizon_it_can_keep(
    table: FeatureTable, meta: DataMeta, config: Config
) -> None:
    thinned = prepare(replace(table, stride=4), meta, config)
    assert thinned.horizon.value == 4  # 5 bars asked; every 4th bar is there
    assert (thinned.end[thinned.end >= 0] - np.flatnonzero(thinned.end >= 0) == 1).all()


def test_books_look_ahead_in_milliseconds(table: FeatureTable, meta: DataMeta) -> None:
    minutes = load_settings(environ={}, overrides={"labels.book_horizon_ms": 120_000, "validation.folds": 1}).config
    book = prepare(replace(table, half_spread=np.full(len(table), 2e-4)), replace(meta, kind="book", levels=1), minutes)
    assert (book.horizon.unit, book.horizon.value) == ("ms", 120_000)
    assert (table.ts_ns[book.end[book.end >= 0]] - table.ts_ns[book.end >= 0] >= 120_000 * 1_000_000).all()
    assert book.cost_bps == pytest.approx(2.0)


def test_too_few_rows_says_how_many_were_needed(table: FeatureTable, meta: DataMeta, config: Config) -> None:
    short = FeatureTable(
        **{name: getattr(table, name)[:900] for name in ("ts_ns", "features", "mid", "half_spread", "session")},
        stride=1,
        events_read=900,
        quality={},
    )
    with pytest.raises(InsufficientDataError, match="at least 500 rows, was"):
        prepare(short, meta, config)


def test_one_class_only_is_refused(table: FeatureTable, meta: DataMeta, config: Config) -> None:
    with pytest.raises(InsufficientDataError, match=r"one class only.*was flat"):
        prepare(replace(table, mid=np.full(len(table), 100.0)), meta, config)


@pytest.mark.parametrize("field", ["features", "mid"])
def test_nothing_finite_is_refused(table: FeatureTable, meta: DataMeta, config: Config, field: str) -> None:
    with pytest.raises(InsufficientDataError, match=f"{field}: no finite value"):
        prepare(replace(table, **{field: np.full_like(getattr(table, field), np.nan)}), meta, config)


def test_infinite_features_are_missing_to_every_model(table: FeatureTable, meta: DataMeta, config: Config) -> None:
    wild = table.features.copy()
    wild[::3, 1] = np.inf
    assert not np.isinf(prepare(replace(table, features=wild), meta, config).features).any()


def test_evenly_keeps_both_ends() -> None:
    rows = np.arange(100, 1_100, dtype=np.int64)
    chosen = evenly(rows, 7)
    assert len(chosen) == 7
    assert (chosen[0], chosen[-1]) == (100, 1_099)
    np.testing.assert_array_equal(evenly(rows, 0), rows)

"""The matrix of a feature set as a mapped file: the same numbers, and a fit in less memory than they take."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from market.build import FeatureSet, build_features
from market.feature_matrix import FOLDER, MATRIX, META, load_table, mapped_table
from market.readers import open_source
from tickserve.config import FeatureSettings, TrainerSettings
from tickserve.errors import ArtifactError
from tickserve.features.spec import default_spec
from tickserve.settings import load_settings

FILE = "bars_1m/bitfinex/BTCUSD_1m_201804_201812.parquet"


@pytest.fixture(scope="module")
def feature_set(market_data: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    source = open_source([market_data / FILE], levels=5)
    settings = FeatureSettings(store=str(tmp_path_factory.mktemp("store")), max_rows=0)
    return build_features(source, default_spec(source.kind, source.levels), settings)


def test_the_mapped_table_is_the_loaded_one_with_holes_for_infinities(feature_set: FeatureSet) -> None:
    mapped, loaded = mapped_table(feature_set), feature_set.load()
    assert isinstance(mapped.features, np.memmap)
    np.testing.assert_array_equal(mapped.features, np.where(np.isinf(loaded.features), np.nan, loaded.features))
    for name in ("ts_ns", "mid", "half_spread", "session"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(loaded, name))
        assert getattr(mapped, name).dtype == getattr(loaded, name).dtype


def test_size_or_choice_maps(feature_set: FeatureSet) -> None:
    settings = (TrainerSettings(), TrainerSettings(memmap=True), TrainerSettings(memmap_above_mb=1))
    kinds = [isinstance(load_table(feature_set, each).features, np.memmap) for each in settings]
    assert kinds == [False, True, True]


def test_the_file_is_written_once_and_again_when_its_bytes_change(feature_set: FeatureSet) -> None:
    mapped_table(feature_set)
    path = feature_set.folder / FOLDER / MATRIX
    written = path.stat().st_mtime_ns
    right = mapped_table(feature_set).features[:100].copy()
    assert path.stat().st_mtime_ns == written
    with path.open("r+b") as file:
        file.seek(4_096)
        file.write(b"\0" * 64)
    np.testing.assert_array_equal(mapped_table(feature_set).features[:100], right)
    (feature_set.folder / FOLDER / META).write_text("[]")
    np.testing.assert_array_equal(mapped_table(feature_set).features[:100], right)


def test_a_part_that_is_cut_is_refused_and_leaves_no_matrix(market_data: Path, tmp_path: Path) -> None:
    source = open_source([market_data / FILE], levels=5)
    settings = FeatureSettings(store=str(tmp_path), max_rows=500)
    built = build_features(source, default_spec(source.kind, source.levels), settings)
    part = built.folder / next(iter(built.meta["parts"]))
    os.truncate(part, part.stat().st_size // 2)
    with pytest.raises(ArtifactError, match=part.name):
        mapped_table(built)
    assert not list(built.folder.glob(".*"))


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that numpy and Python held at a time for `work`; pages of a mapped file are none of it."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_fit_takes_less_memory_than_the_features_it_reads(feature_set: FeatureSet) -> None:
    from training.examples import prepare
    from training.nets import NetJob
    from training.train import meta_of

    table = mapped_table(feature_set)
    config = load_settings(environ={}, overrides={"validation.folds": 1, "lstm.epochs": 1, "lstm.hidden": 8}).config
    examples = prepare(table, meta_of(feature_set), config)
    assert np.shares_memory(examples.features, table.features)

    def fit_and_judge() -> None:
        job = NetJob("lstm", examples, config.lstm.model_copy(update={"max_train_windows": 2_000}), 7)
        job.predict(job.fit(examples.folds[0]), job.eligible(examples.folds[0].rows.test[:20_000]))

    fit_and_judge()  # libraries that are loaded once
    size = table.features.nbytes
    assert peak_bytes(fit_and_judge) < 0.5 * size
    assert peak_bytes(feature_set.load) > size

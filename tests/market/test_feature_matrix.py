"""The matrix of a feature set as a mapped file: the same numbers, and a fit in less memory than they take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from market.build import FeatureSet, build_features
from market.feature_matrix import FOLDER, MATRIX, META, load_table, mapped_table
from market.readers import open_source
from tickserve.config import FeatureSettings, TrainerSettings
from tickserve.errors import ArtifactError
from tickserve.features.spec import default_spec

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


SMALL = """
import gc, resource, sys
from pathlib import Path
import numpy as np
from market.build import open_feature_set
from market.feature_matrix import mapped_table
from tickserve.config import LstmSettings
from tickserve.settings import load_settings
from training.examples import prepare
from training.nets import NetJob
from training.train import meta_of

config = load_settings(environ={}, overrides={"validation.folds": 1}).config
settings = LstmSettings(window=3, hidden=8, epochs=1, max_train_windows=500)
feature_set = open_feature_set(Path(sys.argv[1]))
examples = prepare(mapped_table(feature_set), meta_of(feature_set), config)

def fit_and_predict():
    job = NetJob("lstm", examples, settings, 7)
    job.predict(job.fit(examples.folds[0]), job.eligible(examples.folds[0].rows.test))

def used():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmData")))

fit_and_predict()  # what libraries allocate once
gc.collect()
size = examples.features.nbytes

def allow_three_quarters_more():
    resource.setrlimit(resource.RLIMIT_DATA, (used() + size * 3 // 4, resource.RLIM_INFINITY))

allow_three_quarters_more()
fit_and_predict()
gc.collect()
allow_three_quarters_more()
try:
    np.array(examples.features)
except MemoryError:
    print("streamed", size)
"""


def test_a_fit_takes_less_memory_than_the_features_it_reads(feature_set: FeatureSet, root: Path) -> None:
    mapped_table(feature_set)
    done = subprocess.run(
        [sys.executable, "-c", SMALL, feature_set.folder],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    assert done.stdout.startswith("streamed 48")

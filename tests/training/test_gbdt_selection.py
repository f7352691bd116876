"""The best columns of a fold: chosen on its training rows, and served under a feature spec of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export import export_bundle
from market.build import FeatureSet, build_features
from market.readers import open_source
from tests.training.conftest import quick_config
from tests.training.test_gbdt_tasks import settings_of
from tickserve import pipeline
from tickserve.config import ExportSettings, FeatureSettings
from tickserve.errors import ArtifactError, ConfigError, UsageError
from tickserve.features.spec import FeatureSpec, default_bars_spec, default_book_spec, default_spec
from tickserve.manifest import Manifest
from tickserve.stream._definition import define
from tickserve.stream._rows import RowMaker
from training.bundles import TrainedBundle
from training.examples import Examples
from training.gbdt import GbdtJob, select_columns
from training.train import train

TOP = 6
# Bars and a book, so that both halves of the feature engine are narrowed.
FILES = {
    "bars": "bars_1m/nautilus/btc-perp-20211231-20220201_1m.csv.gz",
    "book": "binance_l2_stream/usdm_btcusdt_20230405.us.jsonl.gz",
}


def test_only_the_rows_given_have_a_say(examples: Examples) -> None:
    fold, settings = examples.published, settings_of(top_features=3)
    rows = fold.rows.train
    honest = select_columns(examples, rows, fold.threshold, settings, 7)
    features, others = examples.features.copy(), np.setdiff1d(np.arange(len(examples.ret)), rows)
    features[others, 6] = np.nan_to_num(examples.ret[others])
    told = replace(examples, features=features)
    assert select_columns(told, rows, fold.threshold, settings, 7).tolist() == honest.tolist()
    fit = GbdtJob(told, settings, 7).fit(fold)
    assert fit.columns is not None
    assert fit.columns.tolist() == honest.tolist()
    assert len(honest) == 3
    assert (np.diff(honest) > 0).all()
    # The control: what it is told about those rows counts.
    features[rows, 6] = np.nan_to_num(examples.ret[rows])
    assert 6 in select_columns(replace(examples, features=features), rows, fold.threshold, settings, 7)
    assert 6 not in honest


def test_a_fold_model_sees_its_columns_alone(examples: Examples) -> None:
    fold = examples.published
    job = GbdtJob(examples, settings_of(top_features=3), 7)
    fit = job.fit(fold)
    assert fit.columns is not None
    said = job.predict(fit, fold.rows.test)
    blind = examples.features.copy()
    blind[:, np.setdiff1d(np.arange(7), fit.columns)] = np.nan
    other = GbdtJob(replace(examples, features=blind), job.settings, 7)
    np.testing.assert_array_equal(other.predict(fit, fold.rows.test), said)
    ranked = {row["column"] for row in job.importance(fit, examples.columns)}
    assert ranked <= {examples.columns[index] for index in fit.columns}


def test_as_many_columns_as_there_are_is_no_selection(examples: Examples) -> None:
    with pytest.raises(ConfigError, match="expected fewer than the 7 columns, was 7") as refused:
        GbdtJob(examples, settings_of(top_features=7), 7).fit(examples.published)
    assert refused.value.field == "gbdt.top_features"


def test_a_narrowed_spec_is_one_of_its_own() -> None:
    spec = default_bars_spec()
    narrow = spec.narrowed(spec.columns[5:1:-1])
    assert narrow.columns == spec.columns[2:6]
    assert narrow.digest != spec.digest
    assert FeatureSpec.from_json(narrow.to_json()) == narrow
    assert (narrow.warmup_events, narrow.session_gap_ns) == (spec.warmup_events, spec.session_gap_ns)
    with pytest.raises(UsageError, match="unknown column"):
        spec.narrowed(["bar_return_1", "nothing"])


@pytest.fixture(scope="module", params=FILES)
def narrow(
    request: pytest.FixtureRequest, market_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FeatureSet, TrainedBundle]:
    """A real file, its whole feature set, and the bundle of a model on the best of its columns."""
    path, folder = market_data / FILES[request.param], tmp_path_factory.mktemp("narrow")
    source = open_source([path], levels=5)
    features = FeatureSettings(max_rows=9_000, store=str(folder))
    built = build_features(source, default_spec(source.kind, source.levels), features)
    config = quick_config(gbdt__top_features=TOP, gbdt__task="regression", validation__folds=1)
    [bundle] = train(built, config, folder / "bundles", families=("gbdt",))
    return path, built, bundle


def test_the_narrow_model_is_published_and_fed_its_own_rows(
    narrow: tuple[Path, FeatureSet, TrainedBundle], tmp_path: Path
) -> None:
    """An online stream that knows the manifest alone makes, bit for bit, the rows the model was trained on."""
    path, built, bundle = narrow
    settings = ExportSettings(parity_rows=100, max_batch=4, preferred_batch_rows=(2,))
    manifest = export_bundle(bundle.path, tmp_path / "repository", settings).manifest
    assert len(manifest.features.columns) == manifest.inputs[0].shape[0] == TOP
    assert manifest.features.digest == built.spec.narrowed(manifest.features.columns).digest
    maker, kept = RowMaker(define(manifest)), []
    for events in open_source([path], levels=5).chunks(50_000):
        for ts_ns, values in zip(events.ts_ns.tolist(), events.values, strict=True):
            row = maker.step(ts_ns, values)
            if row.kept:
                kept.append(row.features)
    table, places = built.load(), [built.spec.columns.index(name) for name in manifest.features.columns]
    expected = np.where(np.isinf(table.features), np.float32(np.nan), table.features)[:, places]
    assert np.stack(kept).tobytes() == np.ascontiguousarray(expected).tobytes()
    # Ranges are the columns' own, over the training rows.
    low, high = np.array(manifest.features.minimum), np.array(manifest.features.maximum)
    assert (low >= np.nanmin(expected, axis=0)).all()
    assert (high <= np.nanmax(expected, axis=0)).all()


def test_a_whole_feature_set_feeds_the_narrow_model(narrow: tuple[Path, FeatureSet, TrainedBundle]) -> None:
    _, built, bundle = narrow
    manifest: Manifest = bundle.manifest
    inputs, _ = pipeline.last_inputs(built, manifest, 5)
    places = [built.spec.columns.index(name) for name in manifest.features.columns]
    np.testing.assert_array_equal(inputs, built.load().features[-5:, places])
    # The same names under another digest are other features.
    foreign = manifest.features.model_copy(update={"digest": "sha256:" + "0" * 64})
    with pytest.raises(ArtifactError, match="other features"):
        pipeline.last_inputs(built, manifest.model_copy(update={"features": foreign}), 5)


@pytest.mark.parametrize("spec", [default_bars_spec(), default_book_spec(5)], ids=["bars", "book"])
def test_every_kind_can_be_narrowed_to_alone(spec: FeatureSpec) -> None:
    for column in spec.columns:
        alone = spec.narrowed([column])
        assert alone.columns == (column,)
        assert FeatureSpec.from_json(alone.to_json()).digest == alone.digest

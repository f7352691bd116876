"""The probes: every way for a training to see the future is caught, and an honest training of the same kind passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from market import labels
from market.build import FeatureTable
from market.walkforward import Fold
from tests.training.conftest import COLUMNS, quick_config
from tickserve.config import Config
from tickserve.errors import ComponentError, GateRefusedError, UsageError
from training import probe
from training.baselines import column_scale
from training.examples import DataMeta, Examples, LabelledFold, prepare
from training.gbdt import GbdtJob, select_columns
from training.job import Fit
from training.nets import NetJob
from training.nets.windows import scaler
from training.probe import FUTURES, cut_of, recast, refuse_seeing_the_future, refuse_shifted_labels, shuffled
from training.regimes import Limits
from training.train import Demands, train_table

ROWS = 4_000
SMALL: dict[str, Any] = {"gbdt__top_features": 3, "mlp__enabled": True, "mlp__hidden": 8, "mlp__epochs": 2}


@pytest.fixture(scope="module")
def small() -> Config:
    return quick_config(**SMALL)


@pytest.fixture(scope="module")
def short(table: FeatureTable) -> FeatureTable:
    names = ("ts_ns", "features", "mid", "half_spread", "session")
    return replace(table, **{name: getattr(table, name)[:ROWS] for name in names})


def everything(examples: Examples) -> np.ndarray:
    return np.flatnonzero(examples.end >= 0)


class ScalerOnAllData(NetJob):
    def task(self, fold: LabelledFold) -> Any:
        mean, std = scaler(self.examples.features, everything(self.examples))
        return replace(super().task(fold), mean=mean, std=std)


class SelectionOutsideTheFold(GbdtJob):
    def _columns(self, fold: LabelledFold) -> Any:
        return select_columns(self.examples, everything(self.examples), fold.threshold, self.settings, self.seed)


class StopsOnTestRows(GbdtJob):
    def fit(self, fold: LabelledFold) -> Fit:
        return super().fit(replace(fold, rows=Fold(fold.rows.train, fold.rows.test, fold.rows.test)))


class NetStopsOnTestRows(NetJob):
    def fit(self, fold: LabelledFold) -> Fit:
        return super().fit(replace(fold, rows=Fold(fold.rows.train, fold.rows.test, fold.rows.test)))


class LearnsFromOneTestRow(GbdtJob):
    def fit(self, fold: LabelledFold) -> Fit:
        rows = np.append(fold.rows.train, fold.rows.test[-1])
        return super().fit(replace(fold, rows=replace(fold.rows, train=rows)))


class PeeksWhenScoring(GbdtJob):
    """Shifts every probability by what the table holds at its end."""

    def predict(self, fit: Fit, rows: np.ndarray) -> Any:
        return super().predict(fit, rows) + np.float32(np.nanmean(self.examples.features[-100:]))


def trees(kind: type[GbdtJob]) -> Callable[..., GbdtJob]:
    return lambda family, examples, config: kind(examples, config.gbdt, config.seed)


def net(kind: type[NetJob]) -> Callable[..., NetJob]:
    return lambda family, examples, config: kind("mlp", examples, config.mlp, config.seed, config.trainer)


def with_band_of_all_data(table: FeatureTable, meta: DataMeta, config: Config) -> Examples:
    made = prepare(table, meta, config)
    band = labels.flat_threshold(made.ret, config.labels.flat_quantile)
    return replace(made, folds=tuple(replace(fold, threshold=band) for fold in made.folds))


def with_scaled_table(table: FeatureTable, meta: DataMeta, config: Config) -> Examples:
    mean, std = column_scale(table.features.astype(np.float64))
    return prepare(replace(table, features=((table.features - mean) / std).astype(np.float32)), meta, config)


def with_ranked_table(table: FeatureTable, meta: DataMeta, config: Config) -> Examples:
    order = np.argsort(np.argsort(table.features, axis=0), axis=0)
    return prepare(replace(table, features=order.astype(np.float32)), meta, config)


def with_labels_of_the_next_row(table: FeatureTable, meta: DataMeta, config: Config) -> Examples:
    made = prepare(table, meta, config)
    return replace(made, ret=np.where(np.isfinite(made.ret), np.nan_to_num(np.roll(made.ret, -1)), np.nan))


def with_holes_filled_backwards(table: FeatureTable, meta: DataMeta, config: Config) -> Examples:
    """Missing values take the mean of all later ones."""
    later = np.nancumsum(table.features[::-1], axis=0)[::-1]
    return prepare(replace(table, features=np.where(np.isnan(table.features), later, table.features)), meta, config)


Leak = tuple[str, dict[str, Any], str]
LEAKS: dict[str, Leak] = {
    "scaler on all data": ("mlp", {"make": net(ScalerOnAllData)}, "model file"),
    "scaler on the whole table": ("gbdt", {"prepared": with_scaled_table}, "feature value"),
    "ranks over the whole table": ("gbdt", {"prepared": with_ranked_table}, "feature value"),
    "holes filled from behind": ("gbdt", {"prepared": with_holes_filled_backwards}, "feature value"),
    "selection outside the fold": ("gbdt", {"make": trees(SelectionOutsideTheFold)}, "choice of columns"),
    "flat band from all data": ("gbdt", {"prepared": with_band_of_all_data}, "flat band"),
    "early stopping of trees on test rows": ("gbdt", {"make": trees(StopsOnTestRows)}, "validation loss"),
    "early stopping of a net on test rows": ("mlp", {"make": net(NetStopsOnTestRows)}, "validation loss"),
    "one test row learned from": ("gbdt", {"make": trees(LearnsFromOneTestRow)}, "model file"),
    "labels of the next row": ("gbdt", {"prepared": with_labels_of_the_next_row}, "label"),
    "scores shifted by the end of the table": ("gbdt", {"make": trees(PeeksWhenScoring)}, "prediction"),
}  # fmt: skip


def quiet(text: str) -> None:
    pass


@pytest.mark.parametrize("name", LEAKS)
def test_every_way_of_seeing_the_future_is_caught(
    name: str, short: FeatureTable, meta: DataMeta, small: Config
) -> None:
    family, ways, seen = LEAKS[name]
    with pytest.raises(GateRefusedError, match=f"{family}: the future reaches the training of fold 1.*another.*{seen}"):
        refuse_seeing_the_future(short, meta, small, family, quiet, **ways)


@pytest.mark.parametrize("family", ["gbdt", "mlp", "lstm"])
def test_an_honest_training_passes(family: str, short: FeatureTable, meta: DataMeta, small: Config) -> None:
    """The control of every case above: the same jobs, as they are."""
    said: list[str] = []
    found = refuse_seeing_the_future(short, meta, small, family, said.append)
    assert found == {"folds": [1, 2], "futures": ["shuffled", "recast"], "rows": ROWS}
    assert said[0] == f"{family} fold 1: the same, bit for bit, where the future is shuffled or recast"


@pytest.mark.parametrize("future", FUTURES)
def test_a_future_shuffle_alone_is_noticed_by_a_job_that_looks(
    future: str, short: FeatureTable, meta: DataMeta, small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "FUTURES", {future: FUTURES[future]})
    for kind in (StopsOnTestRows, LearnsFromOneTestRow):
        with pytest.raises(GateRefusedError, match=f"where the future is {future}"):
            refuse_seeing_the_future(short, meta, small, "gbdt", quiet, make=trees(kind))
    refuse_seeing_the_future(short, meta, small, "gbdt", quiet)


def test_regimes_fixed_on_all_rows_are_caught(
    short: FeatureTable, meta: DataMeta, small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Limits.of

    def on_all(examples: Examples, fold: LabelledFold) -> Limits | None:
        return honest(examples, replace(fold, rows=replace(fold.rows, train=everything(examples))))

    monkeypatch.setattr(Limits, "of", on_all)
    with pytest.raises(GateRefusedError, match="another regime where the future is"):
        refuse_seeing_the_future(short, meta, small, "gbdt", quiet)


def test_what_lies_before_the_cut_is_never_touched(short: FeatureTable, meta: DataMeta, small: Config) -> None:
    examples = prepare(short, meta, small)
    cut = cut_of(examples, examples.folds[0])
    before = short.ts_ns <= cut
    for change in (shuffled, recast):
        other = change(short, ~before, np.random.default_rng(0))
        for name in ("features", "mid", "half_spread"):
            np.testing.assert_array_equal(getattr(other, name)[before], getattr(short, name)[before])
        assert (other.mid[~before] != short.mid[~before]).mean() > 0.9
        assert len(prepare(other, meta, small).folds) == len(examples.folds)


def test_labels_that_reach_into_the_test_rows_are_refused(short: FeatureTable, meta: DataMeta, small: Config) -> None:
    examples = prepare(short, meta, small)
    fold = examples.folds[0]
    unpurged = replace(fold, rows=replace(fold.rows, validation=np.append(fold.rows.validation, fold.rows.test[0] - 1)))
    with pytest.raises(GateRefusedError, match="labels of fold 1 reach into its test rows"):
        cut_of(examples, unpurged)


class Unsteady(GbdtJob):
    fits = 0

    def fit(self, fold: LabelledFold) -> Fit:
        Unsteady.fits += 1
        self.seed = Unsteady.fits
        return super().fit(fold)


def test_a_fit_that_does_not_repeat_itself_is_no_leak(short: FeatureTable, meta: DataMeta, small: Config) -> None:
    with pytest.raises(ComponentError, match="does not repeat itself"):
        refuse_seeing_the_future(short, meta, small, "gbdt", quiet, make=trees(Unsteady))


@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_label_that_is_shifted_by_one_row_is_a_leak(
    table: FeatureTable, meta: DataMeta, horizon: int, shift: int
) -> None:
    """The row's own past is none: over one row, the label of the row before is what has just happened."""
    examples = prepare(table, meta, quick_config(labels__bars_horizon_rows=horizon))
    shifted = np.roll(examples.ret, -shift)
    leaky = replace(examples, features=np.column_stack([examples.features, shifted]).astype(np.float32))
    refuse_shifted_labels(examples, COLUMNS)
    if (horizon, shift) == (1, -1):
        refuse_shifted_labels(leaky, (*COLUMNS, "shifted"))
        return
    with pytest.raises(GateRefusedError, match=r"shifted: the label of another row leaks.*the row (before|after)"):
        refuse_shifted_labels(leaky, (*COLUMNS, "shifted"))


def test_a_shifted_label_is_refused_by_the_probe_of_the_job(short: FeatureTable, meta: DataMeta, small: Config) -> None:
    ahead = labels.forward_returns_rows(short.mid, 5, session=short.session)[0]
    leaky = replace(short, features=np.column_stack([short.features, np.roll(ahead, -1)]).astype(np.float32))
    with pytest.raises(GateRefusedError, match="late: the label of another row leaks"):
        refuse_seeing_the_future(leaky, replace(meta, columns=(*COLUMNS, "late")), small, "gbdt", quiet)


def test_training_probes_first_and_says_so_in_the_manifest(
    short: FeatureTable, meta: DataMeta, small: Config, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle,) = train_table(short, meta, small, tmp_path, ("gbdt",), demands=Demands(probe=True))
    expected = {"folds": [1, 2], "futures": ["shuffled", "recast"], "rows": ROWS}
    assert bundle.report["probe"] == bundle.manifest.metrics["probe"] == expected
    monkeypatch.setattr("training.probe.refuse_seeing_the_future", _with(trees(StopsOnTestRows)))
    with pytest.raises(GateRefusedError, match="the future reaches"):
        train_table(short, meta, small, tmp_path / "none", ("gbdt",), demands=Demands(probe=True))
    assert not (tmp_path / "none").exists()
    with pytest.raises(UsageError, match="one symbol's rows"):
        train_table(
            short, meta, small, tmp_path / "none", ("gbdt",), parts=(slice(0, ROWS),), demands=Demands(probe=True)
        )


def _with(make: Any) -> Any:
    return lambda *given: refuse_seeing_the_future(*given, make=make)

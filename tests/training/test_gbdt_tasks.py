"""What the trees learn: each task from training rows alone, calibrated on validation rows, refused where it must be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from market.feature_store import FeatureTable
from models.gbdt import GbdtClassifier
from tests.training.conftest import quick_config
from tickserve.config import GbdtSettings
from tickserve.errors import ComponentError, ConfigError, GateRefusedError, InsufficientDataError
from tickserve.settings import load_settings
from training.examples import DataMeta, Examples, prepare
from training.gbdt import GbdtJob
from training.gbdt import device as device_module
from training.gbdt.boosting import constraints
from training.gbdt.calibration import fit_link
from training.gbdt.device import place
from training.gbdt.objective import blocks, objective_of
from training.metrics import rank_correlation
from training.train import train_table

TASKS: dict[str, dict[str, Any]] = {
    "squared": {"task": "regression"},
    "pseudo_huber": {"task": "regression", "regression_loss": "pseudo_huber"},
    "ndcg": {"task": "ranking"},
    "pairwise": {"task": "ranking", "ranking_loss": "pairwise"},
}


def settings_of(**changes: Any) -> GbdtSettings:
    return quick_config(**{f"gbdt__{name}": value for name, value in changes.items()}).gbdt


def raw(fit: Any) -> bytes:
    return bytes(fit.model.booster.save_raw("ubj"))


@pytest.mark.parametrize("case", TASKS)
def test_every_task_finds_a_planted_signal_and_is_calibrated(case: str, examples: Examples) -> None:
    random = np.random.default_rng(3)
    features = examples.features.copy()
    features[:, 0] = np.nan_to_num(examples.ret) * 2_000 + random.normal(0, 1, len(features))
    world = replace(examples, features=features)
    fold = world.published
    job = GbdtJob(world, settings_of(**TASKS[case]), 7)
    fit = job.fit(fold)
    said = job.predict(fit, fold.rows.test)
    assert (rank_correlation((said[:, 2] - said[:, 0]).astype(float), world.ret[fold.rows.test]) or 0.0) > 0.3
    # Probabilities that say more than how frequent each class was in training, on rows that nothing was fitted to.
    classes = world.classes(fold.rows.test, fold.threshold)
    usual = np.bincount(world.classes(fold.rows.train, fold.threshold), minlength=3) / len(fold.rows.train)
    assert -np.log(said[np.arange(len(said)), classes]).mean() < -np.log(usual[classes]).mean() - 0.02


@pytest.mark.parametrize("case", TASKS)
def test_a_task_is_fitted_on_training_rows_and_linked_on_validation_rows(case: str, examples: Examples) -> None:
    fold, settings = examples.folds[0], settings_of(**TASKS[case], rounds=6, early_stopping_rounds=6)
    honest = GbdtJob(examples, settings, 7).fit(fold)
    after = examples.ret.copy()
    after[fold.rows.test[0] :] = -1.0
    told = GbdtJob(replace(examples, ret=after), settings, 7).fit(fold)
    assert (raw(told), told.model.link) == (raw(honest), honest.model.link)
    # Other validation returns move the link and, early stopping apart, not the trees.
    between = examples.ret.copy()
    between[fold.rows.validation] *= -3
    other = GbdtJob(replace(examples, ret=between), settings, 7).fit(fold)
    kept = min(honest.best, other.best)
    assert bytes(other.model.booster[:kept].save_raw("ubj")) == bytes(honest.model.booster[:kept].save_raw("ubj"))
    assert other.model.link != honest.model.link


def test_scale_and_grades_are_the_training_rows_own(examples: Examples) -> None:
    train, later = examples.folds[0].rows.train, examples.published.rows.test
    scaled = objective_of(examples, train, 1e-4, settings_of(task="regression")).target
    assert np.abs(scaled(train)).mean() == pytest.approx(1.0)
    assert np.abs(scaled(later)).mean() != pytest.approx(1.0, abs=1e-3)
    graded = objective_of(examples, train, 1e-4, settings_of(task="ranking", ranking_grades=4)).target
    shares = np.bincount(graded(train), minlength=4) / len(train)
    assert (np.abs(shares - 0.25) < 0.1).all()
    assert np.bincount(graded(later)).size <= 4


def test_blocks_are_consecutive_and_end_with_a_session() -> None:
    rows = np.array([0, 1, 3, 4, 9, 10, 11, 12])
    session = np.zeros(13, np.int32)
    session[11:] = 1
    assert blocks(rows, session, 4).tolist() == [0, 0, 0, 1, 2, 2, 3, 4]


@pytest.mark.parametrize("raised", [True, False])
def test_early_stopping_follows_the_metric_whatever_its_sign(raised: bool, examples: Examples) -> None:
    task = {"task": "ranking"} if raised else {"task": "regression"}
    job = GbdtJob(examples, settings_of(**task, rounds=40, learning_rate=0.8, early_stopping_rounds=4), 7)
    losses: list[float] = []
    job.watch = lambda step, loss: losses.append(loss)
    fit = job.fit(examples.published)
    assert fit.best == int(np.argmin(losses)) + 1
    assert len(losses) == min(40, fit.best + 4)
    assert all(loss < 0 for loss in losses) is raised


def test_a_link_is_the_likeliest_one_and_never_falls() -> None:
    random = np.random.default_rng(1)
    margins = random.normal(5.0, 0.2, 20_000).astype(np.float32)
    noise = random.logistic(size=len(margins))
    classes = np.digitize(3.0 * margins + noise, [14.0, 16.0])
    link = fit_link(margins, classes)
    np.testing.assert_allclose([link.slope, link.low, link.high], [3.0, 14.0, 16.0], rtol=0.05)
    backwards = fit_link(-margins, classes)
    assert 0 < backwards.slope < 0.01
    one_class = fit_link(np.zeros(50, np.float32), np.ones(50, np.int64))
    assert one_class.probabilities(np.zeros(1, np.float32))[0, 1] > 0.99


@pytest.mark.parametrize("task", ["classification", "regression", "ranking"])
def test_one_class_and_a_leaking_label_are_refused_whatever_the_task(
    task: str, table: FeatureTable, meta: DataMeta, tmp_path: Any
) -> None:
    config = quick_config(gbdt__task=task)
    still = replace(table, mid=np.full(len(table.mid), 100.0))
    with pytest.raises(InsufficientDataError, match="one class only"):
        train_table(still, meta, config, tmp_path, families=("gbdt",))
    leaking = table.features.copy()
    leaking[:, 0] = np.nan_to_num(prepare(table, meta, config).ret)
    with pytest.raises(GateRefusedError, match="leaks"):
        train_table(replace(table, features=leaking), meta, config, tmp_path, families=("gbdt",))
    assert not list(tmp_path.iterdir())


def test_jobs_beside_each_other_do_not_meet(examples: Examples) -> None:
    """What a universe of symbols needs of the job: no state outside it."""
    kinds = [settings_of(), settings_of(task="ranking"), settings_of(task="regression", top_features=3)]
    alone = [raw(GbdtJob(examples, settings, 7).fit(examples.published)) for settings in kinds]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda settings: raw(GbdtJob(examples, settings, 7).fit(examples.published)), kinds))
    assert together == alone


def test_monotone_columns_bind_the_score(examples: Examples) -> None:
    fold = examples.published
    fit = GbdtJob(examples, settings_of(task="regression", monotone={"bar_return_1": 1}), 7).fit(fold)
    rows = np.repeat(examples.features[fold.rows.test[::40]], 21, axis=0)
    rows[:, 0] = np.tile(np.linspace(-0.01, 0.01, 21, dtype=np.float32), len(rows) // 21)
    model: GbdtClassifier = fit.model
    margins = model.margin(rows).reshape(-1, 21)
    assert (np.diff(margins, axis=1) >= 0).all()


def test_constraints_go_with_the_columns_a_model_sees() -> None:
    names = ("a", "b", "c")
    assert constraints({}, names, None) == {}
    assert constraints({"c": -1, "a": 1}, names, None) == {"monotone_constraints": "(1,0,-1)"}
    assert constraints({"c": -1}, names, np.array([1, 2])) == {"monotone_constraints": "(0,-1)"}
    with pytest.raises(ConfigError, match=r"gbdt\.monotone\.bar_retrun_1: unknown column.*nearest: bar_return_1"):
        constraints({"bar_retrun_1": 1}, ("spread", "bar_return_1"), None)


INERT: dict[str, dict[str, Any]] = {
    "regression_loss": {"regression_loss": "pseudo_huber"},
    "ranking_loss": {"ranking_loss": "pairwise", "task": "regression"},
    "ranking_block_rows": {"ranking_block_rows": 9},
    "ranking_grades": {"ranking_grades": 3},
    "sampling_method": {"sampling_method": "gradient_based", "subsample": 1.0},
    "monotone": {"monotone": {"a": 1}},
    "external_memory_chunk_rows": {"external_memory_chunk_rows": 2_048},
    "memory_pool": {"memory_pool": "cuda_async", "device": "cpu"},
}


@pytest.mark.parametrize("key", INERT)
def test_what_would_do_nothing_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="expected") as refused:
        settings_of(**INERT[key])
    assert refused.value.field == f"gbdt.{key}"


def test_monotone_is_a_table_of_columns_in_file_and_environment(tmp_path: Any) -> None:
    file = tmp_path / "desk.toml"
    file.write_text("[gbdt]\ntask = 'ranking'\n[gbdt.monotone]\nbar_return_1 = -1\n")
    settings = load_settings(file, environ={})
    assert settings.config.gbdt.monotone == {"bar_return_1": -1}
    assert settings.origin["gbdt.monotone"] == "desk.toml"
    environ = {"TICKSERVE_GBDT__MONOTONE": '{"volatility": 1}'}
    assert load_settings(file, environ=environ).config.gbdt.monotone == {"volatility": 1}
    file.write_text("[gbdt]\ntask = 'ranking'\n[gbdt.monotone]\nbar_return_1 = 2\n")
    with pytest.raises(ConfigError) as refused:
        load_settings(file, environ={})
    assert str(refused.value.field).startswith("gbdt.monotone")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "DRIVER", "libnone.so")
    assert place(settings_of()).to_json() == {"device": "cpu"}
    for key, changes in (("device", {"device": "cuda"}), ("memory_pool", {"memory_pool": "cuda_async"})):
        with pytest.raises(ComponentError, match=r"no effect here.*libnone\.so is not here") as refused:
            place(settings_of(**changes))
        assert refused.value.field == f"gbdt.{key}"


def test_rmm_is_refused_by_a_build_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_why_no_gpu", lambda build: "")
    assert place(settings_of(memory_pool="cuda_async")).to_json() == {"device": "cuda", "memory_pool": "cuda_async"}
    with pytest.raises(ComponentError, match="this build of XGBoost has no RMM"):
        place(settings_of(memory_pool="rmm"))

"""The XGBoost job: reproducible, early stopped, native about NaN, and blind to what it may not see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from models.gbdt import GbdtClassifier
from tickserve.config import Config
from training.examples import Examples
from training.gbdt import GbdtJob
from training.metrics import rank_correlation


def job(examples: Examples, config: Config, seed: int = 7) -> GbdtJob:
    return GbdtJob(examples, config.gbdt, seed)


def test_the_same_seed_gives_the_same_bytes(examples: Examples, config: Config, tmp_path: Path) -> None:
    one, two, other = (job(examples, config, seed).fit(examples.published) for seed in (7, 7, 8))
    raw = [bytes(fit.model.booster.save_raw("ubj")) for fit in (one, two, other)]
    assert raw[0] == raw[1]
    assert raw[0] != raw[2]


def test_trees_after_the_best_round_are_gone(examples: Examples, config: Config, tmp_path: Path) -> None:
    # A learning rate this high overfits within a few rounds, so early stopping has something to drop.
    settings = config.gbdt.model_copy(update={"rounds": 60, "learning_rate": 1.0, "early_stopping_rounds": 3})
    fitting = GbdtJob(examples, settings, 7)
    fit = fitting.fit(examples.published)
    assert fit.best < 57
    assert fit.model.booster.num_boosted_rounds() == fit.best
    fitting.save(fit, tmp_path / "model.ubj")
    again = GbdtClassifier.load(tmp_path / "model.ubj", examples.features.shape[1])
    rows = examples.features[examples.published.rows.test]
    np.testing.assert_array_equal(again.predict(rows), fitting.score(fit, rows))


def test_nothing_from_the_test_rows_on_moves_the_model(examples: Examples, config: Config) -> None:
    fold = examples.folds[0]
    features, ret = examples.features.copy(), examples.ret.copy()
    features[fold.rows.test[0] :] = 9.0
    ret[fold.rows.test[0] :] = -1.0
    told = job(replace(examples, features=features, ret=ret), config).fit(fold)
    honest = job(examples, config).fit(fold)
    assert bytes(told.model.booster.save_raw("ubj")) == bytes(honest.model.booster.save_raw("ubj"))


def test_labels_drawn_by_lot_teach_nothing_and_a_planted_signal_is_found(examples: Examples, config: Config) -> None:
    rng = np.random.default_rng(3)
    drawn = np.where(np.isfinite(examples.ret), rng.normal(0, 1e-3, len(examples.ret)), np.nan)
    planted = examples.features.copy()
    planted[:, 0] = np.nan_to_num(drawn) * 500 + rng.normal(0, 1, len(drawn))
    found: dict[str, float | None] = {}
    for name, features in (("lot", examples.features), ("planted", planted)):
        world = replace(examples, ret=drawn, features=features)
        fold = replace(world.published, threshold=4e-4)
        fitting = job(world, config)
        p = fitting.predict(fitting.fit(fold), fold.rows.test)
        found[name] = rank_correlation((p[:, 2] - p[:, 0]).astype(float), drawn[fold.rows.test])
    assert abs(found["lot"] or 0.0) < 0.06
    assert (found["planted"] or 0.0) > 0.2


def test_importance_names_columns_and_shares_add_up(examples: Examples, config: Config, meta) -> None:  # noqa: ANN001
    fitting = job(examples, config)
    ranked = fitting.importance(fitting.fit(examples.published), meta.columns)
    assert {row["column"] for row in ranked} <= set(meta.columns)
    assert 0.99 < sum(row["gain_share"] for row in ranked) <= 1.0001

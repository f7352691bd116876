"""Truncation keeps the first rounds, as many as the validation rows ask for, and may fit their leaves again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.gbdt import GbdtClassifier
from tests.training.conftest import quick_config
from tickserve.errors import ConfigError
from training.compress.recipe import TruncateStep
from training.compress.truncation import truncate
from training.examples import Examples
from training.gbdt import GbdtJob


def quiet(text: str) -> None:
    """Say nothing."""


def forest(examples: Examples, **keys: Any) -> tuple[GbdtJob, Any]:
    job = GbdtJob(examples, quick_config(**{f"gbdt__{key}": value for key, value in keys.items()}).gbdt, 7)
    return job, job.fit(examples.published)


def step(**keys: Any) -> TruncateStep:
    return TruncateStep(kind="truncate", **keys)


def test_the_first_rounds_are_kept_as_they_are(examples: Examples) -> None:
    job, whole = forest(examples)
    fold = examples.published
    said: list[str] = []
    short = truncate(step(rounds=4, refresh=False), job, whole, fold, said.append)
    wanted = GbdtClassifier(whole.model.booster[:4], examples.features.shape[1])
    rows = fold.rows.test[:200]
    np.testing.assert_array_equal(job.predict(short, rows), wanted.predict(examples.features[rows]))
    assert short.best == short.model.booster.num_boosted_rounds() == 4
    assert "4 of " in said[0]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_refreshed_leaves_keep_the_splits_and_answer_otherwise(examples: Examples, task: str) -> None:
    job, whole = forest(examples, task=task, subsample=0.3)
    fold, rows = examples.published, examples.published.rows.test[:500]
    plain, refreshed = (truncate(step(rounds=4, refresh=on), job, whole, fold, quiet) for on in (False, True))
    splits = [
        fit.model.booster.trees_to_dataframe()[["Tree", "Node", "Feature", "Split"]] for fit in (plain, refreshed)
    ]
    assert splits[0].equals(splits[1])
    before, after = (job.predict(fit, rows) for fit in (plain, refreshed))
    assert not np.array_equal(before, after)
    assert np.corrcoef(before[:, 2], after[:, 2])[0, 1] > 0.8
    assert (refreshed.model.link is None) is (task == "classification")


def test_the_validation_rows_say_how_many(examples: Examples) -> None:
    job, whole = forest(examples)
    fold = examples.published
    kept = [truncate(step(max_loss=loss, refresh=False), job, whole, fold, quiet).best for loss in (0.0, 0.005, 0.1)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == whole.best
    assert kept[-1] < whole.best


def test_what_truncates_nothing_is_refused(examples: Examples) -> None:
    job, whole = forest(examples)
    with pytest.raises(ConfigError, match=r"step.rounds.*expected fewer than"):
        truncate(step(rounds=whole.best), job, whole, examples.published, quiet)
    job, ranked = forest(examples, task="ranking")
    with pytest.raises(ConfigError, match=r"step.refresh"):
        truncate(step(rounds=1), job, ranked, examples.published, quiet)
    assert truncate(step(rounds=1, refresh=False), job, ranked, examples.published, quiet).best == 1

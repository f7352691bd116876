"""The LSTM job: windows inside their session, the scaler of the training rows, reproducible weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tickserve.config import Config
from tickserve.errors import InsufficientDataError
from training.examples import Examples
from training.nets import NetJob


def job(examples: Examples, config: Config, seed: int = 7) -> NetJob:
    return NetJob("lstm", examples, config.lstm, seed)


def test_windows_end_at_their_row_and_never_cross_a_session(examples: Examples, config: Config) -> None:
    nets, steps = job(examples, config), config.lstm.window
    rows = nets.eligible(np.arange(len(examples.ret), dtype=np.int64))
    first_of_second = int(np.flatnonzero(examples.session == 1)[0])
    expected = [*range(steps - 1, first_of_second), *range(first_of_second + steps - 1, len(examples.ret))]
    assert rows.tolist() == expected
    windows = nets.inputs(rows[[0, 5, -1]])
    for window, row in zip(windows, rows[[0, 5, -1]], strict=True):
        np.testing.assert_array_equal(window, examples.features[row - steps + 1 : row + 1])


def test_windows_are_a_view_of_the_table(examples: Examples, config: Config) -> None:
    assert np.shares_memory(job(examples, config)._windows, examples.features)


def test_scaler_and_weights_see_nothing_after_their_rows(examples: Examples, config: Config) -> None:
    fold = examples.folds[0]
    features, ret = examples.features.copy(), examples.ret.copy()
    features[fold.rows.test[0] :] = 1e6
    ret[fold.rows.test[0] :] = 1.0
    told = job(replace(examples, features=features, ret=ret), config).fit(fold)
    honest = job(examples, config).fit(fold)
    for name, tensor in honest.model.state_dict().items():
        assert torch.equal(tensor, told.model.state_dict()[name]), name
    seen = examples.features[fold.rows.train].astype(np.float64)
    assert honest.model.mean.numpy() == pytest.approx(np.nanmean(seen, axis=0), rel=1e-5, abs=1e-9)


def test_the_seed_decides_the_weights_and_the_callers_randomness_is_left_alone(
    examples: Examples, config: Config
) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    one, two, other = (job(examples, config, seed).fit(examples.folds[0]) for seed in (7, 7, 8))
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    assert torch.equal(one.model.head.weight, two.model.head.weight)
    assert not torch.equal(one.model.head.weight, other.model.head.weight)


def test_training_windows_are_capped_evenly(examples: Examples, config: Config) -> None:
    settings = config.lstm.model_copy(update={"max_train_windows": 300, "epochs": 1})
    assert NetJob("lstm", examples, settings, 7).fit(examples.published).rows == 300


def test_a_window_longer_than_the_data_is_refused(examples: Examples, config: Config) -> None:
    tiny = replace(examples, features=examples.features[:5])
    with pytest.raises(InsufficientDataError, match=r"lstm\.window.*at least 10 rows"):
        job(tiny, config)
    every_row_its_own = replace(examples, session=np.arange(len(examples.ret), dtype=np.int32))
    with pytest.raises(InsufficientDataError, match=r"lstm\.window"):
        job(every_row_its_own, config).fit(examples.published)

"""The last inputs of a feature set: whole windows of one session, newest last, or a typed error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from market.feature_store import FeatureTable
from tickserve import pipeline
from tickserve.errors import ArtifactError, InsufficientDataError, UsageError

WINDOW, FEATURES = 4, 2


class _Set:
    """What `last_inputs` reads of a feature set: the digest and columns of its spec, and its rows."""

    spec = SimpleNamespace(digest="sha256:spec", columns=("a", "b"))

    def __init__(self, table: FeatureTable) -> None:
        self.table = table

    def load(self) -> FeatureTable:
        return self.table


def feature_set(*lengths: int) -> _Set:
    """Sessions of these lengths; feature 0 of a row is its number."""
    session = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    rows = np.arange(len(session))
    features = np.stack([rows, -rows], axis=1).astype(np.float32)
    nothing = np.full(len(rows), np.nan)
    return _Set(FeatureTable(rows * 10, features, nothing, nothing, session, 1, len(rows), {}))


def manifest(*shape: int, digest: str = "sha256:spec", stride: int = 1) -> Any:
    return SimpleNamespace(
        features=SimpleNamespace(digest=digest, columns=("other",)),
        inputs=(SimpleNamespace(shape=shape),),
        architecture={"stride": stride},
    )


def windows(lengths: tuple[int, ...], count: int) -> list[list[int]]:
    inputs, times = pipeline.last_inputs(feature_set(*lengths), manifest(WINDOW, FEATURES), count)
    assert inputs.shape == (len(times), WINDOW, FEATURES)
    assert inputs.flags.c_contiguous
    assert inputs.dtype == np.float32
    np.testing.assert_array_equal(inputs[:, :, 1], -inputs[:, :, 0])
    np.testing.assert_array_equal(times, inputs[:, -1, 0] * 10)
    return [[int(row) for row in window] for window in inputs[:, :, 0]]


def test_windows_are_the_newest_in_order() -> None:
    assert windows((10,), 2) == [[5, 6, 7, 8], [6, 7, 8, 9]]


def test_no_window_crosses_a_session() -> None:
    assert windows((5, 3, 4), 9) == [[0, 1, 2, 3], [1, 2, 3, 4], [8, 9, 10, 11]]
    assert windows((5, 3, 4), 2) == [[1, 2, 3, 4], [8, 9, 10, 11]]
    assert windows((6, 3), 1) == [[2, 3, 4, 5]]  # the last session is too short: the newest whole window before it


@pytest.mark.parametrize("lengths", [(3,), (3, 3, 3), (1, 1, 1, 1, 1)])
def test_no_session_as_long_as_the_window_is_a_typed_error(lengths: tuple[int, ...]) -> None:
    with pytest.raises(InsufficientDataError, match=rf"at least 4 rows in one session, was {max(lengths)}"):
        windows(lengths, 1)


def test_models_of_one_row_take_any_row() -> None:
    inputs, times = pipeline.last_inputs(feature_set(2, 1), manifest(FEATURES), 2)
    assert inputs[:, 0].tolist() == [1, 2]
    assert times.tolist() == [10, 20]


def test_what_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ArtifactError, match="other features"):
        pipeline.last_inputs(feature_set(9), manifest(WINDOW, FEATURES, digest="sha256:other"), 1)
    with pytest.raises(ArtifactError, match="another pace"):
        pipeline.last_inputs(feature_set(9), manifest(WINDOW, FEATURES, stride=2), 1)
    with pytest.raises(UsageError, match="count"):
        pipeline.last_inputs(feature_set(9), manifest(FEATURES), 0)

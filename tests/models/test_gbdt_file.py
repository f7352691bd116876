"""Booster files from outside are checked before they score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xgboost

from models.gbdt import GbdtClassifier
from tickserve.errors import ArtifactError


@pytest.fixture(scope="module")
def booster() -> xgboost.Booster:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 4)).astype(np.float32)
    data = xgboost.DMatrix(rows, np.digitize(rows[:, 0], [-0.4, 0.4]), nthread=1)
    return xgboost.train({"objective": "multi:softprob", "num_class": 3, "nthread": 1}, data, num_boost_round=3)


def test_round_trip_and_nan(booster: xgboost.Booster, tmp_path: Path) -> None:
    GbdtClassifier(booster, 4).save(tmp_path / "model.ubj")
    again = GbdtClassifier.load(tmp_path / "model.ubj", 4)
    rows = np.array([[0.1, 0, 0, 0], [np.nan, 0, 0, 0], [9, 9, 9, 9]], dtype=np.float32)
    np.testing.assert_array_equal(again.predict(rows), GbdtClassifier(booster, 4).predict(rows))
    np.testing.assert_allclose(again.predict(rows).sum(axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("content", [b"", b"random bytes, no booster", b"{"])
def test_a_file_that_is_no_booster_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.ubj").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.ubj: not an XGBoost model"):
        GbdtClassifier.load(tmp_path / "model.ubj", 4)


def test_another_number_of_features_is_refused(booster: xgboost.Booster, tmp_path: Path) -> None:
    GbdtClassifier(booster, 4).save(tmp_path / "model.ubj")
    with pytest.raises(ArtifactError, match="expected 5, was 4"):
        GbdtClassifier.load(tmp_path / "model.ubj", 5)
    with pytest.raises(ArtifactError, match="features: wrong shape"):
        GbdtClassifier(booster, 4).predict(np.zeros((2, 3), dtype=np.float32))

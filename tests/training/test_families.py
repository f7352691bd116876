"""The matrix of families and data: what does not fit is refused by name, or left out where a profile had asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from market.build import FeatureTable
from tests.training.conftest import quick_config
from tickserve.config import Config
from tickserve.errors import ConfigError, InsufficientDataError
from tickserve.features.spec import default_spec
from tickserve.settings import load_settings
from training.examples import DataMeta, Examples
from training.families import check_fit, fitting, misfit
from training.nets import NetJob
from training.train import train_table

FAMILIES = ("gbdt", "mlp", "lstm", "tcn", "deeplob", "tlob")


def on(meta: DataMeta, kind: str, levels: int) -> DataMeta:
    return replace(meta, kind=kind, levels=levels)


@pytest.mark.parametrize(
    ("kind", "levels", "without"), [("bars", 0, {"deeplob", "tlob"}), ("book", 1, {"deeplob"}), ("book", 5, set())]
)
def test_the_matrix(meta: DataMeta, kind: str, levels: int, without: set[str]) -> None:
    assert {family for family in FAMILIES if misfit(family, on(meta, kind, levels))} == without


def test_enabled_by_name_is_refused_and_by_profile_is_left_out(meta: DataMeta) -> None:
    said: list[str] = []
    with pytest.raises(ConfigError, match="deeplob: wrong kind of data: expected an order book, was bars"):
        fitting(FAMILIES, meta, quick_config(deeplob__enabled=True, tlob__enabled=True), said.append)
    production = load_settings(profile="production", environ={}).config
    assert production.families == FAMILIES
    assert fitting(production.families, meta, production, said.append) == FAMILIES[:4]
    assert said == [
        "deeplob: left out, it reads an order book and this is bars",
        "tlob: left out, it reads an order book and this is bars",
    ]
    with pytest.raises(ConfigError, match="tlob: wrong kind of data"):
        fitting(("tlob",), meta, production, said.append)
    with pytest.raises(ConfigError, match="at least 2 levels, was a quote feed"):
        check_fit("deeplob", on(meta, "book", 1))


def test_refused_before_anything_is_trained(
    table: FeatureTable, meta: DataMeta, config: Config, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="tlob: wrong kind of data"):
        train_table(table, meta, config, tmp_path, families=("gbdt", "tlob"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["tcn", "deeplob", "tlob"])
def test_a_window_longer_than_the_data_is_refused(family: str, examples: Examples, config: Config) -> None:
    """Input 68, for the families after the LSTM."""
    tiny = replace(examples, features=examples.features[:20])
    with pytest.raises(InsufficientDataError, match=rf"{family}\.window.*at least 24 rows"):
        NetJob(family, tiny, getattr(config, family), 7)


@pytest.mark.parametrize("family", ["mlp", "tcn", "deeplob", "tlob"])
def test_every_family_is_trained_by_the_one_job(family: str, examples: Examples, config: Config) -> None:
    """On columns named as a book's: what is tested is the job, not the forecast."""
    named = replace(examples, columns=default_spec("book", 5).columns[: examples.features.shape[1]])
    settings = getattr(config, family).model_copy(update={"max_train_windows": 400, "epochs": 1, "hidden": 8})
    job = NetJob(family, named, settings, 7)
    fit = job.fit(named.folds[0])
    rows = job.eligible(named.folds[0].rows.test)[:50]
    said = job.predict(fit, rows)
    assert fit.rows == 400
    assert job.tensor.shape == fit.model.input_shape
    assert said.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert said.std(axis=0).min() > 0
    assert fit.model.architecture()["features"] == examples.features.shape[1]

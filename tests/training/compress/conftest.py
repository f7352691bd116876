"""Teachers for the tests of compression: small ones on the first minutes of real bars, and what they learned from."""

from __future__ import annotations

from pathlib import Path

import pytest

from market.build import FeatureTable
from tests.training.conftest import quick_config
from tickserve.config import Config
from training.bundles import TrainedBundle
from training.compress.chain import teacher_of
from training.compress.generation import Teacher
from training.compress.recipe import Recipe
from training.compress.teacher import Data
from training.examples import DataMeta, prepare
from training.train import train_table

SMALL = {"mlp__enabled": True, "mlp__hidden": 24, "mlp__epochs": 3, "mlp__activation": "relu"}
DENSE = {"kind": "distill", "family": "mlp", "settings": {"hidden": 16, "activation": "relu"}, "teacher_weight": 0.5}
WEIGHTS = {"kind": "quantize", "method": "weights"}


def quiet(text: str) -> None:
    """Say nothing."""


def recipe_of(*steps: dict[str, object], **keys: object) -> Recipe:
    """A recipe of these steps whose gates a small model on few rows can pass."""
    gates = {"min_ic_share": 0.9, "max_ic_loss": 0.01, "max_latency_ratio": 1.25, "max_size_ratio": 1.0}
    given = {"name": "test", "latency_calls": 200, "gates": gates, "step": list(steps)} | keys
    return Recipe.model_validate(given)


@pytest.fixture(scope="session")
def small_config() -> Config:
    return quick_config(**SMALL)


@pytest.fixture(scope="session")
def data(table: FeatureTable, meta: DataMeta, small_config: Config) -> Data:
    return Data(prepare(table, meta, small_config), meta, small_config)


@pytest.fixture(scope="session")
def bundles(
    table: FeatureTable, meta: DataMeta, small_config: Config, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, TrainedBundle]:
    out = tmp_path_factory.mktemp("teachers")
    made = train_table(table, meta, small_config, out, ["gbdt", "mlp"])
    return {bundle.manifest.family: bundle for bundle in made}


@pytest.fixture(scope="session")
def teacher(bundles: dict[str, TrainedBundle], data: Data) -> Teacher:
    """The net, in every fold."""
    return teacher_of([bundles["mlp"].path], data, lambda text: None)[0]


@pytest.fixture(scope="session")
def folder(bundles: dict[str, TrainedBundle]) -> Path:
    """The net's bundle."""
    return bundles["mlp"].path

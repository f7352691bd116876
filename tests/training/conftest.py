"""A small real market: the first minutes of BTCUSD on Bitfinex, with a handful of features computed here with numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from market.build import FeatureTable
from tickserve.config import Config
from tickserve.settings import load_settings
from training.bundles import TrainedBundle
from training.examples import DataMeta, Examples, prepare
from training.train import train_table

ROWS = 8_000
FILE = "BTCUSD_1m_201804_201812.parquet"
OVERRIDES: dict[str, Any] = {
    "validation.folds": 2,
    "gbdt.rounds": 12,
    "gbdt.threads": 1,
    "lstm.window": 10,
    "lstm.hidden": 8,
    "lstm.epochs": 2,
    "lstm.max_train_windows": 2_000,
    "export.parity_rows": 300,
}


def quick_config(**extra: Any) -> Config:
    """The quick profile, smaller still."""
    changes = {name.replace("__", "."): value for name, value in extra.items()}
    return load_settings(environ={}, overrides=OVERRIDES | changes).config


def bar_table(folder: Path, rows: int = ROWS) -> FeatureTable:
    """Real bars as a feature table: returns, volatility, range, volume; two sessions, and a column with holes."""
    import pyarrow.parquet as pq

    bars = pq.read_table(folder / "bars_1m" / "bitfinex" / FILE).slice(0, rows)
    column = {name: bars[name].to_numpy() for name in bars.column_names}
    close = column["close"].astype(np.float64)
    move = np.diff(np.log(close), prepend=np.log(close[0]))
    features = [np.log(close) - np.log(np.roll(close, k)) for k in (1, 5, 15)]
    features += [np.sqrt(np.convolve(move**2, np.ones(20) / 20)[:rows])]
    features += [(column["high"] - column["low"]) / close, np.log1p(column["volume"])]
    features += [np.where(np.arange(rows) % 7 == 0, np.nan, move)]
    return FeatureTable(
        ts_ns=(column["timestamp_ms"] + 60_000) * 1_000_000,
        features=np.stack(features, axis=1).astype(np.float32),
        mid=close,
        half_spread=np.full(rows, np.nan),
        session=(np.arange(rows) >= rows // 3).astype(np.int32),
        stride=1,
        events_read=rows,
        quality={},
    )


COLUMNS = ("bar_return_1", "bar_return_5", "bar_return_15", "volatility", "bar_range", "volume", "holes")


def meta_of(columns: tuple[str, ...] = COLUMNS) -> DataMeta:
    """Describes `bar_table`."""
    return DataMeta("btcusd", "bars", 0, "test-bars", "sha256:" + "0" * 64, columns, {FILE: "sha256:" + "1" * 64})


@dataclass(frozen=True)
class Trained:
    """One run of both families: what it was given, what it gave, and what it said meanwhile."""

    examples: Examples
    config: Config
    out: Path
    bundles: dict[str, TrainedBundle]
    said: list[str]


@pytest.fixture(scope="session")
def table(market_data: Path) -> FeatureTable:
    return bar_table(market_data)


@pytest.fixture(scope="session")
def meta() -> DataMeta:
    return meta_of()


@pytest.fixture(scope="session")
def config() -> Config:
    return quick_config()


@pytest.fixture(scope="session")
def examples(table: FeatureTable, meta: DataMeta, config: Config) -> Examples:
    return prepare(table, meta, config)


@pytest.fixture(scope="session")
def trained(
    table: FeatureTable, meta: DataMeta, config: Config, examples: Examples, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    out, said = tmp_path_factory.mktemp("bundles"), []
    bundles = train_table(table, meta, config, out, progress=said.append)
    return Trained(examples, config, out, {bundle.path.name: bundle for bundle in bundles}, said)

"""Real bars of three symbols, the first days each, and a file that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.training.conftest import quick_config
from tickserve.config import Config

ROWS = 3_000


def cut(market_data: Path, folder: Path, *symbols: str) -> None:
    """Write the first rows of symbols into `folder`."""
    folder.mkdir(exist_ok=True)
    for symbol in symbols:
        name = f"{symbol}_1m_201804_201812.parquet"
        pq.write_table(pq.read_table(market_data / "bars_1m/bitfinex" / name).slice(0, ROWS), folder / name)


@pytest.fixture(scope="session")
def small_universe(market_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bitfinex")
    cut(market_data, folder, "BTCUSD", "ETHUSD")
    (folder / "BAD.parquet").write_bytes(b"PAR1 and no more")
    return folder


def universe_config(scratch: Path, **extra: Any) -> Config:
    given = {
        "lstm__enabled": False,
        "gbdt__rounds": 6,
        "features__store": str(scratch / "features"),
        "universe__folder": str(scratch / "runs"),
        "universe__memory_mb": 8_192,
    }
    return quick_config(**(given | extra))

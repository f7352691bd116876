"""Online rows are the training matrix's rows, bit for bit, on recorded files of several formats."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from market.build import build_features
from market.feature_store import FeatureTable
from market.readers import open_source
from market.sessions import SessionCounter
from tickserve.config import FeatureSettings
from tickserve.errors import SchemaError
from tickserve.events import Events, book_columns
from tickserve.features.engine import FeatureEngine
from tickserve.features.spec import FeatureSpec, default_bars_spec, default_book_spec, default_spec
from tickserve.stream._definition import Definition
from tickserve.stream._rows import Row, RowMaker

# A book with trades, quotes without sizes that lock and cross, bars with splits, bars as text.
FILES = (
    "binance_l2_stream/usdm_btcusdt_20230405.us.jsonl.gz",
    "fx_tick/fxcm_eurusd/20140512_quote.zip",
    "bars_1d/lean_us/aapl.zip",
    "bars_1m/nautilus/btc-perp-20211231-20220201_1m.csv.gz",
)
MAX_ROWS = 9_000


def definition(spec: FeatureSpec, stride: int = 1) -> Definition:
    factor = 1.5 if spec.kind == "bars" else None
    return Definition(spec, stride, factor, input="features", window=None, state=())


def online(path: Path, spec: FeatureSpec, stride: int) -> list[tuple[int, Row]]:
    """Time and row of every event that is kept, met one by one."""
    maker, kept = RowMaker(definition(spec, stride)), []
    for events in open_source([path], levels=5).chunks(50_000):
        for ts_ns, values in zip(events.ts_ns.tolist(), events.values, strict=True):
            row = maker.step(ts_ns, values)
            if row.kept:
                kept.append((ts_ns, row))
    return kept


@pytest.mark.parametrize("name", FILES, ids=lambda name: name.split("/")[0])
def test_online_rows_are_the_training_matrix(market_data: Path, tmp_path: Path, name: str) -> None:
    source = open_source([market_data / name], levels=5)
    spec = default_spec(source.kind, source.levels)
    table: FeatureTable = build_features(source, spec, FeatureSettings(max_rows=MAX_ROWS, store=str(tmp_path))).load()
    assert len(table) > 1_000
    kept = online(market_data / name, spec, table.stride)
    assert [ts_ns for ts_ns, _ in kept] == table.ts_ns.tolist()
    features = np.stack([row.features for _, row in kept])
    expected = np.where(np.isinf(table.features), np.float32(np.nan), table.features)
    assert features.tobytes() == expected.tobytes()
    # Sessions are the same, though training numbers them over what it keeps and what it does not.
    assert [row.session for _, row in kept] == table.session.tolist()


def test_a_file_with_splits_has_more_sessions_than_gaps(market_data: Path) -> None:
    source = open_source([market_data / "bars_1d/lean_us/aapl.zip"])
    kept = online(market_data / "bars_1d/lean_us/aapl.zip", default_bars_spec(), 1)
    assert source.kind == "bars"
    assert kept[-1][1].session >= 2


def bars(close: list[float]) -> np.ndarray:
    return np.array([[price, price, price, price, 1.0] for price in close])


def test_jumps_and_holes_cut_sessions_as_the_training_does() -> None:
    spec = FeatureSpec("tiny", "bars", 0, default_bars_spec().features[:2], 10**9, 3)
    random = np.random.default_rng(3)
    close = np.exp(np.cumsum(random.normal(0, 0.2, 600)))
    close[random.random(600) < 0.05] = math.nan
    close[random.random(600) < 0.02] = 0.0
    times = np.cumsum(random.choice([10**8, 5 * 10**9], 600, p=[0.97, 0.03]))
    values = bars(close.tolist())
    _, index = FeatureEngine(spec).batch_with_index(Events("bars", 0, times, values))
    session, place = SessionCounter("bars").advance(index, np.where(close > 0, close, math.nan))
    maker = RowMaker(definition(spec))
    rows = [maker.step(int(ts), row) for ts, row in zip(times, values, strict=True)]
    assert [row.session for row in rows] == session.tolist()
    assert [row.place for row in rows] == place.tolist()
    assert [row.kept for row in rows] == (place >= 3).tolist()
    assert session[-1] > 10


def test_a_refused_event_moves_nothing() -> None:
    spec = default_book_spec(1)
    good = np.array([0, 0, 0, 0, 100.0, 1, 100.1, 1])
    one, other = RowMaker(definition(spec)), RowMaker(definition(spec))
    for step in range(300):
        if step % 7 == 3:
            with pytest.raises(SchemaError):
                one.step(step * 10**6, good[:5])
            with pytest.raises(SchemaError):
                one.step(step * 10**6, np.array(["x"] * len(book_columns(1))))
        rows = [maker.step(step * 10**6, good + step * 0.01) for maker in (one, other)]
        assert rows[0].features.tobytes() == rows[1].features.tobytes()
        assert rows[0][1:] == rows[1][1:]


def test_a_restart_is_a_new_session_at_the_same_pace() -> None:
    spec = default_book_spec(1)
    row = np.array([0, 0, 0, 0, 100.0, 1, 100.1, 1])
    maker, fresh = RowMaker(definition(spec, stride=2)), RowMaker(definition(spec, stride=2))
    for step in range(250):
        maker.step(step, row)
    maker.restart()
    after = [maker.step(1_000 + step, row + step) for step in range(250)]
    first = [fresh.step(1_000 + step, row + step) for step in range(250)]
    assert [made.features.tobytes() for made in after] == [made.features.tobytes() for made in first]
    assert after[0].place == 0
    assert after[0].session == 1
    assert not any(made.kept for made in after[:200])
    assert any(made.kept for made in after[200:])

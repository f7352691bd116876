"""PSI on a recorded market: chance is not drift, one feature computed otherwise is, and so is another half-day."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.psi import day, indices
from tickserve.reference import reference_of

pytestmark = pytest.mark.system  # reading a day of quotes takes half a minute

DAY = ("us_equity_tick/aig/20131007_quote.zip", "us_equity_tick/aig/20131007_trade.zip")


@pytest.fixture(scope="module")
def market(market_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], np.ndarray]:
    """Columns and rows [N, F] of a whole day of a share, as training takes them."""
    return day([market_data / name for name in DAY], tmp_path_factory.mktemp("market"))


def shuffled(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    drawn = rows[np.random.default_rng(7).permutation(len(rows))]
    return drawn[: len(rows) // 2], drawn[len(rows) // 2 :]


def test_halves_drawn_by_lot_show_no_drift(market: tuple[tuple[str, ...], np.ndarray]) -> None:
    columns, rows = market
    assert len(rows) > 2_000
    found = indices(columns, *shuffled(rows))
    assert max(found.values()) < 0.1


@pytest.mark.parametrize("spoil", ["shifted", "scaled", "missing", "stuck"])
def test_one_feature_that_is_computed_otherwise_is_caught_and_alone(
    spoil: str, market: tuple[tuple[str, ...], np.ndarray]
) -> None:
    columns, rows = market
    training, served = shuffled(rows)
    # One that moves, and is there: the first by name whose deciles are ten.
    reference = reference_of(training)
    place = next(at for at, each in enumerate(reference.columns) if len(each.edges) == 9 and each.missing == 0)
    served = served.copy()
    values = served[:, place]
    changed = {
        "shifted": values + 2 * values.std(),
        "scaled": values * 5,
        "missing": np.where(np.arange(len(values)) % 2, np.nan, values),
        "stuck": np.full_like(values, values[0]),
    }
    served[:, place] = changed[spoil]
    found = indices(columns, training, served)
    assert found.pop(columns[place]) > 0.25
    assert max(found.values()) < 0.1


def test_another_part_of_the_day_is_another_market(market: tuple[tuple[str, ...], np.ndarray]) -> None:
    columns, rows = market
    half = len(rows) // 2
    in_time, by_lot = indices(columns, rows[:half], rows[half:]), indices(columns, *shuffled(rows))
    assert sum(in_time[name] > by_lot[name] for name in columns) > 0.8 * len(columns)
    assert list(in_time)[:3] == [
        "time_of_day_cos",
        "time_of_day_sin",
        "realised_volatility_60s",
    ]  # as docs/drift.md tells
    assert in_time["realised_volatility_60s"] > 1

"""What the guards refuse, what they let pass, and that no honest column comes near their bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from market import labels
from tickserve import pipeline
from tickserve.errors import GateRefusedError
from tickserve.settings import load_settings
from training.examples import DataMeta, Examples, prepare
from training.leakage import partial_rank_correlation, refuse_leaks, refuse_too_good

Leak = Callable[[Examples], np.ndarray]


def ahead(examples: Examples, rows: int) -> np.ndarray:
    return labels.forward_returns_rows(examples.mid, rows, session=examples.session)[0]


def halfway(examples: Examples) -> np.ndarray:
    rows = np.arange(len(examples.end))
    middle = rows + (examples.end - rows + 1) // 2
    return np.where(examples.end >= 0, examples.mid[np.maximum(middle, 0)] / examples.mid - 1, np.nan)


def future_price(examples: Examples) -> np.ndarray:
    return np.where(examples.end >= 0, examples.mid[np.maximum(examples.end, 0)], np.nan)


def noisy(examples: Examples, share: float) -> np.ndarray:
    spread = share * np.nanstd(examples.ret)
    return examples.ret + np.random.default_rng(0).normal(0.0, spread, len(examples.ret))


LEAKS: dict[str, Leak] = {
    "the label": lambda made: made.ret,
    "its opposite": lambda made: -made.ret,
    "its class": lambda made: np.sign(made.ret),
    "with noise": lambda made: noisy(made, 0.5),
    "half the horizon": halfway,
    "the next row": lambda made: ahead(made, 1),
    "the future price": future_price,
    "its logarithm": lambda made: -np.log(future_price(made)),
    "its ratio": lambda made: future_price(made) / made.mid,
}  # fmt: skip


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> tuple[Examples, tuple[str, ...]]:
    """A simulated book with the columns of the default specification."""
    store = str(tmp_path_factory.mktemp("store"))
    config = load_settings(environ={}, overrides={"features.store": store, "features.max_rows": 20_000}).config
    built = pipeline.build_features(pipeline.open_source([], config), config)
    meta = DataMeta(built.symbol, built.kind, 5, "book", built.spec.digest, built.spec.columns, {}, simulated=True)
    return prepare(built.load(), meta, config), built.spec.columns


def with_leak(examples: Examples, leak: Leak) -> Examples:
    return replace(examples, features=np.column_stack([examples.features, leak(examples)]).astype(np.float32))


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_into_real_bars_is_refused(examples: Examples, meta: DataMeta, name: str) -> None:
    with pytest.raises(GateRefusedError, match="leaked"):
        refuse_leaks(with_leak(examples, LEAKS[name]), (*meta.columns, "leaked"))


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_into_a_book_is_refused(book: tuple[Examples, tuple[str, ...]], name: str) -> None:
    examples, columns = book
    with pytest.raises(GateRefusedError, match="leaked"):
        refuse_leaks(with_leak(examples, LEAKS[name]), (*columns, "leaked"))


def test_honest_columns_pass(examples: Examples, meta: DataMeta, book: tuple[Examples, tuple[str, ...]]) -> None:
    refuse_leaks(examples, meta.columns)
    refuse_leaks(*book)


def test_price_level_and_clock_are_no_leaks(examples: Examples, meta: DataMeta) -> None:
    for honest in (examples.mid, 1.0 / examples.mid, np.arange(len(examples.mid), dtype=np.float64)):
        given = with_leak(examples, lambda made, column=honest: column)  # type: ignore[misc]
        refuse_leaks(given, (*meta.columns, "level"))


@pytest.mark.parametrize("file", ["spot_ethusdt_20240808", "usdm_btcusdt_20240808"])  # a wide tick, a narrow one
def test_real_books_pass_and_a_noisy_answer_in_them_does_not(market_data: Path, tmp_path: Path, file: str) -> None:
    config = load_settings(environ={}, overrides={"features.store": str(tmp_path)}).config
    source = pipeline.open_source([market_data / "binance_l2_stream" / f"{file}.jsonl.gz"], config)
    built = pipeline.build_features(source, config)
    meta = DataMeta(built.symbol, built.kind, 5, "book", built.spec.digest, built.spec.columns, {})
    examples = prepare(built.load(), meta, config)
    refuse_leaks(examples, meta.columns)
    with pytest.raises(GateRefusedError, match="leaked"):
        refuse_leaks(with_leak(examples, LEAKS["with noise"]), (*meta.columns, "leaked"))


def test_a_score_too_good_to_be_true_is_refused_where_there_is_evidence() -> None:
    refuse_too_good({"ic": 0.7, "n_eff": 5_000.0}, "gbdt")
    refuse_too_good({"ic": None, "n_eff": 5_000.0}, "gbdt")
    refuse_too_good({"ic": 0.9, "n_eff": 20.0}, "gbdt")
    for ic in (0.85, -0.85):
        with pytest.raises(GateRefusedError, match="too good to be true"):
            refuse_too_good({"ic": ic, "n_eff": 60.0}, "gbdt")


def test_what_both_owe_to_a_third_is_no_correlation() -> None:
    rng = np.random.default_rng(2)
    level, one, two = (rng.normal(size=5_000) for _ in range(3))
    assert abs(partial_rank_correlation(level + 0.1 * one, level + 0.1 * two, level)) < 0.2
    assert partial_rank_correlation(level + 0.1 * one, level + 0.1 * one, level) == pytest.approx(1.0)
    assert partial_rank_correlation(level, level, level) == 0.0

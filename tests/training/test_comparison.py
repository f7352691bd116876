"""The comparison with the best baseline: luck is not skill, and skill is found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from training import cells as cells_of_rows
from training import intervals
from training.cells import MODEL, Cells
from training.comparison import Judgement, difference, judge
from training.intervals import cell_starts
from training.metrics import pool

HORIZON = 10
FOLDS = 3


def market(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A random walk: table rows, the rows where labels end, and returns that overlap as real ones do."""
    step = rng.normal(size=rows + HORIZON)
    total = np.concatenate([[0.0], np.cumsum(step)])
    at = np.arange(rows, dtype=np.int64)
    return at, at + HORIZON, total[HORIZON : rows + HORIZON] - total[:rows]


def smooth(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Noise as persistent as a feature: neighbouring rows say nearly the same."""
    return np.convolve(rng.normal(size=rows + HORIZON - 1), np.ones(HORIZON), mode="valid")


def fold_metrics(score: np.ndarray, ret: np.ndarray, mcc: float = 0.1) -> dict[str, float | int | None]:
    return {
        "rows": len(ret), "n_eff": len(ret) / HORIZON, "macro_f1": 0.4, "mcc": mcc,
        "ic": None if np.ptp(score) == 0 else float(spearmanr(score, ret).statistic),
        "ic_t": None, "hit_rate": 0.5, "calls": len(ret), "trades": 9, "pnl_bps": -1.0, "pnl_gross_bps": 1.0,
    }  # fmt: skip


def judged(seed: int, scores_of: Any, *, rows: int = 4_000, mcc: Mapping[str, float] | None = None) -> Judgement:
    """Three folds, in each of which `scores_of(rng, ret, fold)` gives a score per predictor."""
    rng = np.random.default_rng(seed)
    cells, table = [], []
    for fold in range(FOLDS):
        at, end, ret = market(rng, rows)
        scores = scores_of(rng, ret, fold)
        cells.append(Cells.of(at, end, ret, scores))
        measured = {name: fold_metrics(score, ret, (mcc or {}).get(name, 0.1)) for name, score in scores.items()}
        table.append({"metrics": measured.pop(MODEL), "baselines": measured})
    others = {name: pool([row["baselines"][name] for row in table]) for name in table[0]["baselines"]}
    return judge(table, {"model": pool([row["metrics"] for row in table]), "baselines": others}, cells, 7)


def noise(rng: np.random.Generator, ret: np.ndarray, fold: int) -> dict[str, np.ndarray]:
    return {MODEL: smooth(rng, len(ret)), "majority": np.zeros(len(ret)), "linear": smooth(rng, len(ret))}


def skilled(rng: np.random.Generator, ret: np.ndarray, fold: int) -> dict[str, np.ndarray]:
    scale = ret.std()
    strong = ret / scale + 0.5 * smooth(rng, len(ret))
    return {MODEL: strong, "majority": np.zeros(len(ret)), "linear": ret / scale + smooth(rng, len(ret))}


def test_cells_are_one_horizon_wide() -> None:
    rows = np.array([0, 1, 2, 7, 8, 30, 31], dtype=np.int64)
    np.testing.assert_array_equal(cell_starts(rows, rows + 5), [0, 3, 5])
    at = np.arange(1_000, dtype=np.int64)
    np.testing.assert_array_equal(cell_starts(at, at + HORIZON), at[::HORIZON])
    assert cell_starts(at[:0], at[:0]).size == 0


def test_the_difference_is_that_of_the_folds_rank_correlations() -> None:
    rng = np.random.default_rng(3)
    folds, expected, total = [], 0.0, 0
    for rows in (900, 2_100):
        at, end, ret = market(rng, rows)
        scores = {MODEL: ret + 3 * smooth(rng, rows), "linear": smooth(rng, rows)}
        folds.append(Cells.of(at, end, ret, scores))
        expected += rows * float(spearmanr(scores[MODEL], ret).statistic - spearmanr(scores["linear"], ret).statistic)
        total += rows
    gain, interval = difference(folds, MODEL, "linear", 7)
    assert gain == pytest.approx(expected / total)
    assert interval is not None
    assert interval[0] < gain < interval[1]
    assert difference(folds, MODEL, "linear", 7) == (gain, interval)


def test_a_model_equal_to_its_best_baseline_does_not_beat_it() -> None:
    def twin(rng: np.random.Generator, ret: np.ndarray, fold: int) -> dict[str, np.ndarray]:
        scores = skilled(rng, ret, fold)
        return scores | {MODEL: scores["linear"]}

    found = judged(1, twin)
    assert (found.outcome, found.baseline, found.ic_difference) == ("none", "linear", 0.0)
    assert found.interval == (0.0, 0.0)
    assert found.folds_won == 0
    assert found.words == "no clear difference from linear"


def test_noise_does_not_beat_noise_more_often_than_the_interval_allows() -> None:
    wins = sum(judged(seed, noise, rows=1_000).outcome == "better" for seed in range(60))
    assert wins <= 6


def test_an_interval_that_forgets_overlap_would_call_noise_skill(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: with rows drawn one by one, labels of ten rows look like ten labels."""
    monkeypatch.setattr(cells_of_rows, "cell_starts", lambda rows, end: np.arange(len(rows)))
    monkeypatch.setattr(intervals, "MIN_BLOCK_CELLS", 1)
    monkeypatch.setattr(intervals.math, "ceil", lambda value: 1)
    wins = sum(judged(seed, noise, rows=1_000).outcome == "better" for seed in range(60))
    assert wins > 6


def test_skill_is_found_and_so_is_its_lack() -> None:
    better = judged(1, skilled)
    assert better.outcome == "better"
    assert better.interval is not None
    assert better.interval[0] > 0
    assert better.folds_won == FOLDS

    def swapped(rng: np.random.Generator, ret: np.ndarray, fold: int) -> dict[str, np.ndarray]:
        scores = skilled(rng, ret, fold)
        return scores | {MODEL: scores["linear"], "linear": scores[MODEL]}

    worse = judged(1, swapped)
    assert worse.outcome == "worse"
    assert worse.words == "worse than linear"


def test_a_better_ranking_with_a_lower_mcc_is_no_clear_difference() -> None:
    found = judged(1, skilled, mcc={"majority": 0.2})
    assert found.outcome == "none"
    assert found.higher_mcc == ("majority",)


def test_a_model_that_ranks_in_one_fold_of_three_is_not_judged_by_that_fold_alone() -> None:
    def lucky(rng: np.random.Generator, ret: np.ndarray, fold: int) -> dict[str, np.ndarray]:
        scores = skilled(rng, ret, fold)
        return scores if fold == 0 else scores | {MODEL: np.full(len(ret), 0.25)}

    found = judged(1, lucky)
    assert found.outcome == "worse"
    assert found.folds_won == 1


def test_the_sentence_names_folds_without_ranks_and_what_trades_earn() -> None:
    pooled = {"ic": 0.1, "mcc": 0.2, "ranked_folds": 1, "pnl_bps": -1.5}
    words = Judgement("none", "linear", -0.03, (-0.1, 0.04), 1, 3, ("linear",)).sentence(pooled)
    for shown in (
        "no clear difference from linear: IC +0.100", "-0.030 from that of linear", "-0.100 to +0.040",
        "ranked in 1 of 3 folds only", "ahead in 1 of 3", "lower than linear", "PnL -1.50 bp a trade after costs",
    ):  # fmt: skip
        assert shown in words
    assert "only" not in Judgement("none", "linear", 0.0, None, 0, 3, ()).sentence(pooled | {"ranked_folds": 3})


def test_too_few_independent_rows_decide_nothing() -> None:
    found = judged(1, skilled, rows=100)
    assert (found.outcome, found.interval) == ("none", None)

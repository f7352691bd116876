"""How the exporter's benchmark judges: paired rounds, an interval, and an exit code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks import exporter
from benchmarks.exporter import interval, main, verdict
from benchmarks.harness import Times

ROUNDS, CALLS = 40, 50


def taken(ratio: float, noise: float, seed: int) -> list[Times]:
    """Calls of rounds that are slow and fast together, each client's with noise of its own."""
    spells = 1 + np.random.default_rng(1).random(ROUNDS)
    own = 1 + noise * np.random.default_rng(seed).normal(size=ROUNDS)
    return [np.full(CALLS, each) for each in 100 * ratio * spells * own]


@pytest.mark.parametrize(
    ("ratio", "noise", "says"),
    [
        (1.0, 0.001, "within 2 %"),
        (1.015, 0.001, "within 2 %"),
        (1.05, 0.001, "above 2 %"),
        (1.02, 0.1, "not resolved on this machine"),
    ],
)
def test_the_bar_is_held_against_the_interval(ratio: float, noise: float, says: str) -> None:
    low, high = interval(taken(ratio, noise, 2), taken(1.0, noise, 3))
    assert low <= high
    assert verdict(low, high) == says


@pytest.mark.parametrize(("low", "high", "code"), [(1.03, 1.05, 1), (1.0, 1.05, 0), (0.99, 1.01, 0)])
def test_the_exit_code_is_1_when_it_is_above(
    monkeypatch: pytest.MonkeyPatch, low: float, high: float, code: int
) -> None:
    result: dict[str, Any] = {"judged": {"low": low, "high": high}}
    monkeypatch.setattr(exporter, "run", lambda _: result)
    assert main(["--json"]) == code

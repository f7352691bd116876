"""Limits that warn, fail or are not looked at; each with a case on either side."""

from __future__ import annotations

from typing import Any

import pytest

from tickserve.config import LimitSettings
from tickserve.errors import ConfigError, LimitExceededError
from tickserve.limits import hold, not_kept, of_features, of_training
from tickserve.settings import load_settings

KEPT: dict[str, Any] = {"seconds": 10.0, "memory_mb": 100.0, "hit_rate": 0.6}
CASES = [
    ("train_s", {"seconds": 300.5}, {"seconds": 300.0}),
    ("train_memory_mb", {"memory_mb": 4_096.5}, {"memory_mb": 4_096.0}),
    ("hit_rate", {"hit_rate": 0.499}, {"hit_rate": 0.5}),
    ("hit_rate", {"hit_rate": None}, {"hit_rate": 0.5}),
]


def held(gates: Any) -> list[str]:
    said: list[str] = []
    hold(gates, said.append)
    return said


@pytest.mark.parametrize(("key", "broken", "kept"), CASES)
def test_a_training_limit_warns_fails_or_is_not_looked_at(key: str, broken: Any, kept: Any) -> None:
    warn, fail, off = (LimitSettings.model_validate({f"on_{key}": action}) for action in ("warn", "fail", "off"))
    (line,) = held(of_training(warn, **KEPT | broken))
    assert f"limits.{key}" in line
    assert [gate.name for gate in not_kept(of_training(warn, **KEPT | broken))] == [f"limit.{key}"]
    with pytest.raises(LimitExceededError, match=f"limits.{key}: a limit was not kept: expected at") as caught:
        hold(of_training(fail, **KEPT | broken), lambda _: None)
    assert caught.value.exit_code == 1
    assert held(of_training(off, **KEPT | broken)) == []
    for settings in (warn, fail, off):
        assert held(of_training(settings, **KEPT | kept)) == []


def test_the_limit_of_features() -> None:
    assert held(of_features(LimitSettings(), 60.0)) == []
    assert held(of_features(LimitSettings(), 60.1)) == [
        "limit not kept: building features took 60.1 s; limits.features_s is at most 60"
    ]
    with pytest.raises(LimitExceededError, match=r"limits.features_s.*at most 0.5, was 0.7"):
        hold(of_features(LimitSettings(features_s=0.5, on_features_s="fail"), 0.7), lambda _: None)


def test_every_broken_limit_is_said_before_one_fails() -> None:
    said: list[str] = []
    gates = of_training(LimitSettings(on_hit_rate="fail"), 301.0, 5_000.0, 0.1)
    with pytest.raises(LimitExceededError, match="hit_rate"):
        hold(gates, said.append)
    assert len(said) == 3


def test_an_unknown_action_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"limits\.on_hit_rate"):
        load_settings(environ={"TICKSERVE_LIMITS__ON_HIT_RATE": "shrug"})

from __future__ import annotations

import dataclasses
import inspect
import json
import pickle
from typing import Any

import numpy as np
import pytest

from tickserve.signal import Signal, make_signal


def signal(**changes: Any) -> Signal:
    fields: dict[str, Any] = {
        "status": "OK",
        "probabilities": np.array([[0.2, 0.3, 0.5]], np.float32),
        "score": np.array([0.3], np.float32),
        "decision": ("up",),
        "classes": ("down", "flat", "up"),
        "model": "m",
        "version": 3,
        "bundle_digest": "sha256:00",
        "bundle_id": -1,
        "feature_digest": "sha256:11",
        "request_id": "r",
        "event_age_us": None,
        "stage_us": {"total": 1.5},
        "flags": ("out_of_range:spread",),
    }
    return Signal(**(fields | changes))


def test_a_signal_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        signal().status = "STALE"  # type: ignore[misc]


def test_the_quick_way_to_make_one_makes_the_same() -> None:
    slow = signal(reason="because", fallback="hold", replica="here:1", attempts=2, state={"hidden": np.zeros((1, 2))})
    values = {field.name: getattr(slow, field.name) for field in dataclasses.fields(Signal)}
    quick = make_signal(**values)
    assert type(quick) is Signal
    assert repr(quick) == repr(slow)
    assert all(getattr(quick, name) is value for name, value in values.items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        quick.status = "STALE"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del quick.status
    assert not hasattr(quick, "__dict__")
    assert pickle.loads(pickle.dumps(quick)).bundle_digest == "sha256:00"
    assert dataclasses.replace(quick, version=4).version == 4
    assert quick != slow  # as ever: a signal is equal to itself alone
    assert list(inspect.signature(make_signal).parameters) == list(values)


def test_json_has_every_field_once_and_only_plain_values() -> None:
    value = signal().to_json()
    assert list(value) == [field.name for field in dataclasses.fields(Signal)]
    assert json.loads(json.dumps(value)) == value
    assert value["decision"] == ["up"]


def test_a_signal_without_numbers_says_so() -> None:
    stale = signal(status="STALE", probabilities=None, score=None, decision=None)
    assert not stale.ok
    assert signal().ok
    assert [stale.to_json()[name] for name in ("probabilities", "score", "decision")] == [None] * 3

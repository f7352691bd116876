from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from tickserve.signal import Signal


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

"""Journal records as a client writes them, of a model whose reference is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tickserve.client import Decision, Tensor
from tickserve.journal._schema import DecisionRecord, decode, encode_decision
from tickserve.manifest import Manifest
from tickserve.reference import reference_of
from tickserve.signal import Signal
from tickserve.testing import make_manifest

MODEL, CLASSES = "mock-model", ("down", "flat", "up")
START_NS = 1_700_000_000 * 10**9
MakeRecord = Callable[..., DecisionRecord]


def normal(rows: int, seed: int = 7, columns: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """A model of three features, each normal in training; so is its score, about."""
    features = normal(20_000, 1)
    return make_manifest(reference=reference_of(features, np.tanh(features[:, 0]) * 0.9))


def probabilities_of(score: np.ndarray) -> np.ndarray:
    up = (1 + score) / 2
    return np.stack([1 - up, np.zeros_like(up), up], axis=1).astype(np.float32)


@pytest.fixture(scope="session")
def record(manifest: Manifest) -> MakeRecord:
    """Makes a record of one decision over rows [B, F] or windows [B, T, F]; it went through the journal's own bytes."""

    def make(
        rows: np.ndarray,
        *,
        at_s: float = 0.0,
        of: Manifest = manifest,
        request_id: str = "r",
        probabilities: np.ndarray | None = None,
        **changes: Any,
    ) -> DecisionRecord:
        newest = rows.reshape(len(rows), -1, rows.shape[-1])[:, -1]
        said = probabilities_of(np.tanh(newest[:, 0]) * 0.9) if probabilities is None else probabilities
        score = (said[:, 2] - said[:, 0]).astype(np.float32)
        signal: dict[str, Any] = {
            "status": "OK",
            "probabilities": said.astype(np.float32),
            "score": score,
            "decision": tuple(CLASSES[index] for index in said.argmax(axis=1)),
            "classes": CLASSES,
            "model": of.name,
            "version": 1,
            "bundle_digest": of.digest(),
            "bundle_id": of.bundle_id(),
            "feature_digest": of.features.digest,
            "request_id": request_id,
            "event_age_us": None,
            "stage_us": {"total": 1.0},
            "flags": (),
        }
        decision: dict[str, Any] = {
            "wall_ns": START_NS + int(at_s * 1e9),
            "monotonic_ns": 1,
            "model": of.name,
            "request_id": request_id,
            "tensors": (Tensor(of.inputs[0].name, "FP32", rows.shape, rows.astype(np.float32).tobytes()),),
            "newest_event_ns": None,
            "version": 1,
            "bundle_digest": of.digest(),
            "feature_digest": of.features.digest,
            "state": None,
            "stage_us": {"total": 1.0},
            "signal": None,
            "error": None,
        }
        told = {name: value for name, value in changes.items() if name in decision}
        if "signal" not in changes:
            told["signal"] = Signal(
                **(signal | {name: value for name, value in changes.items() if name not in decision})
            )
        made = decode(encode_decision(Decision(**(decision | told))))
        assert isinstance(made, DecisionRecord)
        return made

    return make

"""The gate of validation (`export/validation.py`) where models are trained: what it refuses is not written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.validation import Evidence, judged, sentence
from tickserve.config import ValidationSettings
from tickserve.errors import GateRefusedError


def gate_of(report: Mapping[str, Any], settings: ValidationSettings) -> dict[str, Any]:
    """The `gate` of a report that holds `comparison`, `deflation` and `pooled`, as `training.walk` writes them."""
    return judged(Evidence.of(report), settings)


def refuse_models(refused: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise GateRefusedError for models by name, with the `gate` of each; nothing where there are none."""
    if not refused:
        return
    what = "; ".join(f"{name}: {sentence(gate)}" for name, gate in refused.items())
    raise GateRefusedError(
        f"refused, and no bundle written: {what}",
        field="--require-gate",
        hint="train without it to keep the bundles, labelled so",
        counterexample={"gates": {name: dict(gate) for name, gate in refused.items()}},
    )

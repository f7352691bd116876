"""The gate of validation, as training wrote it into a manifest: what export can be told to insist on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tickserve.errors import GateRefusedError
from tickserve.manifest import Manifest

NO_RECORD = "no record of the gate"


def refuse_ungated(manifests: Sequence[Manifest]) -> None:
    """Raise GateRefusedError naming every model whose manifest does not say that it passed, and why not."""
    refused = {each.name: why for each in manifests if (why := _why_not(each.metrics.get("gate")))}
    if refused:
        raise GateRefusedError(
            "refused, and nothing published",
            field="--require-gate",
            expected="models that passed the validation gate",
            was="; ".join(f"{name}: {why}" for name, why in refused.items()),
            hint="train on more data, or export without it",
            counterexample={"refused": refused},
        )


def _why_not(gate: Any) -> str:
    """Nothing for a gate that was passed."""
    if not isinstance(gate, dict):
        return NO_RECORD
    if gate.get("passed") is True:
        return ""
    reasons = [each for each in gate.get("reasons", ()) if isinstance(each, dict) and not each.get("passed")]
    told = [f"expected {each.get('expected')}, was {each.get('was')}" for each in reasons]
    return "not passed" + (f" ({', '.join(told)})" if told else "")

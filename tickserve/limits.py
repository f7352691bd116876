"""Limits of time, memory and quality: what was measured, held against `[limits]`.

A limit that is not kept warns or fails. Each result is a `GateResult`, so that it goes into manifests and reports as
every other gate does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from tickserve.config import LimitSettings
from tickserve.errors import LimitExceededError
from tickserve.manifest import GateResult

PREFIX = "limit."
Key = Literal["features_s", "train_s", "train_memory_mb", "hit_rate"]
WORDS: dict[Key, str] = {
    "features_s": "building features took {was:,.1f} s",
    "train_s": "training took {was:,.1f} s",
    "train_memory_mb": "training took {was:,.0f} MB",
    "hit_rate": "the hit rate out of sample is {was:.3f}",
}


def of_features(settings: LimitSettings, seconds: float) -> tuple[GateResult, ...]:
    """What building features took, against its limit."""
    return _held(settings, {"features_s": seconds})


def of_training(
    settings: LimitSettings, seconds: float, memory_mb: float, hit_rate: float | None
) -> tuple[GateResult, ...]:
    """What training one family took and how often its calls were right, against their limits.

    A model that made no call has no hit rate, and does not reach the limit.
    """
    return _held(settings, {"train_s": seconds, "train_memory_mb": memory_mb, "hit_rate": hit_rate})


def _held(settings: LimitSettings, measured: dict[Key, float | None]) -> tuple[GateResult, ...]:
    judged = (_one(settings, key, was) for key, was in measured.items())
    return tuple(gate for gate in judged if gate is not None)


def _one(settings: LimitSettings, key: Key, was: float | None) -> GateResult | None:
    action, limit = getattr(settings, f"on_{key}"), float(getattr(settings, key))
    if action == "off":
        return None
    least = key == "hit_rate"
    passed = was is not None and (was >= limit if least else was <= limit)
    said = WORDS[key].format(was=was) if was is not None else "the model made no call, so it has no hit rate"
    detail = "" if passed else f"{said}; limits.{key} is at {'least' if least else 'most'} {limit:g}"
    limits: dict[str, float | int | str | None] = {"least" if least else "most": limit, "action": action}
    return GateResult(name=f"{PREFIX}{key}", passed=passed, measured={"value": was}, limits=limits, detail=detail)


def not_kept(gates: Sequence[GateResult]) -> list[GateResult]:
    """Those among `gates` that are limits and were not kept."""
    return [gate for gate in gates if gate.name.startswith(PREFIX) and not gate.passed]


def hold(gates: Sequence[GateResult], say: Callable[[str], None]) -> None:
    """Say every limit that was not kept. Raises LimitExceededError for the first that is to fail."""
    broken = not_kept(gates)
    for gate in broken:
        say(f"limit not kept: {gate.detail}")
    for gate in broken:
        if gate.limits["action"] == "fail":
            raise _refusal(gate)


def _refusal(gate: GateResult) -> LimitExceededError:
    key = gate.name.removeprefix(PREFIX)
    side = "least" if "least" in gate.limits else "most"
    was = gate.measured["value"]
    return LimitExceededError(
        "a limit was not kept",
        field=f"limits.{key}",
        expected=f"at {side} {gate.limits[side]:g}",
        was="none: no call was made" if was is None else f"{was:.4g}",
        hint=f"limits.on_{key} = fail; nothing was written",
    )

"""From what was measured to what a client is asked for: thresholds, and how long they must be passed or kept.

An action is raised when its threshold was passed for `raise_s` without a break, and lifted when everything stayed below
`clear_ratio` of it for `clear_s`. What cannot be measured (too few rows, no reference) raises and lifts nothing,
and neither does the absence of what an action was raised for: of a model that is held flat there are no scores. Two
things lift it all the same: another bundle, which starts from nothing, and a person (`Decider.clear`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from monitoring.drift.tally import SCORE, Measured, is_judged
from tickserve.config import DriftSettings
from tickserve.risk import ACTIONS, Action, ModelAction

NS_PER_S = 1_000_000_000
NONE = 0
Cause = str  # "features", "score", "calibration"


class Level(NamedTuple):
    """How much one measurement asks for, as an index into ACTIONS: `passed` its threshold, `kept` still near it."""

    passed: int
    kept: int
    reason: str


@dataclass
class _State:
    action: int = NONE
    since_ns: int = 0
    cause: Cause = ""
    reason: str = ""
    passed_since: dict[int, int] = field(default_factory=dict)
    below_since: int | None = None
    trusted: bool = False  # a person cleared it, and nothing was measured since


@dataclass(frozen=True)
class Change:
    """One model's action has changed."""

    model: str
    before: Action
    after: Action
    reason: str


class Decider:
    """What is asked of each model's signals by now. `before`: the actions of an earlier run, kept until lifted."""

    def __init__(self, settings: DriftSettings, before: Mapping[str, ModelAction] | None = None) -> None:
        self._settings = settings
        self._states: dict[tuple[str, str], _State] = {}  # by model and bundle
        self._before = dict(before or {})
        self._asked = dict(before or {})

    @property
    def asked(self) -> dict[str, ModelAction]:
        """The action of each model."""
        return dict(self._asked)

    def decide(self, measured: Iterable[Measured], now_ns: int) -> list[Change]:
        """Take what was measured of each bundle; what has changed. Of a model's bundles the last one is in force."""
        before, states = dict(self._asked), {}
        for each in measured:
            key = (each.model, each.bundle_digest)
            state = states[key] = self._states.get(key) or self._taken_up(each, now_ns)
            levels = levels_of(each, self._settings)
            state.trusted = state.trusted and not levels
            self._move(state, levels, now_ns)
            self._asked[each.model] = self._asked_of(state, each, levels)
        self._states = states  # a bundle that the monitor has forgotten is forgotten here
        return [
            Change(model, was, asked.action, asked.reason)
            for model, asked in self._asked.items()
            if (was := before.get(model, ModelAction()).action) != asked.action
        ]

    def clear(self, model: str, cleared: ModelAction) -> None:
        """Take up that a person has lifted a model's action: whatever its bundles were asked for ends."""
        self._before[model] = self._asked[model] = cleared
        self._states = {key: state for key, state in self._states.items() if key[0] != model}

    def _taken_up(self, each: Measured, now_ns: int) -> _State:
        """The state of a bundle that is new here: that of an earlier run if it was this bundle's, else none."""
        asked = self._before.get(each.model)
        if asked is None or asked.bundle_digest not in ("", each.bundle_digest):
            return _State(since_ns=now_ns)
        place = ACTIONS.index(asked.action)
        trusted = place == NONE and asked.cleared_ns > 0 and asked.measured
        return _State(place, asked.since_ns, asked.cause, asked.reason, trusted=trusted)

    def _move(self, state: _State, levels: Mapping[Cause, Level], now_ns: int) -> None:
        passed = max((level.passed for level in levels.values()), default=NONE)
        for action in range(1, len(ACTIONS)):
            if passed >= action:
                state.passed_since.setdefault(action, now_ns)
            else:
                state.passed_since.pop(action, None)
        waited_ns = self._settings.raise_s * NS_PER_S
        ready = [action for action, since in state.passed_since.items() if now_ns - since >= waited_ns]
        if ready and max(ready) > state.action:
            cause = max(levels, key=lambda name: levels[name].passed)
            self._set(state, max(ready), cause, levels[cause].reason, now_ns)
            return
        kept = max((level.kept for level in levels.values()), default=state.action)
        if kept >= state.action or (state.cause and state.cause not in levels):
            state.below_since = None
            return
        state.below_since = now_ns if state.below_since is None else state.below_since
        if now_ns - state.below_since >= self._settings.clear_s * NS_PER_S:
            cause = max(levels, key=lambda name: levels[name].kept) if kept else ""
            self._set(state, kept, cause, levels[cause].reason if cause else "", now_ns)

    @staticmethod
    def _set(state: _State, action: int, cause: Cause, reason: str, now_ns: int) -> None:
        state.action, state.cause, state.reason, state.since_ns, state.below_since = action, cause, reason, now_ns, None

    def _asked_of(self, state: _State, each: Measured, levels: Mapping[Cause, Level]) -> ModelAction:
        action = ACTIONS[state.action]
        before = self._asked.get(each.model)
        factor = {"shrink": self._settings.shrink_factor, "flat": 0.0}.get(action, 1.0)
        return ModelAction.model_validate(
            {
                "action": action,
                "factor": factor,
                "reason": (state.reason or "; ".join(each.notes))[:500],
                "since_ns": state.since_ns,
                "version": each.version,
                "measured": bool(levels) or state.trusted,
                "cause": state.cause,
                "bundle_digest": each.bundle_digest,
                "cleared_ns": 0 if before is None else before.cleared_ns,
            }
        )


def levels_of(each: Measured, settings: DriftSettings) -> dict[Cause, Level]:
    """What each measurement that could be made asks for."""
    found = {}
    judged = {name: value for name, value in each.psi_features.items() if is_judged(name, settings)}
    thresholds = (settings.psi_label, settings.psi_shrink, settings.psi_flat)
    if judged:
        name = max(judged, key=lambda feature: judged[feature])
        found["features"] = _level(judged[name], thresholds, settings, f"PSI of {name}")
    if each.psi_score is not None and is_judged(SCORE, settings):
        found["score"] = _level(each.psi_score, thresholds, settings, "PSI of the score")
    if each.calibration is not None:
        thresholds = (settings.calibration_label, settings.calibration_shrink, settings.calibration_flat)
        found["calibration"] = _level(each.calibration.error, thresholds, settings, "calibration error")
    return found


def _level(value: float, thresholds: tuple[float, float, float], settings: DriftSettings, what: str) -> Level:
    asked = [place for place, threshold in enumerate(thresholds, start=1) if threshold]
    passed = max((place for place in asked if value >= thresholds[place - 1]), default=NONE)
    kept = max((place for place in asked if value >= thresholds[place - 1] * settings.clear_ratio), default=NONE)
    reached = passed or kept
    limit = f", threshold {thresholds[reached - 1]:g}" if reached else ""
    return Level(passed, kept, f"{what} {value:.3g}{limit}")

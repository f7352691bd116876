"""Thresholds to actions: raised after a while, lifted after a longer one, and never by what is not known."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.drift.decide import Decider
from monitoring.drift.tally import Calibration, Measured
from tickserve.config import DriftSettings
from tickserve.errors import ConfigError
from tickserve.risk import ModelAction
from tickserve.settings import load_settings

S = 1_000_000_000
SETTINGS = DriftSettings(
    judge=("score", "features"),
    psi_label=0.25,
    psi_shrink=0.5,
    psi_flat=1.0,
    calibration_flat=0.2,
    raise_s=60,
    clear_s=600,
    clear_ratio=0.8,
)


def measured(
    psi: float | None = None, score: float | None = None, calibration: float | None = None, bundle: str = "m"
) -> Measured:
    fields: dict[str, Any] = {"model": "m", "version": "m", "bundle_digest": bundle}
    index = {name: value for name, value in (("spread", psi), ("score", score)) if value is not None}
    found = None if calibration is None else Calibration(calibration, 100, (), ())
    notes = () if index else ("too few rows: 1 of 1000 in the window",)
    return Measured(
        **fields, reference=True, rows=1, score_rows=1, psi=index, psi_max=max(index.values(), default=None),
        psi_score=score, age_s={}, calibration=found, hit_rate=None, outcomes=0, pnl_bp=0.0, turnover=0.0, notes=notes,
    )  # fmt: skip


def actions(decider: Decider, *steps: tuple[float, Measured]) -> list[str]:
    found = []
    for at_s, each in steps:
        decider.decide([each], int(at_s * S))
        found.append(decider.asked["m"].action)
    return found


def test_a_threshold_is_passed_for_a_while_before_it_counts() -> None:
    decider = Decider(SETTINGS)
    assert actions(decider, (0, measured(0.6)), (59, measured(0.6)), (60, measured(0.6))) == ["none", "none", "shrink"]
    asked = decider.asked["m"]
    assert (asked.factor, asked.cause, asked.since_ns) == (0.5, "features", 60 * S)
    assert asked.reason == "PSI of spread 0.6, threshold 0.5"


def test_a_moment_below_starts_the_while_anew() -> None:
    decider = Decider(SETTINGS)
    steps = [(0, measured(0.6)), (50, measured(0.1)), (70, measured(0.6)), (110, measured(0.6)), (130, measured(0.6))]
    assert actions(decider, *steps) == ["none", "none", "none", "none", "shrink"]


def test_what_is_passed_that_long_is_what_counts() -> None:
    decider = Decider(SETTINGS)
    assert actions(decider, (0, measured(0.3)), (50, measured(2.0)), (60, measured(2.0)), (110, measured(2.0))) == [
        "none", "none", "label", "flat",
    ]  # fmt: skip


def test_it_is_lifted_later_than_raised_and_not_near_the_threshold() -> None:
    decider = Decider(SETTINGS)
    actions(decider, (0, measured(0.6)), (60, measured(0.6)))
    near = [(second, measured(0.45)) for second in range(100, 2_000, 100)]  # above 0.8 * 0.5
    assert set(actions(decider, *near)) == {"shrink"}
    assert actions(decider, (2_000, measured(0.3)), (2_599, measured(0.3)), (2_600, measured(0.3))) == [
        "shrink", "shrink", "label",
    ]  # fmt: skip
    assert actions(decider, (2_700, measured(0.1)), (3_300, measured(0.1))) == ["label", "none"]
    assert decider.asked["m"].reason == ""


def test_what_is_not_known_raises_nothing_and_lifts_nothing() -> None:
    decider = Decider(SETTINGS)
    assert set(actions(decider, *[(second, measured()) for second in range(0, 1_000, 100)])) == {"none"}
    asked = decider.asked["m"]
    assert (asked.measured, asked.reason) == (False, "too few rows: 1 of 1000 in the window")
    actions(decider, (1_000, measured(2.0)), (1_060, measured(2.0)))
    assert set(actions(decider, *[(second, measured()) for second in range(1_100, 9_000, 100)])) == {"flat"}
    assert decider.asked["m"].measured is False


def test_what_an_action_was_raised_for_must_be_measured_to_lift_it() -> None:
    decider = Decider(SETTINGS)
    actions(decider, (0, measured(0.1, calibration=0.3)), (60, measured(0.1, calibration=0.3)))
    asked = decider.asked["m"]
    assert (asked.action, asked.cause, asked.reason) == ("flat", "calibration", "calibration error 0.3, threshold 0.2")
    # Held flat, the model has no decisions whose outcome could clear it.
    assert set(actions(decider, *[(second, measured(0.1)) for second in range(100, 9_000, 100)])) == {"flat"}
    assert (
        actions(decider, (9_000, measured(0.1, calibration=0.1)), (9_600, measured(0.1, calibration=0.1)))[-1] == "none"
    )


def test_features_that_come_back_lift_a_flat_without_any_score() -> None:
    decider = Decider(SETTINGS)
    actions(decider, (0, measured(2.0, score=0.1)), (60, measured(2.0, score=0.1)))
    assert actions(decider, (100, measured(0.1)), (700, measured(0.1)))[-1] == "none"


def test_zero_never_asks() -> None:
    off = DriftSettings(psi_label=0, raise_s=0)
    decider = Decider(off)
    assert actions(decider, (0, measured(50.0, calibration=0.9)), (9_000, measured(50.0))) == ["none", "none"]


def test_an_action_of_an_earlier_run_holds() -> None:
    before = {"m": ModelAction(action="flat", reason="PSI of spread 3", since_ns=5, cause="features", factor=0.0)}
    decider = Decider(SETTINGS, before)
    assert decider.asked == before
    assert actions(decider, (0, measured())) == ["flat"]
    assert (decider.asked["m"].since_ns, decider.asked["m"].reason) == (5, "PSI of spread 3")
    assert actions(decider, (10, measured(0.1)), (610, measured(0.1)))[-1] == "none"


def test_another_bundle_starts_from_nothing_and_one_that_comes_back_does_not() -> None:
    decider = Decider(SETTINGS)
    actions(decider, (0, measured(score=2.0)), (60, measured(score=2.0)))
    held, newer = measured(), measured(bundle="newer")
    (change,) = decider.decide([held, newer], 70 * S)
    assert (change.before, change.after) == ("flat", "none")
    asked = decider.asked["m"]
    assert (asked.action, asked.measured, asked.bundle_digest) == ("none", False, "newer")
    # And so for an exporter that starts anew, with what the file said before.
    for before in (decider.asked, {"m": asked.model_copy(update={"action": "flat", "bundle_digest": "m"})}):
        again = Decider(SETTINGS, before)
        again.decide([held, newer], 80 * S)
        assert again.asked["m"].action == "none"
    decider.decide([newer, held], 80 * S)  # rolled back
    assert decider.asked["m"].action == "flat"


def test_what_a_person_cleared_is_trusted_until_it_is_measured() -> None:
    decider = Decider(SETTINGS)
    actions(decider, (0, measured(score=2.0)), (60, measured(score=2.0)))
    decider.clear("m", ModelAction(reason="cleared by a person", cleared_ns=61 * S, since_ns=61 * S))
    decider.decide([measured()], 62 * S)
    asked = decider.asked["m"]
    assert (asked.action, asked.measured, asked.cleared_ns) == ("none", True, 61 * S)
    assert actions(Decider(SETTINGS, decider.asked), (63, measured())) == ["none"]
    steps = [(70, measured(score=2.0)), (129, measured(score=2.0)), (130, measured(score=2.0))]
    assert actions(decider, *steps) == ["none", "none", "flat"]  # it was drift, after all
    decider.decide([measured()], 140 * S)
    assert decider.asked["m"].measured is False


def test_changes_are_told_once() -> None:
    decider = Decider(SETTINGS.model_copy(update={"raise_s": 0}))
    (change,) = decider.decide([measured(0.6)], 0)
    assert (change.before, change.after, change.reason) == ("none", "shrink", "PSI of spread 0.6, threshold 0.5")
    assert decider.decide([measured(0.6)], 1) == []


@given(values=st.lists(st.floats(0, 3), min_size=1, max_size=40))
def test_without_waiting_it_is_the_highest_threshold_passed(values: list[float]) -> None:
    decider = Decider(SETTINGS.model_copy(update={"raise_s": 0, "clear_s": 0, "clear_ratio": 1.0}))
    for second, value in enumerate(values):
        expected = "flat" if value >= 1 else "shrink" if value >= 0.5 else "label" if value >= 0.25 else "none"
        assert actions(decider, (second, measured(value))) == [expected]


def test_thresholds_rise() -> None:
    with pytest.raises(ConfigError, match="expected rising thresholds"):
        load_settings(environ={"TICKSERVE_DRIFT__PSI_LABEL": "0.5", "TICKSERVE_DRIFT__PSI_FLAT": "0.3"})
    assert load_settings(environ={"TICKSERVE_DRIFT__PSI_FLAT": "0.3"}).config.drift.psi_shrink == 0

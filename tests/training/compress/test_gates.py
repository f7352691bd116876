"""Each gate accepts what it should and refuses what it must, with the number that says why."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from export.measured import Cost
from tickserve.errors import GateRefusedError
from training.compress.gates import (
    Quality,
    decisions_gate,
    goal_gate,
    latency_gate,
    quality_gate,
    refuse_unproven,
    size_gate,
    verdict,
)
from training.compress.generation import Teacher
from training.compress.recipe import Gates, Goal

GOOD = Quality(9_000, 0.1, (0.08, 0.12), 0.1, (0.08, 0.12), 0.0, (-0.002, 0.002))
PARENT = Cost(1_000, 20.0, 30.0, 4_000)


@pytest.mark.parametrize(
    ("quality", "said"),
    [
        (replace(GOOD, ic=0.097), "97.0% of the teacher's IC, 98.0% needed"),
        (replace(GOOD, loss_interval=(-0.006, 0.002)), r"may be 0.0060 below the teacher's \(95 %\), 0.005 allowed"),
        (replace(GOOD, loss_interval=None), "too few independent rows"),
        (replace(GOOD, ic=-0.1), "-100.0% of the teacher's IC"),
    ],
)
def test_quality_has_to_be_non_inferior(quality: Quality, said: str) -> None:
    assert quality_gate(GOOD, Gates()).passed
    gate = quality_gate(quality, Gates())
    assert not gate.passed
    assert gate.measured["rows"] == 9_000
    assert re.search(said, gate.detail)


@pytest.mark.parametrize(
    ("interval", "said"),
    [((-0.01, 0.2), "-0.0100 to"), ((-0.2, -0.1), "-0.2000 to"), ((0.0, 0.1), "was"), (None, "too few independent")],
)
def test_a_teacher_that_may_know_nothing_is_refused(interval: tuple[float, float] | None, said: str) -> None:
    refuse_unproven(GOOD, "teacher")
    with pytest.raises(GateRefusedError, match=said):
        refuse_unproven(replace(GOOD, teacher_interval=interval), "teacher")


def test_flips_are_limited_where_there_is_a_limit() -> None:
    assert decisions_gate(0.03, 0.03).passed
    assert decisions_gate(0.5, None).passed
    gate = decisions_gate(0.04, 0.03)
    assert (gate.passed, gate.detail) == (False, "4.0% of decisions flip, 3.0% allowed")


def test_p50_and_p99_are_both_held() -> None:
    assert latency_gate(Cost(900, 22.0, 33.0, 4_000), PARENT, 1.1).passed
    slow, late = Cost(900, 23.0, 30.0, 4_000), Cost(900, 20.0, 40.0, 4_000)
    assert latency_gate(slow, PARENT, 1.1).detail == "p50 is 1.15 times the parent's, 1.1 allowed"
    assert latency_gate(late, PARENT, 1.1).detail == "p99 is 1.33 times the parent's, 1.1 allowed"


def test_it_has_to_be_smaller() -> None:
    assert size_gate(Cost(950, 1.0, 1.0, 1), PARENT, 0.95).passed
    assert not size_gate(Cost(951, 1.0, 1.0, 1), PARENT, 0.95).passed


@pytest.mark.parametrize(
    ("cost", "reached"),
    [
        (Cost(250, 4.0, 6.0, 1), True),
        (Cost(251, 4.0, 6.0, 1), False),
        (Cost(250, 4.1, 6.0, 1), False),
        (Cost(250, 4.0, 6.1, 1), False),
    ],
)
def test_the_goal_is_of_p50_p99_and_bytes(cost: Cost, reached: bool) -> None:
    assert goal_gate(cost, PARENT, Goal(speedup=5.0, shrink=4.0)).passed is reached


def test_the_verdict_gives_every_reason() -> None:
    gates = [decisions_gate(0.2, 0.1), size_gate(Cost(2_000, 1.0, 1.0, 1), PARENT, 1.0), decisions_gate(0.0, 0.1)]
    assert verdict(gates) == "refused: 20.0% of decisions flip, 10.0% allowed; 2.00 times the parent's bytes, 1 allowed"
    assert verdict(gates[2:]).startswith("accepted: ")


def test_two_measurements_give_the_quieter_one() -> None:
    assert Cost(5, 3.0, 9.0, 10).quieter(Cost(5, 4.0, 8.0, 10)) == Cost(5, 3.0, 8.0, 20)


def test_several_teachers_cost_what_all_cost_and_the_tail_of_the_slowest() -> None:
    costs = [Cost(10, 10.0, 30.0, 4), Cost(20, 100.0, 110.0, 4)]
    assert Teacher(()).cost(costs) == Cost(30, 110.0, 130.0, 4)

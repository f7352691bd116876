"""The hardening list held line by line, for every scenario; and each line shown what it refuses."""

from __future__ import annotations

import copy

import pytest

from tests.k8s.chart.hardening import RULES, SWITCHED_OFF
from tests.k8s.chart.rendering import SCENARIOS, objects, pods


@pytest.mark.parametrize("rule", RULES)
def test_hardened(rule: str) -> None:
    wrong = {scenario: list(RULES[rule].wrong(objects(scenario))) for scenario in SCENARIOS}
    off = {scenario for scenario in SCENARIOS if (scenario, rule) in SWITCHED_OFF}
    assert {scenario: said for scenario, said in wrong.items() if said and scenario not in off} == {}
    assert all(wrong[scenario] for scenario in off), (
        "a line that is switched off, and holds: take it out of SWITCHED_OFF"
    )


@pytest.mark.parametrize("rule", RULES)
def test_each_line_refuses_what_breaks_it(rule: str) -> None:
    items = copy.deepcopy(list(objects(RULES[rule].scenario)))
    RULES[rule].spoil(items)
    assert list(RULES[rule].wrong(items)) != []


def test_the_list_is_held_to_every_kind_of_pod() -> None:
    components = {
        pod.metadata["labels"]["app.kubernetes.io/component"] for each in SCENARIOS for pod in pods(objects(each))
    }
    assert components == {"server", "engine", "test", "training", "ray", "engine-build", "loadtest", "change-freeze"}

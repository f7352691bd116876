"""What the alerts of a deployment promise, beside `slo.objective`: the one is in rules, the other a value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.deployment.finding import Finding, refused
from export.deployment.values_file import read_values

# As monitoring/rules/deadline.py writes an alert: fires at factor x (1 - objective).
NUMBER = r"([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)"
FACTOR = re.compile(rf"at {NUMBER} times the rate its budget allows")
LIMIT = re.compile(rf"> *{NUMBER}")
GROUP = "tickserve-deadline"


def check(values: dict[str, Any], chart: Path) -> Iterator[Finding]:
    """`slo.objective` against the rules that would be installed with it. Raises ConfigError for a bad file."""
    if not values["prometheusRule"]["enabled"]:
        return
    groups = values["prometheusRule"]["groups"]
    where = "prometheusRule.groups" if groups else "files/rules of the chart"
    promised = float(values["slo"]["objective"])
    for objective in sorted(_objectives(groups or _packaged(chart))):
        if abs(objective - promised) > (1 - promised) * 1e-3:
            reason = f"expected {objective:.9g}, which the alerts of {where} hold, was {promised:.9g}"
            yield refused("slo.objective", f"{reason}; {_how(promised)}")


def _how(objective: float) -> str:
    return (
        f"rules for it: TICKSERVE_MONITORING__SLO_OBJECTIVE={objective:.9g} "
        "tickserve monitor render --profile production --out k8s/chart/files"
    )


def _packaged(chart: Path) -> list[Any]:
    files = sorted((chart / "files" / "rules").glob("*.yaml"))
    return [group for path in files for group in read_values(path).get("groups") or ()]


def _objectives(groups: list[Any]) -> set[float]:
    """The objectives that the deadline alerts were rendered for; alerts of somebody else's make have none."""
    rules = [rule for group in groups if group.get("name") == GROUP for rule in group.get("rules") or ()]
    found = set()
    for rule in rules:
        factor = FACTOR.search(str((rule.get("annotations") or {}).get("summary", "")))
        limit = LIMIT.search(str(rule.get("expr", "")))
        if factor and limit and float(factor[1]):
            found.add(round(1 - float(limit[1]) / float(factor[1]), 9))
    return found

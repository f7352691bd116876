"""One rule, one group of rules, and how Prometheus reads them.

Expressions are PromQL as it is; `duration` writes a number of seconds the way PromQL does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

Severity = Literal["critical", "warning"]
UNITS = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s"), (1, "ms"))
HEADER = "# Written by `tickserve monitor render` from monitoring/rules; thresholds are under [monitoring].\n"


@dataclass(frozen=True)
class Recording:
    """A series computed once, under a name of its own."""

    record: str
    expr: str

    def lines(self, runbook_url: str) -> dict[str, Any]:
        """As Prometheus reads it; a recording has no runbook."""
        return {"record": self.record, "expr": Expression(self.expr)}


@dataclass(frozen=True)
class Alert:
    """A condition somebody is told of. `keys` are the settings that its runbook page has to name.

    `critical` wakes a person; `warning` is for working hours.
    """

    alert: str
    severity: Severity
    expr: str
    after_s: float
    summary: str
    description: str
    keys: tuple[str, ...] = ()

    def lines(self, runbook_url: str) -> dict[str, Any]:
        """As Prometheus reads it; its page lies at `runbook_url`."""
        return {
            "alert": self.alert,
            "expr": Expression(self.expr),
            "for": duration(self.after_s),
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{runbook_url.rstrip('/')}/{self.alert}.md",
            },
        }


@dataclass(frozen=True)
class Group:
    """Rules that are evaluated one after the other. `note` is a line of comment that the chart reads."""

    name: str
    rules: Sequence[Recording | Alert]
    note: str = ""

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name.removeprefix('tickserve-')}.yaml"

    def yaml(self, runbook_url: str) -> str:
        """The text of its file; the runbook pages lie at `runbook_url`."""
        tree = {"groups": [{"name": self.name, "rules": [rule.lines(runbook_url) for rule in self.rules]}]}
        note = f"# {self.note}\n" if self.note else ""
        return HEADER + note + yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=200, allow_unicode=True)


class Expression(str):
    """PromQL; written as a block when it has several lines."""

    __slots__ = ()


class _Dumper(yaml.SafeDumper):
    """Plain YAML without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent(dumper: yaml.SafeDumper, value: Expression) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(value), style="|" if "\n" in value else None)


_Dumper.add_representer(Expression, _represent)


def duration(seconds: float) -> str:
    """PromQL's way to write it, in the largest unit that fits: 300 is `5m`, 90 is `90s`, 0.5 is `500ms`."""
    milliseconds = round(seconds * 1_000)
    if not milliseconds:
        return "0s"
    return next(f"{milliseconds // size}{unit}" for size, unit in UNITS if not milliseconds % size)


def number(value: float) -> str:
    """PromQL's way to write it, with the digits that a sum of settings has and no more: 14.4 * 0.001 is 0.0144."""
    return f"{value:.12g}"

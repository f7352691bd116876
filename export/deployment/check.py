"""Values validated from end to end: schema, chart, Kubernetes' schemas, manifests, measurements."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.deployment import cross_check, objective, schema_check
from export.deployment.chart import Chart, newest_known
from export.deployment.finding import Finding, note, refused
from export.deployment.values_file import read_record, read_values
from tickserve.config import Config
from tickserve.errors import ConfigError, GateRefusedError

OBJECTIVE = ": slo.objective: expected"
OLDEST = re.compile(r">=\s*v?(\d+\.\d+)")


@dataclass(frozen=True)
class Result:
    """Every finding; how many objects each version of Kubernetes was shown."""

    findings: tuple[Finding, ...]
    objects: dict[str, int]

    @property
    def refused(self) -> list[Finding]:
        """Those that end in exit code 1."""
        return [each for each in self.findings if each.level == "refused"]

    def to_json(self) -> dict[str, Any]:
        """Findings by weight, and what was looked at."""
        return {
            "refused": len(self.refused),
            "findings": [each.to_json() for each in self.findings],
            "objects": self.objects,
        }


def validate(
    chart: Chart, files: Sequence[Path], repository: Path, tables: Path, config: Config, versions: Sequence[str] = ()
) -> Result:
    """Hold `files` against everything that is known. Raises ConfigError, ComponentError, ArtifactError."""
    values = chart.values(files)
    wrong = schema_check.check_values(chart.folder, values)
    if wrong:  # what does not follow the schema is not worth rendering
        return Result(tuple(wrong), {})
    found: list[Finding] = []
    counts: dict[str, int] = {}
    said: dict[str, list[str]] = {}
    asked = tuple(dict.fromkeys(versions or (oldest(chart.folder), newest_known())))
    for version in asked:
        try:
            objects = chart.render(files, version)
        except GateRefusedError as error:
            said.setdefault(str(error), []).append(version)
            continue
        invalid, unknown = schema_check.check_objects(objects, version)
        found += invalid
        counts[version] = len(objects)
        found += [note(kind, "no schema of it here: not checked") for kind in unknown]
    promised = list(objective.check(values, chart.folder))
    # The chart may refuse another objective too, in fewer words.
    told = {text: where for text, where in said.items() if not (promised and OBJECTIVE in text)}
    found += [refused(_chart_field(where, asked), text) for text, where in told.items()] + promised
    records = [record for record in map(read_record, files) if record is not None]
    found += cross_check.check(values, records[-1] if records else None, repository, tables, config)
    order = {"refused": 0, "warning": 1, "note": 2}
    return Result(tuple(sorted(dict.fromkeys(found), key=lambda each: order[each.level])), counts)


def _chart_field(where: Sequence[str], asked: Sequence[str]) -> str:
    """The chart refuses for every version of Kubernetes as a rule: that is one refusal, and no version's."""
    return "chart" if len(where) == len(asked) else f"chart (Kubernetes {', '.join(where)})"


def oldest(chart: Path) -> str:
    """The oldest Kubernetes that Chart.yaml takes. Raises ConfigError where it does not say."""
    text = str(read_values(chart / "Chart.yaml").get("kubeVersion", ""))
    found = OLDEST.search(text)
    if found is None:
        raise ConfigError("expected kubeVersion: '>=...'", field="Chart.yaml", was=text[:40])
    return found[1]

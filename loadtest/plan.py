"""What a load test does: one phase per transport and model, all of the same length, one after the other.

Rule for the time: `duration_s` is split evenly over the phases, but no phase is shorter than 0.25 s (then the whole
takes longer than `duration_s`, and the results say how long). The first tenth of a phase, at most 0.2 s, opens
connections and is not measured; failures count from the first request on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tickserve.config import LoadtestSettings
from tickserve.errors import UsageError

MIN_PHASE_S = 0.25
PAUSE_S = 0.1
DEADLINE_MS = 1_000.0
# Time given to Locust beyond the phases before it is told to stop, and then before it is killed.
GRACE_S = 15.0
# Time given to each user to open its client; they do so one after another, before the first phase.
OPEN_S = 0.05

Transport = Literal["http", "grpc"]


@dataclass(frozen=True)
class Phase:
    """One measured row; `start_s` counts from the moment when all users have opened their clients."""

    transport: Transport
    model: str
    start_s: float


@dataclass(frozen=True)
class Plan:
    """Everything the Locust process needs; it travels as a JSON file."""

    users: int
    phases: tuple[Phase, ...]
    phase_s: float
    warmup_s: float
    urls: dict[str, str]
    version_dirs: dict[str, str]
    results: str
    deadline_ms: float = DEADLINE_MS

    @property
    def total_s(self) -> float:
        """From the first request to the last."""
        return self.phases[-1].start_s + self.phase_s

    @property
    def limit_s(self) -> float:
        """After so long Locust is told to stop."""
        return self.total_s + OPEN_S * self.users * len(self.transports) + GRACE_S

    @property
    def transports(self) -> tuple[Transport, ...]:
        """The transports that occur, in order."""
        return tuple(dict.fromkeys(phase.transport for phase in self.phases))

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_file(cls, path: Path) -> Plan:
        """The plan that `to_json` wrote."""
        value = json.loads(path.read_bytes())
        return cls(**{**value, "phases": tuple(Phase(**phase) for phase in value["phases"])})


def make_plan(
    urls: Mapping[Transport, str], version_dirs: Mapping[str, Path], settings: LoadtestSettings, results: Path
) -> Plan:
    """The plan for these models over these transports. Raises UsageError when there is no model."""
    if not version_dirs:
        raise UsageError("no model to load", field="version_dirs", expected="at least one model")
    rows = [(transport, model) for transport in dict.fromkeys(settings.transports) for model in version_dirs]
    phase_s = max(MIN_PHASE_S, settings.duration_s / len(rows))
    step_s = phase_s + PAUSE_S
    return Plan(
        users=settings.users,
        phases=tuple(Phase(transport, model, index * step_s) for index, (transport, model) in enumerate(rows)),
        phase_s=phase_s,
        warmup_s=min(0.2, phase_s / 10),
        urls={transport: urls[transport] for transport in urls},
        version_dirs={model: str(folder.resolve()) for model, folder in version_dirs.items()},
        results=str(results.resolve()),
    )

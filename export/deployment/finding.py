"""What a check has to say: a field, a reason, and whether it refuses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """`refused` ends in exit code 1, `warning` is for a person to weigh, `note` says what was not looked at."""

    level: Literal["refused", "warning", "note"]
    field: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)


def refused(field: str, reason: str) -> Finding:
    """A contradiction, or what the schemas refuse."""
    return Finding("refused", field, reason)


def warning(field: str, reason: str) -> Finding:
    """Something to weigh."""
    return Finding("warning", field, reason)


def note(field: str, reason: str) -> Finding:
    """What was not looked at."""
    return Finding("note", field, reason)

"""One thing that was looked at, and how it was found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finding:
    """`ok` is None where it cannot be read: unknown, never guessed. `fix` is empty where there is nothing to do.

    `needed` ones decide the exit code.
    """

    what: str
    found: str
    ok: bool | None
    fix: str = ""
    needed: bool = False

    @property
    def word(self) -> str:
        """`ok`, `no` or `unknown`."""
        return "unknown" if self.ok is None else "ok" if self.ok else "no"

    def to_json(self) -> dict[str, Any]:
        """The finding as a JSON object; its `fix` only where there is something to do."""
        fix = "" if self.ok else self.fix
        return {"what": self.what, "found": self.found, "ok": self.ok, "fix": fix, "needed": self.needed}


def unknown(what: str, why: str, fix: str) -> Finding:
    """A finding about what cannot be read here; `fix` says how to know."""
    return Finding(what, why, None, fix)


def text_of(path: Path) -> str | None:
    """What a file of the kernel says; None where it is not there or may not be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None

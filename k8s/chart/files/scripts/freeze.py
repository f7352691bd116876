"""Refuse a change inside a window of the change freeze. Run by a hook of the chart.

The windows are JSON in WINDOWS. Needs nothing but Python. Exit codes: 0 outside every window, 1 inside one, 2 for
windows that cannot be read.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime, timezone


def frozen_by(windows: list[dict[str, str]], now: datetime) -> dict[str, str] | None:
    """The first window that holds `now`, or None. A window's end is outside it."""
    return next((each for each in windows if _time(each["start"]) <= now < _time(each["end"])), None)


def _time(text: str) -> datetime:
    # Python before 3.11 does not read the Z.
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def main() -> int:
    """Read the windows, look at the clock, say so."""
    try:
        window = frozen_by(json.loads(os.environ["WINDOWS"]), datetime.now(timezone.utc))
    except (KeyError, TypeError, ValueError) as error:
        print(f"change freeze: the windows cannot be read: {error!r}", file=sys.stderr)
        return 2
    if window is None:
        print("change freeze: outside every window")
        return 0
    until = f"{window['start']} to {window['end']}"
    print(f"change freeze: {window['name']}, {until}; set changeFreeze.override to break it", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""When nothing may be changed: a window around each session, for the chart and for pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from export.deployment.calendar_file import Calendar, Freeze
from export.deployment.sessions import Trading, trading
from tickserve.errors import UsageError

# No window is longer than this, so one that holds a moment belongs to a session that is nearer than this.
REACH = timedelta(days=10)


@dataclass(frozen=True)
class Window:
    """From, until, and the session it protects."""

    market: str
    day: date
    start: datetime
    end: datetime

    @property
    def name(self) -> str:
        """Market and day."""
        return f"{self.market}-{self.day}"

    def to_json(self) -> dict[str, str]:
        """As an item of the chart's `changeFreeze.windows`: times with their offset (RFC 3339)."""
        return {"name": self.name, "start": self.start.isoformat(), "end": self.end.isoformat()}


def windows_of(found: Trading, freeze: Freeze) -> list[Window]:
    """A window for each session; none for a market that never closes, where a freeze would never end."""
    if found.never_closes:
        return []
    before, after = timedelta(minutes=freeze.minutes_before), timedelta(minutes=freeze.minutes_after)
    return [
        Window(
            session.market,
            session.day,
            (session.opens.astimezone(UTC) - before).astimezone(found.zone),
            (session.closes.astimezone(UTC) + after).astimezone(found.zone),
        )
        for session in found.sessions
    ]


def windows(calendar: Calendar, start: datetime, end: datetime) -> list[Window]:
    """The windows of all markets that touch `start` to `end`, in order of time. Raises ConfigError."""
    found: list[Window] = []
    for market in calendar.market:
        freeze = calendar.freeze_of(market)
        if freeze is not None:
            found += windows_of(trading(market, start - REACH, end + REACH), freeze)
    inside = [window for window in found if window.end > start and window.start < end]
    return sorted(inside, key=lambda window: (window.start, window.name))


def holding(found: Sequence[Window], at: datetime) -> list[Window]:
    """The windows that hold the moment `at`; the end itself is outside."""
    return [window for window in found if window.start <= at < window.end]


def parse_moment(text: str, option: str) -> datetime:
    """A moment with its offset from UTC (RFC 3339). Raises UsageError."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError("not a time", field=option, expected="2026-11-27T09:30:00-05:00", was=text[:40]) from error
    if moment.tzinfo is None:
        raise UsageError(
            "a time without its offset", field=option, expected="a time as 2026-11-27T09:30:00-05:00", was=text[:40]
        )
    return moment


def to_json(found: Sequence[Window]) -> list[dict[str, Any]]:
    """Every window."""
    return [window.to_json() for window in found]

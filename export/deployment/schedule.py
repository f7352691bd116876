"""A calendar file worked out: triggers, freeze windows, what idles, and what is to be said about each market."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from export.deployment import freeze, prescale
from export.deployment.calendar_file import Calendar, Freeze, Prescale
from export.deployment.freeze import Window
from export.deployment.prescale import Idle, Trigger
from export.deployment.sessions import Session, Trading, trading

# The usual hours of a market are those of the year to come.
YEAR = timedelta(days=366)


@dataclass(frozen=True)
class Schedule:
    """What the chart gets from a calendar, for the days from `start` to `end`."""

    start: datetime
    end: datetime
    sessions: tuple[Session, ...]
    triggers: tuple[Trigger, ...]
    windows: tuple[Window, ...]
    idle: tuple[Idle, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "start": self.start.isoformat(),
            "end": self.end.isoformat(),
            "sessions": [
                {
                    "market": each.market,
                    "day": each.day.isoformat(),
                    "opens": each.opens.isoformat(),
                    "closes": each.closes.isoformat(),
                }
                for each in self.sessions
            ],
            "pre_scale": [each.to_json() for each in self.triggers],
            "freeze": [each.to_json() for each in self.windows],
            "idle": [each.to_json() for each in self.idle],
            "notes": list(self.notes),
        }


def schedule(calendar: Calendar, start: datetime, days: int) -> Schedule:
    """Work out `days` days from `start`. Raises ConfigError for an exchange or a time that is not known."""
    end = start + timedelta(days=days)
    sessions: list[Session] = []
    made: list[Trigger] = []
    idle: list[Idle] = []
    notes: list[str] = []
    for market in calendar.market:
        found = trading(market, start, start + max(YEAR, end - start))
        sessions += [each for each in found.sessions if each.opens < end]
        if found.never_closes:
            notes.append(
                f"{market.label} never closes: no pre-scale and no freeze; give its busy hours as a market of your own"
            )
        wants = calendar.prescale_of(market)
        notes += _sessionless(found, start, end)
        notes += _gapless(found, wants, calendar.freeze_of(market))
        if wants is not None:
            own = prescale.triggers(found, wants, end)
            made += own
            idle += prescale.idle(found, wants, own, start, end)
    ordered = sorted(sessions, key=lambda each: each.opens)
    return Schedule(
        start, end, tuple(ordered), tuple(made), tuple(freeze.windows(calendar, start, end)), tuple(idle), tuple(notes)
    )


def _sessionless(found: Trading, start: datetime, end: datetime) -> Iterator[str]:
    """A market that is closed all those days gets no freeze window, and no chart takes a freeze without one."""
    if any(each.closes > start and each.opens < end for each in found.sessions):
        return
    coming = next((each for each in found.sessions if each.opens >= end), None)
    after = f"the next opens {coming.opens.isoformat()}" if coming else "nor in the year to come: see days and closed"
    yield f"{found.market.label}: no session in the {(end - start).days} days from {start.date()}; {after}"


def _gapless(found: Trading, wants: Prescale | None, kept: Freeze | None) -> Iterator[str]:
    """What margins that close every gap between sessions come to."""
    if found.never_closes:
        return
    label = found.market.label
    if wants is not None and prescale.gapless(prescale.wanted(found, wants)):
        yield f"{label}: the pre-scale margins leave no gap between sessions: no pre-scale; set keda.minReplicas"
    if kept is not None:
        margins = Prescale(minutes_before=kept.minutes_before, minutes_after=kept.minutes_after, replicas=1)
        if prescale.gapless(prescale.wanted(found, margins)):
            yield f"{label}: the freeze margins leave no gap between sessions: nothing could ever be changed"

"""Pods before the open: KEDA's cron triggers for a market's sessions.

A cron line knows weekdays and no holidays, so each market gets weekly triggers in its own time zone (right through
changes of the clock) for the hours it usually keeps, and a dated trigger for each session that they do not cover. On a
holiday, and after the close of a half-day, the weekly trigger keeps pods that nobody asks: `idle` says how long. They
cost money and nothing else; the other way round, pods would be missing at an open when a file was not rendered anew.

KEDA's rule (its cron scaler): a trigger is active while its next end comes no later than its next start.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

from export.deployment.calendar_file import DAYS, Prescale
from export.deployment.sessions import Trading

DAY = timedelta(days=1)
# A weekday's hours are usual when at least every second week keeps them.
USUAL = 0.5
# Cron counts weekdays from Sunday, Python from Monday.
SUNDAY_FIRST = 1

Span = tuple[datetime, datetime]


@dataclass(frozen=True)
class Trigger:
    """One KEDA cron trigger. `start` and `end` are cron lines in `timezone`."""

    name: str
    timezone: str
    start: str
    end: str
    replicas: int

    def to_json(self) -> dict[str, Any]:
        """As an item of the chart's `keda.preScale`."""
        return {
            "name": self.name,
            "timezone": self.timezone,
            "start": self.start,
            "end": self.end,
            "replicas": self.replicas,
        }


@dataclass(frozen=True)
class Idle:
    """Pods that are there outside any session: from, until."""

    market: str
    start: datetime
    end: datetime

    def to_json(self) -> dict[str, Any]:
        """With its hours."""
        hours = (self.end - self.start).total_seconds() / 3_600
        return {
            "market": self.market,
            "start": self.start.isoformat(),
            "end": self.end.isoformat(),
            "hours": round(hours, 2),
        }


def wanted(found: Trading, prescale: Prescale) -> list[Span]:
    """When pods are wanted, in the market's zone: each session with its margins, those that touch joined."""
    before, after = timedelta(minutes=prescale.minutes_before), timedelta(minutes=prescale.minutes_after)
    spans: list[Span] = []
    for session in found.sessions:
        # Margins are spans of real time, so they are taken off in UTC.
        start = (session.opens.astimezone(UTC) - before).astimezone(found.zone)
        end = (session.closes.astimezone(UTC) + after).astimezone(found.zone)
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


def gapless(spans: Sequence[Span]) -> bool:
    """Whether spans have grown together for a week and more: there is no rhythm left that a cron line could have."""
    return any(end - start >= timedelta(weeks=1) for start, end in spans)


def triggers(found: Trading, prescale: Prescale, until: datetime) -> list[Trigger]:
    """Weekly triggers for the usual hours of a year of sessions, and dated ones for what else starts before `until`.

    None for a market that never closes (nothing opens), or whose margins leave no gap.
    """
    spans, label, zone = wanted(found, prescale), found.market.label, found.zone.key
    if found.never_closes or not spans or gapless(spans):
        return []
    weekly = [
        Trigger(
            f"{label}-{_names(days)}",
            zone,
            _weekly(start, days),
            _weekly(end, [(day + later) % 7 for day in days]),
            prescale.replicas,
        )
        for (start, later, end), days in _usual(spans).items()
    ]
    covered = active(weekly, spans[0][0], spans[-1][1])
    rest = [(start, end) for start, end in spans if start < until and not _inside((start, end), covered)]
    return weekly + [
        Trigger(f"{label}-{start.date()}", zone, _dated(start), _dated(end), prescale.replicas) for start, end in rest
    ]


def _usual(spans: Sequence[Span]) -> dict[tuple[time, int, time], list[int]]:
    """(start, days until the end, end) -> the weekdays of the start on which it is the usual one."""
    by_day: dict[int, Counter[tuple[time, int, time]]] = defaultdict(Counter)
    for start, end in spans:
        by_day[start.weekday()][start.time(), (end.date() - start.date()).days, end.time()] += 1
    weeks = max(1.0, (spans[-1][1] - spans[0][0]) / timedelta(weeks=1))
    usual: dict[tuple[time, int, time], list[int]] = {}
    for day, hours in sorted(by_day.items()):
        kept, times = hours.most_common(1)[0]
        if times >= USUAL * weeks:
            usual.setdefault(kept, []).append(day)
    return usual


def _weekly(at: time, days: Sequence[int]) -> str:
    numbers = sorted((day + SUNDAY_FIRST) % 7 for day in days)
    return f"{at.minute} {at.hour} * * {_ranges(numbers)}"


def _ranges(numbers: Sequence[int]) -> str:
    """`1-5` for days in a row, `1,3` for others."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))


def _dated(moment: datetime) -> str:
    return f"{moment.minute} {moment.hour} {moment.day} {moment.month} *"


def _names(days: Sequence[int]) -> str:
    if len(days) > 2 and days[-1] - days[0] == len(days) - 1:
        return f"{DAYS[days[0]]}-to-{DAYS[days[-1]]}"
    return "-".join(DAYS[day] for day in days)


def active(found: Iterable[Trigger], start: datetime, end: datetime) -> list[Span]:
    """When at least one of the triggers is active between `start` and `end`, by KEDA's rule; touching spans joined."""
    spans = sorted(span for trigger in found for span in _active(trigger, start, end))
    joined: list[Span] = []
    for span in spans:
        if joined and span[0] <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(span[1], joined[-1][1]))
        else:
            joined.append(span)
    return joined


def _active(trigger: Trigger, start: datetime, end: datetime) -> Iterator[Span]:
    # A dated trigger fires once a year: the neighbours of any moment lie within a year of it.
    reach = timedelta(weeks=1) if trigger.start.split()[2] == "*" else timedelta(days=366)
    first, last = start - reach, end + reach
    ends = {(moment, 0) for moment in fires(trigger.end, trigger.timezone, first, last)}
    starts = {(moment, 1) for moment in fires(trigger.start, trigger.timezone, first, last)}
    events = sorted(ends | starts)
    for (moment, _), (following, kind) in pairwise(events):
        if kind == 0 and following > start and moment < end:
            yield max(moment, start), min(following, end)


def fires(cron: str, timezone: str, start: datetime, end: datetime) -> Iterator[datetime]:
    """When a cron line fires, in UTC: of numbers, `*` and, for weekdays, ranges and lists.

    A time that the clock skips on its day does not come.
    """
    minute, hour, day, month, weekdays = cron.split()
    zone, days = ZoneInfo(timezone), _weekdays(weekdays)
    current, last = start.astimezone(zone).date(), end.astimezone(zone).date()
    while current <= last:
        if day in ("*", str(current.day)) and month in ("*", str(current.month)) and current.weekday() in days:
            local = datetime.combine(current, time(int(hour), int(minute)), zone)
            moment = local.astimezone(UTC)
            if moment.astimezone(zone).time() == local.time() and start <= moment <= end:
                yield moment
        current = _next(current)


def _next(day: date) -> date:
    return day + DAY


def _weekdays(text: str) -> set[int]:
    """Python's numbers of the weekdays in a cron field."""
    if text == "*":
        return set(range(7))
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= {(number - SUNDAY_FIRST) % 7 for number in range(int(first), int(last or first) + 1)}
    return found


def _inside(span: Span, spans: Iterable[Span]) -> bool:
    return any(start <= span[0] and span[1] <= end for start, end in spans)


def idle(found: Trading, prescale: Prescale, made: Sequence[Trigger], start: datetime, end: datetime) -> list[Idle]:
    """Where the triggers keep pods between `start` and `end` that no session wants."""
    left: list[Idle] = []
    wants = wanted(found, prescale)
    for first, last in active(made, start, end):
        position = first
        for want_start, want_end in wants:
            if want_end <= position or want_start >= last:
                continue
            if want_start > position:
                left.append(_idle(found, position, want_start))
            position = max(position, want_end)
        if position < last:
            left.append(_idle(found, position, last))
    return left


def _idle(found: Trading, start: datetime, end: datetime) -> Idle:
    return Idle(found.market.label, start.astimezone(found.zone), end.astimezone(found.zone))

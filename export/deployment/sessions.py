"""When a market trades: its sessions from exchange-calendars, or from the calendar file's own hours.

exchange-calendars brings pandas, so it is imported when an exchange is asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from export.deployment.calendar_file import DAYS, Market
from tickserve import stages
from tickserve.errors import ConfigError

DAY = timedelta(days=1)
# A session may begin on the day before its date (futures), and none lasts longer than a week.
MARGIN = 8 * DAY


@dataclass(frozen=True)
class Session:
    """One session of a market, in the market's own time zone; `day` is the date the exchange gives it."""

    market: str
    day: date
    opens: datetime
    closes: datetime


@dataclass(frozen=True)
class Trading:
    """A market's sessions over a stretch of time, in order; `never_closes` where one begins as the last ends."""

    market: Market
    zone: ZoneInfo
    sessions: tuple[Session, ...]

    @property
    def never_closes(self) -> bool:
        """Whether there is no pause between the sessions: nothing opens, and nothing may wait for a close."""
        pairs = zip(self.sessions, self.sessions[1:], strict=False)
        return len(self.sessions) > 1 and all(one.closes >= other.opens for one, other in pairs)


def trading(market: Market, start: datetime, end: datetime) -> Trading:
    """The sessions that touch `start` to `end` (aware). Raises ConfigError for what exchange-calendars lacks."""
    if market.exchange is not None:
        zone, found = _of_exchange(market, start, end)
    else:
        zone = ZoneInfo(market.timezone or "UTC")
        found = list(_own(market, zone, start, end))
    inside = (each for each in found if each.closes > start and each.opens < end)
    return Trading(market, zone, tuple(sorted(inside, key=lambda each: each.opens)))


def _own(market: Market, zone: ZoneInfo, start: datetime, end: datetime) -> Iterator[Session]:
    day = start.astimezone(zone).date() - DAY
    while day <= end.astimezone(zone).date():
        if DAYS[day.weekday()] in market.days and day not in market.closed and market.open and market.close:
            closes = market.early_close.get(day, market.close)
            last = day if closes > market.open else day + DAY
            yield Session(
                market.label, day, datetime.combine(day, market.open, zone), datetime.combine(last, closes, zone)
            )
        day += DAY


def _of_exchange(market: Market, start: datetime, end: datetime) -> tuple[ZoneInfo, list[Session]]:
    library = stages.load_core("exchange_calendars")
    calendar = _calendar(library, str(market.exchange), (start - MARGIN).date(), (end + MARGIN).date())
    zone = ZoneInfo(str(calendar.tz))

    def local(moment: Any) -> datetime:
        plain: datetime = moment.to_pydatetime()
        return plain.replace(tzinfo=plain.tzinfo or UTC).astimezone(zone)

    columns = zip(calendar.schedule.index, calendar.opens, calendar.closes, strict=True)
    return zone, [Session(market.label, day.date(), local(opens), local(closes)) for day, opens, closes in columns]


def _calendar(library: Any, code: str, first: date, last: date) -> Any:
    errors = library.errors
    try:
        return library.get_calendar(code, start=first.isoformat(), end=last.isoformat())
    except errors.InvalidCalendarName as error:
        near = difflib.get_close_matches(code.upper(), library.get_calendar_names(), 1)
        hint = f"the nearest is {near[0]}" if near else None
        raise ConfigError(
            "unknown exchange",
            field="market.exchange",
            expected="a code of exchange-calendars, as XNYS",
            was=code[:40],
            hint=hint,
        ) from error
    except (errors.CalendarError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(
            f"no sessions of {code} from {first} to {last}", field="market.exchange", hint=reason
        ) from error

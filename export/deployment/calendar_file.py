"""The calendar file: which markets the models trade, how early pods are there, and when nothing may be changed.

    [prescale]
    minutes_before = 30          # pods are asked for so long before the open
    minutes_after = 0            # and kept so long after the close
    replicas = 6

    [freeze]
    minutes_before = 15
    minutes_after = 15

    [[market]]
    exchange = "XNYS"            # a code of exchange-calendars: holidays and half-days are known

    [[market]]                   # or sessions of your own
    name = "crypto-peak"
    timezone = "UTC"
    days = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
    open = "12:00"
    close = "21:00"              # earlier than the open: the next day
    closed = ["2026-12-25"]
    early_close = { "2026-12-24" = "18:00" }

A market may have `prescale` and `freeze` tables of its own, in place of the file's.
"""

from __future__ import annotations

import re
from datetime import date, time
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tickserve.errors import ConfigError
from tickserve.settings import read_toml

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


class Table(BaseModel):
    """Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Prescale(Table):
    """Pods asked for before the open."""

    minutes_before: int = Field(30, ge=0, lt=DAY_MINUTES)
    minutes_after: int = Field(0, ge=0, lt=DAY_MINUTES)
    replicas: int = Field(ge=1, le=1_000)


class Freeze(Table):
    """How long around a session nothing may be changed."""

    minutes_before: int = Field(15, ge=0, lt=DAY_MINUTES)
    minutes_after: int = Field(15, ge=0, lt=DAY_MINUTES)


class Market(Table):
    """One exchange by its code, or sessions of one's own."""

    exchange: str | None = None
    name: str = ""
    timezone: str | None = None
    days: tuple[str, ...] = ()
    open: time | None = None
    close: time | None = None
    closed: tuple[date, ...] = ()
    early_close: dict[date, time] = {}
    prescale: Prescale | None = None
    freeze: Freeze | None = None

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, zone: str | None) -> str | None:
        if zone is None:
            return None
        try:
            return ZoneInfo(zone).key
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(f"timezone: expected a name of the time zone database, was {zone[:60]!r}") from error

    @field_validator("days")
    @classmethod
    def _known_days(cls, days: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [day for day in days if day not in DAYS]
        if unknown or len(set(days)) < len(days):
            raise ValueError(f"days: expected each of {', '.join(DAYS)} once at most, was {list(days)}")
        return tuple(sorted(days, key=DAYS.index))

    @model_validator(mode="after")
    def _one_kind(self) -> Market:
        own = {name: bool(getattr(self, name)) for name in ("timezone", "days")}
        own |= {name: getattr(self, name) is not None for name in ("open", "close")}
        given = [name for name, there in own.items() if there] + [
            name for name in ("closed", "early_close") if getattr(self, name)
        ]
        if self.exchange is not None and given:
            raise ValueError(f"{given[0]}: expected none beside exchange ({self.exchange}), which knows its sessions")
        lacks = [name for name, there in (own | {"name": bool(self.name)}).items() if not there]
        if self.exchange is None and lacks:
            raise ValueError(f"{lacks[0]}: expected with sessions of one's own (or exchange), was left out")
        if self.open is not None and self.open == self.close:
            raise ValueError("close: expected another time than open; a market that never closes has no sessions")
        late = [day for day, close in self.early_close.items() if not self._earlier(close)]
        if late:
            raise ValueError(
                f"early_close: expected after the open and before the close, was {late[0]} at another time"
            )
        if not NAME.fullmatch(self.label):
            raise ValueError(f"name: expected 1 to 40 of [a-z0-9-], was {self.label[:50]!r}")
        return self

    def _earlier(self, close: time) -> bool:
        """Whether a session that ends at `close` is shorter than the regular one; either may end on the next day."""
        minutes = [each.hour * 60 + each.minute for each in (self.open, close, self.close) if each is not None]
        after_open = [(each - minutes[0]) % DAY_MINUTES for each in minutes]
        return 0 < after_open[1] < after_open[2]

    @property
    def label(self) -> str:
        """The market's name in triggers and windows."""
        return self.name or re.sub(r"[^a-z0-9]+", "-", (self.exchange or "").lower()).strip("-")


class Calendar(Table):
    """The whole file."""

    prescale: Prescale | None = None
    freeze: Freeze | None = None
    market: tuple[Market, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _something_of_each(self) -> Calendar:
        labels = [market.label for market in self.market]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"market.name: expected different names, was {twice[0]!r} more than once")
        return self

    def prescale_of(self, market: Market) -> Prescale | None:
        """The market's own table, else the file's; None: pods are not asked for ahead."""
        return market.prescale or self.prescale

    def freeze_of(self, market: Market) -> Freeze | None:
        """The market's own table, else the file's; None: no freeze."""
        return market.freeze or self.freeze


def read_calendar(path: Path) -> Calendar:
    """The calendar in a TOML file. Raises ConfigError naming the key."""
    tree = read_toml(path)
    try:
        return Calendar.model_validate(tree)
    except ValidationError as error:
        raise _refusal(error, path.name) from error


def _refusal(error: ValidationError, name: str) -> ConfigError:
    problem: Any = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    field, separator, rest = message.partition(": expected ")
    if separator:
        key = ".".join(part for part in (where, field) if part) if not where.endswith(field) else where
        return ConfigError(f"expected {rest} (from {name})", field=key)
    if problem["type"] == "extra_forbidden":
        return ConfigError(f"unknown key (from {name})", field=where)
    expected = message.removeprefix("Input should be ")
    if expected == message:
        return ConfigError(f"{message} (from {name})", field=where or name)
    return ConfigError(f"wrong value from {name}", field=where, expected=expected, was=repr(problem["input"])[:80])

"""The calendar: what each session gets, through holidays, half-days and changes of the clock; bad files."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from export.deployment import freeze, prescale
from export.deployment.calendar_file import Calendar, Prescale, read_calendar
from export.deployment.schedule import Schedule, schedule
from export.deployment.sessions import trading
from tickserve.errors import ConfigError, UsageError

NEW_YORK = ZoneInfo("America/New_York")
OWN = """
[prescale]
replicas = 4
[freeze]
[[market]]
name = "desk"
timezone = "Europe/London"
days = ["mon", "tue", "wed", "thu", "fri"]
open = "08:00"
close = "16:30"
closed = [2026-12-25, 2026-12-28]
early_close = { 2026-12-24 = "12:30" }
"""


def of(*exchanges: str, **prescaled: int) -> Calendar:
    tables = {"prescale": {"replicas": 6} | prescaled, "freeze": {}}
    return Calendar.model_validate(tables | {"market": [{"exchange": code} for code in exchanges]})


def written(folder: Path, text: str) -> Path:
    (folder / "cal.toml").write_text(text)
    return folder / "cal.toml"


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=NEW_YORK)


@pytest.fixture(scope="module")
def thanksgiving() -> Schedule:
    """New York's exchange over Thanksgiving 2026, the half-day after it, and Christmas."""
    return schedule(of("XNYS"), at("2026-11-20"), 45)


def test_one_weekly_trigger_covers_a_plain_exchange(thanksgiving: Schedule) -> None:
    (trigger,) = thanksgiving.triggers
    assert trigger.to_json() == {
        "name": "xnys-mon-to-fri",
        "timezone": "America/New_York",
        "start": "0 9 * * 1-5",
        "end": "0 16 * * 1-5",
        "replicas": 6,
    }


def test_holidays_and_half_days_cost_idle_pods_and_are_named(thanksgiving: Schedule) -> None:
    said = {(each.start.date().isoformat(), each.to_json()["hours"]) for each in thanksgiving.idle}
    assert said == {
        ("2026-11-26", 7.0),  # Thanksgiving
        ("2026-11-27", 3.0),  # the half-day after it
        ("2026-12-24", 3.0),
        ("2026-12-25", 7.0),
        ("2027-01-01", 7.0),
    }


def test_no_freeze_on_a_holiday_and_a_short_one_on_a_half_day(thanksgiving: Schedule) -> None:
    windows = {window.day: window.to_json() for window in thanksgiving.windows}
    assert date(2026, 11, 26) not in windows
    assert date(2026, 12, 25) not in windows
    assert windows[date(2026, 11, 25)]["end"] == "2026-11-25T16:15:00-05:00"
    assert windows[date(2026, 11, 27)] == {
        "name": "xnys-2026-11-27",
        "start": "2026-11-27T09:15:00-05:00",
        "end": "2026-11-27T13:15:00-05:00",
    }


@pytest.mark.parametrize("change", ["2026-03-08", "2026-11-01"])
def test_pods_are_there_before_the_open_on_both_sides_of_a_change_of_the_clock(change: str) -> None:
    middle = at(change)
    calendar = of("XNYS", minutes_before=45)
    made = schedule(calendar, middle - timedelta(days=7), 14)
    active = prescale.active(made.triggers, middle - timedelta(days=7), middle + timedelta(days=7))
    assert len(active) == len(made.sessions) == 10
    for (start, end), session in zip(active, made.sessions, strict=True):
        assert session.opens - start == timedelta(minutes=45)
        assert end == session.closes
    offsets = {session.opens.utcoffset() for session in made.sessions}
    assert len(offsets) == 2, "the clock does change in these weeks"
    assert len({start.astimezone(UTC).time() for start, _ in active}) == 2


@pytest.mark.parametrize("code", ["XNYS", "XLON", "XHKG", "XTKS", "CMES", "us_futures", "XBOG", "XSAU"])
def test_every_session_of_a_year_is_covered(code: str) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    calendar = of(code)
    made = schedule(calendar, start, 365)
    covered = prescale.active(made.triggers, start - timedelta(days=3), start + timedelta(days=380))
    wants = prescale.wanted(trading(calendar.market[0], start, made.end), Prescale(replicas=6))
    missed = [span for span in wants if not any(s <= span[0] and span[1] <= e for s, e in covered)]
    assert len(wants) > 40
    assert missed == []


def test_a_session_outside_the_usual_hours_gets_a_dated_trigger(tmp_path: Path) -> None:
    text = OWN + '[[market]]\nname = "usual"\ntimezone = "UTC"\ndays = ["sat"]\nopen = "10:00"\nclose = "11:00"\n'
    calendar = read_calendar(written(tmp_path, text))
    start = datetime(2026, 12, 1, tzinfo=UTC)
    found = trading(calendar.market[0], start, start + timedelta(days=120))
    extra = datetime(2026, 12, 12, 9, tzinfo=found.zone)  # a Saturday
    session = type(found.sessions[0])("desk", extra.date(), extra, extra + timedelta(hours=2))
    special = type(found)(found.market, found.zone, tuple(sorted((*found.sessions, session), key=lambda s: s.opens)))
    made = prescale.triggers(special, Prescale(replicas=4), start + timedelta(days=30))
    assert [(t.name, t.start, t.end) for t in made] == [
        ("desk-mon-to-fri", "30 7 * * 1-5", "30 16 * * 1-5"),
        ("desk-2026-12-12", "30 8 12 12 *", "0 11 12 12 *"),
    ]
    # It is active then, and not on other days of the year; weeks later it is not rendered any more.
    (dated,) = made[1:]
    spans = prescale.active([dated], start, start + timedelta(days=300))
    assert [(s.isoformat(), e.isoformat()) for s, e in spans] == [
        ("2026-12-12T08:30:00+00:00", "2026-12-12T11:00:00+00:00")
    ]
    assert len(prescale.triggers(special, Prescale(replicas=4), start + timedelta(days=3))) == 1


def test_hours_past_midnight() -> None:
    market = {"name": "night", "timezone": "America/Chicago", "days": ["sun", "mon", "tue", "wed", "thu"]}
    tables = {"prescale": {"replicas": 2}, "market": [market | {"open": "17:00", "close": "16:00"}]}
    made = schedule(Calendar.model_validate(tables), datetime(2026, 11, 22, tzinfo=UTC), 7)
    (trigger,) = made.triggers
    assert (trigger.start, trigger.end) == ("30 16 * * 0-4", "0 16 * * 1-5")
    assert made.windows == ()
    assert made.idle == ()


def test_margins_that_touch_are_one_stretch_from_week_to_week() -> None:
    made = schedule(of("CMES"), datetime(2026, 11, 8, tzinfo=UTC), 7)
    (trigger,) = made.triggers
    assert (trigger.start, trigger.end) == ("30 16 * * 0", "0 17 * * 5")


def test_a_market_that_never_closes_gets_neither_and_is_told() -> None:
    made = schedule(of("24/7"), datetime(2026, 11, 8, tzinfo=UTC), 7)
    assert (made.triggers, made.windows, made.idle) == ((), (), ())
    assert "24-7 never closes" in made.notes[0]


def test_margins_that_leave_no_gap_are_told() -> None:
    days = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
    market = {"name": "always", "timezone": "UTC", "days": days, "open": "01:00", "close": "00:30"}
    tables = {"prescale": {"replicas": 2}, "freeze": {}, "market": [market]}
    made = schedule(Calendar.model_validate(tables), datetime(2026, 11, 8, tzinfo=UTC), 7)
    assert made.triggers == ()
    assert ["pre-scale margins leave no gap" in note for note in made.notes] == [True, False]
    assert "nothing could ever be changed" in made.notes[1]
    tables |= {"prescale": {"replicas": 2, "minutes_before": 20}, "freeze": {"minutes_after": 10}}
    assert schedule(Calendar.model_validate(tables), datetime(2026, 11, 8, tzinfo=UTC), 7).notes == ()


def test_days_without_a_session_are_told_with_the_next() -> None:
    saturday = datetime(2026, 11, 28, tzinfo=UTC)
    assert schedule(of("XNYS"), saturday, 2).notes == (
        "xnys: no session in the 2 days from 2026-11-28; the next opens 2026-11-30T09:30:00-05:00",
    )
    assert schedule(of("XNYS"), saturday, 3).notes == ()
    market = {"name": "desk", "timezone": "UTC", "days": ["mon"], "open": "08:00", "close": "16:30"}
    mondays = [(saturday + timedelta(days=2 + 7 * week)).date().isoformat() for week in range(60)]
    never = Calendar.model_validate({"freeze": {}, "market": [market | {"closed": mondays}]})
    (note,) = schedule(never, saturday, 30).notes
    assert note == "desk: no session in the 30 days from 2026-11-28; nor in the year to come: see days and closed"


def test_own_sessions(tmp_path: Path) -> None:
    calendar = read_calendar(written(tmp_path, OWN))
    made = schedule(calendar, datetime(2026, 12, 21, tzinfo=UTC), 14)
    days = [session.day.isoformat() for session in made.sessions]
    assert "2026-12-25" not in days
    assert "2026-12-28" not in days
    assert len(days) == 8
    (half,) = [window for window in made.windows if window.day == date(2026, 12, 24)]
    assert half.end.isoformat() == "2026-12-24T12:45:00+00:00"


def test_inside_and_outside_a_freeze() -> None:
    calendar = of("XNYS")
    for moment, names in (
        ("2026-11-25T09:14:59", []),
        ("2026-11-25T09:15:00", ["xnys-2026-11-25"]),
        ("2026-11-25T16:14:59", ["xnys-2026-11-25"]),
        ("2026-11-25T16:15:00", []),
        ("2026-11-26T12:00:00", []),  # Thanksgiving
        ("2026-11-27T13:10:00", ["xnys-2026-11-27"]),
        ("2026-11-27T14:00:00", []),  # a half-day
    ):
        now = at(moment)
        found = freeze.windows(calendar, now, now + timedelta(days=1))
        assert [window.name for window in freeze.holding(found, now)] == names, moment


def test_the_end_of_a_window_is_outside() -> None:
    window = freeze.Window("xnys", date(2026, 11, 25), at("2026-11-25T09:15:00"), at("2026-11-25T16:15:00"))
    assert freeze.holding([window], window.start) == [window]
    assert freeze.holding([window], window.end) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("[prescale]\nreplicas = 2\n", "market: Field required"),
        ('[[market]]\nexchange = "XNYS"\nopen = "09:30"\n', "market.0.open: expected none beside exchange"),
        ('[[market]]\nname = "desk"\n', "market.0.timezone: expected with sessions of one's own"),
        (OWN.replace("Europe/London", "Mars/Olympus"), "timezone: expected a name of the time zone database"),
        (OWN.replace('"mon", ', '"monday", '), "days: expected each of mon"),
        (OWN.replace("[freeze]", "[freeze]\nminutes = 5"), "freeze.minutes: unknown key"),
        (OWN.replace("replicas = 4", "replicas = 0"), "prescale.replicas: wrong value"),
        (OWN.replace('"12:30"', '"17:30"'), "early_close: expected after the open and before the close"),
        (OWN.replace('"16:30"', '"08:00"'), "close: expected another time than open"),
        (OWN + '[[market]]\nexchange = "XNYS"\nname = "desk"\n', "market.name: expected different names"),
        ('[[market]]\nexchange = "XNYS"\nname = "No Name"\n', "name: expected 1 to 40 of [a-z0-9-]"),
        ("[[market]]\nexchange = 5\n", "market.0.exchange: wrong value"),
    ],
)
def test_a_bad_file_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_calendar(written(tmp_path, text))
    assert message in str(raised.value)
    assert "cal.toml" in str(raised.value)


def test_an_unknown_exchange_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"market\.exchange: unknown exchange: .* was XNZS \(the nearest is XNZE\)"):
        schedule(of("XNZS"), datetime(2026, 11, 8, tzinfo=UTC), 7)


def test_past_what_is_known_of_an_exchange_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no sessions of XHKG from .* only recorded to the year"):
        schedule(of("XHKG"), datetime(2055, 1, 1, tzinfo=UTC), 7)


@pytest.mark.parametrize("text", ["tomorrow", "2026-11-27T09:30:00", ""])
def test_a_moment_needs_its_offset(text: str) -> None:
    with pytest.raises(UsageError, match="--at"):
        freeze.parse_moment(text, "--at")


def test_the_page_shows_a_file_that_is_read(root: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (root / "docs/calendar.md").read_text(), flags=re.DOTALL)
    calendar = read_calendar(written(tmp_path, block))
    assert [market.label for market in calendar.market] == ["xnys", "crypto-peak"]
    made = schedule(calendar, datetime(2026, 11, 23, tzinfo=UTC), 7)
    assert {trigger.replicas for trigger in made.triggers} == {6, 4}
    assert sum(each.to_json()["hours"] for each in made.idle if each.market == "xnys") == 10.0

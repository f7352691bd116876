"""The rules as text: thresholds come from the configuration, names agree, every alert has its tests and its page."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from monitoring.dashboards import dashboards
from monitoring.rules import alerts, groups
from monitoring.rules.rule import duration, number
from monitoring.rules.servers import in_session
from tests.monitoring.test_live_alerts import NOT_LIVE
from tickserve.cli.commands import app
from tickserve.config import Config, MonitoringSettings
from tickserve.settings import PROFILES, flatten, load_settings

DEFAULTS = MonitoringSettings()
UNIT_TESTS = Path(__file__).with_name("rules")
KEYS = set(MonitoringSettings.model_fields)
# Keys that are read by no alert's page: where the pages are.
ELSEWHERE = {"runbook_url"}


def settings(**changes: Any) -> MonitoringSettings:
    return MonitoringSettings(**changes)


def texts(settings: MonitoringSettings) -> list[str]:
    return [group.yaml(settings.runbook_url) for group in groups(settings)]


def test_each_group_is_yaml_of_its_own_and_names_are_there_once() -> None:
    names = []
    for group in groups(DEFAULTS):
        (read,) = yaml.safe_load(group.yaml(DEFAULTS.runbook_url))["groups"]
        assert read["name"] == group.name
        names += [rule.get("alert") or rule["record"] for rule in read["rules"]]
    assert len(names) == len(set(names)) > 50
    assert all(re.fullmatch(r"Tickserve[A-Za-z]+|tickserve:[a-z_]+:[a-z0-9_]+", name) for name in names)


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_every_threshold_changes_a_rule(profile: str) -> None:
    """A key that no rule reads would be set in vain."""
    base = load_settings(profile=profile, environ={}).config.monitoring
    changed: dict[str, Any] = {
        "session_days": ("monday",),
        "session_open": "09:30",
        "session_close": "16:00",
        "slo_objective": 0.9999,
        "burn_factors": (10.0, 5.0, 2.0),
        "burn_long_s": (7_200.0, 21_601.0, 259_201.0),
        "burn_short_s": (301.0, 1_801.0, 21_599.0),
    }

    for key in KEYS:
        value = getattr(base, key)
        other = changed.get(key, f"x{value}" if isinstance(value, str) else value * 2 if value != 0.5 else 0.6)
        assert texts(base.model_copy(update={key: other})) != texts(base), key


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"burn_short_s": (3_600.0, 1_800.0, 21_600.0)},
            "burn_short_s: expected each above 0 and below burn_long_s, was 3600 of 3600",
        ),
        ({"burn_factors": (14.4, 6.0, 0.0)}, "burn_factors: expected each above 0"),
        ({"slo_objective": 0.9}, "slo_objective: expected burn_factors times the budget"),
        ({"slo_objective": 1.0}, "less than 1"),
        ({"session_open": "16:00", "session_close": "09:30"}, "session_close: expected after 16:00"),
        ({"session_open": "9:30"}, "session_open"),
        ({"session_days": ("someday",)}, "session_days"),
        ({"session_days": ()}, "session_days"),
        ({"psi": 0.0}, "psi"),
        ({"error_ratio": 1.5}, "error_ratio"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        settings(**changes)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.5, "500ms"), (1.5, "1500ms"), (90, "90s"), (300, "5m"), (3_600, "1h"), (259_200, "3d")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.integers(1, 10**9))
def test_a_duration_says_what_it_was(milliseconds: int) -> None:
    found = re.fullmatch(r"(\d+)(ms|s|m|h|d)", duration(milliseconds / 1_000))
    assert found
    size = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}[found[2]]
    assert int(found[1]) * size == milliseconds


def test_a_sum_of_settings_has_no_digits_of_the_machine() -> None:
    assert number(14.4 * (1 - 0.999)) == "0.0144"


def holds(expr: str, at: datetime) -> bool:
    """`in_session` as Python would say it: of PromQL it uses only what means the same there."""
    if not expr:
        return True
    now = {"day_of_week()": (at.weekday() + 1) % 7, "hour()": at.hour, "minute()": at.minute}
    for name, value in now.items():
        expr = expr.replace(name, str(value))
    return bool(eval(expr))


@given(st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 31)))
@example(datetime(2026, 1, 5, 9, 29))
@example(datetime(2026, 1, 5, 9, 30))
@example(datetime(2026, 1, 5, 15, 59))
@example(datetime(2026, 1, 5, 16, 0))
def test_the_session_is_these_hours_of_these_days(at: datetime) -> None:
    desk = settings(session_days=("monday", "friday"), session_open="09:30", session_close="16:00")
    inside = at.weekday() in (0, 4) and (9, 30) <= (at.hour, at.minute) < (16, 0)
    assert holds(in_session(desk), at) == inside
    assert holds(in_session(settings(session_days=("monday", "friday"))), at) == (at.weekday() in (0, 4))
    hours = settings(session_open="09:30")
    assert holds(in_session(hours), at) == ((at.hour, at.minute) >= (9, 30))
    assert in_session(DEFAULTS) == ""


def test_the_days_are_prometheus_days() -> None:
    sunday = datetime(2026, 1, 4, 12, tzinfo=UTC)
    for index, day in enumerate(DEFAULTS.session_days):
        only = in_session(settings(session_days=(day,)))
        assert [holds(only, sunday + timedelta(days=n)) for n in range(7)] == [n == index for n in range(7)]


def test_what_triton_reports_is_looked_at_under_the_jobs_of_our_servers() -> None:
    text = "".join(texts(settings(server_jobs="ours")))
    selectors = re.findall(r"\bnv_\w+(.{0,13})", text)
    assert len(selectors) > 10
    assert all(each.startswith('{job=~"ours"') for each in selectors)


# Unit tests of promtool, by what they hold: run by test_promtool.py.


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    fires, silent = set(), set()
    for path in UNIT_TESTS.glob("*.test.yaml"):
        for test in yaml.safe_load(path.read_text())["tests"]:
            for check in test["alert_rule_test"]:
                (fires if check["exp_alerts"] else silent).add(check["alertname"])
    assert fires == silent == set(alerts(DEFAULTS))


# Runbooks.


def pages(root: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in (root / "docs" / "runbooks").glob("Tickserve*.md")}


def test_every_alert_has_its_page_and_every_page_its_alert(root: Path) -> None:
    known = alerts(DEFAULTS)
    assert set(pages(root)) == set(known)
    for name, alert in known.items():
        assert alert.lines(DEFAULTS.runbook_url)["annotations"]["runbook_url"] == f"docs/runbooks/{name}.md"
    index = (root / "docs" / "runbooks" / "README.md").read_text()
    assert set(re.findall(r"^\| \[(\w+)\]\(\1\.md\) \| (?:critical|warning) \|", index, re.MULTILINE)) == set(known)


@pytest.mark.parametrize("name", sorted(alerts(DEFAULTS)))
def test_a_page_says_what_a_person_needs_at_night(root: Path, name: str) -> None:
    text, alert = pages(root)[name], alerts(DEFAULTS)[name]
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == [
        "What it means",
        "How to see it",
        "What to do",
        "How it resolves",
        "How it is tested",
    ]
    assert f"**Severity:** {alert.severity}" in text
    named = set(re.findall(r"`monitoring\.(\w+)`", text.partition("## What it means")[0]))
    assert named == set(alert.keys)
    assert ("has not been made to fire" in " ".join(text.split())) == (name in NOT_LIVE)


def test_pages_name_settings_and_commands_that_are_there(root: Path) -> None:
    keys, command = set(flatten(Config().model_dump())), typer.main.get_command(app)
    text = "".join(pages(root).values())
    sections = set(Config.model_fields)
    for section, key in re.findall(r"`(\w+)\.(\w+)`", text):
        assert section not in sections or f"{section}.{key}" in keys, f"{section}.{key}"
    commands = re.findall(r"tickserve ([a-z]+)(?: ([a-z]+))?", text)
    assert len(commands) > 10
    for name, sub in commands:
        if name == "deploy":  # the command of another part, which is not in every checkout
            continue
        found: Any = command.commands[name]  # type: ignore[attr-defined]
        assert not hasattr(found, "commands") or sub in found.commands, f"{name} {sub}"


def test_pages_name_metrics_that_rules_or_dashboards_know(root: Path) -> None:
    known = "".join(texts(DEFAULTS))
    known += "".join(query.expr for page in dashboards(DEFAULTS) for panel in page.panels for query in panel.queries)
    blocks = "\n".join(re.findall(r"```promql\n(.*?)```", "".join(pages(root).values()), re.DOTALL))
    metrics = set(re.findall(r"\b(?:tickserve[_:]|nv_|DCGM_)[\w:]+", blocks))
    assert len(metrics) > 15
    assert {metric for metric in metrics if metric not in known} == set()


def test_every_setting_is_named_by_a_page() -> None:
    assert {key for alert in alerts(DEFAULTS).values() for key in alert.keys} == KEYS - ELSEWHERE


def test_the_docs_count_the_alerts(root: Path) -> None:
    text, known = (root / "docs" / "monitoring.md").read_text(), alerts(DEFAULTS)
    assert f"{len(known)} alerts, each with" in text
    assert f"{len(known) - len(NOT_LIVE)} of the alerts are made to fire" in text
    for group in groups(DEFAULTS):
        assert f"| `{group.file}` |" in text

"""`monitor push` and `diff` against a stand-in for Grafana: the requests made, and what becomes of each answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from monitoring.dashboards import dashboards
from monitoring.grafana import Grafana
from tests.monitoring.grafana_stand_in import TOKEN, GrafanaStandIn, standing_in
from tickserve.cli.commands import app
from tickserve.config import MonitoringSettings
from tickserve.errors import ComponentError, ProtocolError, TickserveError, UsageError

PAGES = dashboards(MonitoringSettings())
UIDS = [page.uid for page in PAGES]


@pytest.fixture
def stand_in() -> Iterator[GrafanaStandIn]:
    with standing_in() as grafana:
        yield grafana


@pytest.fixture
def grafana(stand_in: GrafanaStandIn) -> Grafana:
    return Grafana(stand_in.url, TOKEN, timeout_s=5)


def test_a_push_makes_the_folder_and_every_dashboard_and_a_second_changes_nothing(
    stand_in: GrafanaStandIn, grafana: Grafana
) -> None:
    assert [(each.dashboard, each.done, each.version) for each in grafana.push(PAGES)] == [
        (uid, "created", 1) for uid in UIDS
    ]
    assert stand_in.folders == {"tickserve": "Tickserve"}
    assert set(stand_in.folder_of.values()) == {"tickserve"}
    assert grafana.diff(PAGES) == []
    del stand_in.requests[:]
    assert {each.done for each in grafana.push(PAGES)} == {"unchanged"}
    assert {method for method, _ in stand_in.requests} == {"GET"}


def test_a_diff_names_each_panel_and_field_and_a_push_puts_them_right(
    stand_in: GrafanaStandIn, grafana: Grafana
) -> None:
    assert [(each.dashboard, each.field) for each in grafana.diff(PAGES)] == [(uid, "dashboard") for uid in UIDS]
    grafana.push(PAGES)
    board = stand_in.dashboards["tickserve-serving"]
    board["title"] = "Mine"
    gone = board["panels"].pop(2)["title"]
    changed = board["panels"][1]
    changed["targets"][0]["expr"] = "up"
    board["panels"].append({"id": 900, "title": "Theirs", "type": "text"})
    found = {(each.panel, each.field): (each.ours, each.theirs) for each in grafana.diff(PAGES)}
    assert set(found) == {("", "title"), (gone, "panel"), (changed["title"], "targets[0].expr"), ("Theirs", "panel")}
    assert found[changed["title"], "targets[0].expr"][1] == "up"
    done = {each.dashboard: (each.done, each.version) for each in grafana.push(PAGES)}
    assert done.pop("tickserve-serving") == ("updated", 2)
    assert set(done.values()) == {("unchanged", 1)}
    assert grafana.diff(PAGES) == []


def test_a_dashboard_in_another_folder_is_brought_back(stand_in: GrafanaStandIn, grafana: Grafana) -> None:
    grafana.push(PAGES)
    stand_in.folder_of["tickserve-gpu"] = "elsewhere"
    assert [each.dashboard for each in grafana.push(PAGES) if each.done == "updated"] == ["tickserve-gpu"]
    assert stand_in.folder_of["tickserve-gpu"] == "tickserve"


def test_somebody_elses_save_in_between_is_not_overwritten(stand_in: GrafanaStandIn, grafana: Grafana) -> None:
    grafana.push(PAGES)
    board = stand_in.dashboards["tickserve-serving"]
    stale = json.loads(json.dumps({"dashboard": board | {"title": "Mine"}, "meta": {"folderUid": "tickserve"}}))
    board["version"] = 5
    # The folder, then the dashboard as it was before.
    stand_in.instead += [(200, {"uid": "tickserve"}), (200, stale)]
    with pytest.raises(ComponentError, match=r"changed meanwhile.*HTTP 412"):
        grafana.push(PAGES)
    assert stand_in.dashboards["tickserve-serving"]["version"] == 5


def test_a_path_in_front_of_grafana(stand_in: GrafanaStandIn) -> None:
    with pytest.raises(ComponentError, match="is the path of --url that of Grafana"):
        Grafana(f"{stand_in.url}/grafana/", TOKEN).push(PAGES)
    assert stand_in.requests[-1] == ("POST", "/grafana/api/folders")


BAD_ANSWERS: dict[str, tuple[Any, type[TickserveError], str]] = {
    "401": ((401, {"message": "no"}), ComponentError, "does not take the token"),
    "403": ((403, {"message": "no"}), ComponentError, "needs the role Editor"),
    "500": ((500, {"message": "boom"}), ComponentError, "HTTP 500"),
    "502 of a proxy, a page": ((502, b"<html>Bad gateway</html>"), ComponentError, "HTTP 502"),
    "an error that is a list": ((500, []), ComponentError, "HTTP 500|no Grafana"),
    "an error that is a number": ((500, 3), TickserveError, "no Grafana"),
    "a page": ((200, b"<html>hello</html>"), ProtocolError, "no Grafana"),
    "not UTF-8": ((200, b"\xff\xfe\x00"), ProtocolError, "no Grafana"),
    "nothing": ((200, b""), ProtocolError, "no Grafana"),
    "a list": ((200, []), ProtocolError, "expected a mapping, was list"),
    "no dashboard in it": ((200, {"meta": {}}), ProtocolError, "expected a mapping, was NoneType"),
    "too late": (1.5, ComponentError, "no answer in time"),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_a_bad_answer_is_a_typed_error_without_the_token(stand_in: GrafanaStandIn, case: str) -> None:
    answer, kind, says = BAD_ANSWERS[case]
    stand_in.instead.append(answer)
    with pytest.raises(kind, match=says) as caught:
        Grafana(stand_in.url, TOKEN, timeout_s=0.5 if case == "too late" else 30).diff(PAGES)
    assert TOKEN not in f"{caught.value!r}{caught.value.__cause__!r}"


@pytest.mark.parametrize(
    "panels", [None, [], [None, 3], [{"id": []}], "x"], ids=["none", "empty", "no mappings", "odd id", "text"]
)
def test_panels_that_are_none_are_differences(stand_in: GrafanaStandIn, grafana: Grafana, panels: Any) -> None:
    grafana.push(PAGES)
    stand_in.dashboards["tickserve-gpu"]["panels"] = panels
    found = grafana.diff(PAGES)
    assert {each.dashboard for each in found} == {"tickserve-gpu"}
    assert {each.theirs for each in found} <= {"is not there", "is there"}


@pytest.mark.parametrize(
    "url", ["127.0.0.1:3000", "ftp://x", "http://", "http://u:p@x", "http://x:99999", "http://[::1"]
)
def test_a_wrong_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="--url"):
        Grafana(url, TOKEN)


@pytest.mark.parametrize("token", ["", "a b", "a\nb", "ä"])
def test_what_is_no_token_is_refused_and_not_printed(token: str) -> None:
    with pytest.raises(UsageError, match="not a token") as caught:
        Grafana("http://127.0.0.1:1", token)
    assert not token or repr(token) not in str(caught.value)


def test_nobody_there() -> None:
    with pytest.raises(ComponentError, match=r"cannot reach http://127\.0\.0\.1:1: ConnectionError"):
        Grafana("http://127.0.0.1:1", TOKEN).diff(PAGES)


@pytest.mark.parametrize("how", ["netrc", "proxy"])
def test_neither_a_netrc_nor_a_proxy_of_the_machine_is_used(
    stand_in: GrafanaStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "netrc":
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    else:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
    grafana = Grafana(stand_in.url, TOKEN, timeout_s=5)
    # Only after a redirect is a netrc read.
    stand_in.instead.append(f"{stand_in.url}/api/folders/tickserve")
    assert {each.done for each in grafana.push(PAGES)} == {"created"}
    assert grafana.diff(PAGES) == []


# The command.


def command(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, ["monitor", *arguments], env={"GRAFANA_TOKEN": None, **environment})


def test_the_command_pushes_and_then_finds_no_difference(stand_in: GrafanaStandIn, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    given = ("--url", stand_in.url, "--token-file", str(tmp_path / "token"))
    refused = command("diff", *given, "--json")
    assert refused.exit_code == 1
    assert {row["dashboard"] for row in json.loads(refused.stdout)} == set(UIDS)
    pushed = command("push", *given, "--json")
    assert [row["done"] for row in json.loads(pushed.stdout)] == ["created"] * len(UIDS)
    same = command("diff", *given)
    assert (same.exit_code, same.stdout) == (0, "Grafana has what the code says\n")
    # Other thresholds are other panels.
    other = command("diff", "--url", stand_in.url, GRAFANA_TOKEN=TOKEN, TICKSERVE_MONITORING__PSI="0.5")
    assert other.exit_code == 1
    assert "Features that drift" in other.stdout
    assert not any(TOKEN in each.output for each in (refused, pushed, same, other))


def test_the_command_without_a_token_says_where_one_goes(stand_in: GrafanaStandIn, tmp_path: Path) -> None:
    for arguments in ((), ("--token-file", str(tmp_path / "none"))):
        done = command("push", "--url", stand_in.url, *arguments)
        assert isinstance(done.exception, UsageError)
        assert "--token-file" in str(done.exception)
    assert stand_in.requests == []

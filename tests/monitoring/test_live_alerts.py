"""Every alert fires by its fault, caused in a live system, and resolves by its end; every panel shows data.

One play for the whole file: all well, then every fault at once (each on a model of its own), then their end, then a
replica with another version, then no server at all. What cannot be had here is listed with its reason, and an entry
that does have data after all is an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from monitoring import picture
from monitoring.dashboards import dashboards
from monitoring.dashboards.variables import concrete
from monitoring.rules import alerts
from tests.monitoring.live import Inbox, wait_for
from tests.monitoring.stage import SHORT, Stage, certify, opened

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]  # the whole play is the set-up of its first test

# The fault of each alert, by the labels that its notification has to carry.
FAULTS: dict[str, dict[str, str]] = {
    "TickserveDeadlineBurnFast": {"model": "late"},
    "TickserveDeadlineBurnSteady": {"model": "late"},
    "TickserveDeadlineBurnSlow": {"model": "late"},
    "TickserveServerDown": {"job": "triton-tickserve"},
    "TickserveNoTraffic": {"model": "idle"},
    "TickserveQueueGrows": {"model": "queued"},
    "TickserveQueueTime": {"model": "queued"},
    "TickserveServerErrors": {"model": "fragile"},
    "TickserveMemoryGrows": {"job": "tickserve-worker"},
    "TickserveClientErrors": {"model": "solo"},
    "TickserveInputsRejected": {"model": "odd"},
    "TickserveFallbacks": {"model": "solo"},
    "TickserveStale": {"model": "stale"},
    "TickserveEventAge": {"model": "stale"},
    "TickserveObservationsLost": {"job": "engine"},
    "TickserveDrift": {"model": "drifting"},
    "TickserveDriftFlat": {"model": "drifting"},
    "TickserveCalibration": {"model": "drifting"},
    "TickserveHitRatio": {"model": "drifting"},
    "TickserveJournalLag": {"job": "journal"},
    "TickserveClientDown": {"job": "engine"},
    "TickserveJournalDown": {"job": "journal"},
}
RESTARTED = {
    "TickserveVersionSkew": {"job": "triton-tickserve", "model": "tiny"},
    "TickserveRestarts": {"job": "triton-tickserve"},
    "TickserveCertificateExpires": {"job": "tickserve-certificates"},
}
GONE: dict[str, dict[str, str]] = {"TickserveServerAbsent": {}}
NO_GPU = "there is no GPU here, and no DCGM exporter"
NOT_LIVE = {
    "TickserveGpuXid": NO_GPU,
    "TickserveGpuHot": NO_GPU,
    "TickserveGpuMemory": NO_GPU,
    "TickserveGpuBusy": NO_GPU,
    "TickserveClientsUnseen": "it needs a Prometheus without any client's metrics, which every other alert needs",
}
EMPTY_PANELS = {
    ("tickserve-gpu", "Busy"): NO_GPU,
    ("tickserve-gpu", "Memory"): NO_GPU,
    ("tickserve-gpu", "Memory used"): NO_GPU,
    ("tickserve-gpu", "Temperature"): NO_GPU,
    ("tickserve-gpu", "Power"): NO_GPU,
    ("tickserve-gpu", "Newest XID error"): NO_GPU,
    ("tickserve-capacity", "Restarts of containers"): "kube-state-metrics runs in Kubernetes only",
}
FIRES_S, RESOLVES_S = 30.0, 40.0
COUNTED = 100  # calls, of twenty a second: some scrapes after its start a replica has counted fewer


@dataclass
class Play:
    """What was seen."""

    inbox: Inbox
    well: set[str]
    marks: dict[str, float]
    panels: dict[tuple[str, str, str], bool]
    expressions: dict[str, bool]
    pictures: list[Path]


def fired(stage: Stage, expected: dict[str, dict[str, str]], since: float) -> float:
    def silent() -> list[str]:
        return [name for name, labels in expected.items() if not stage.inbox.has(name, "firing", labels, since)]

    return until_none(silent, FIRES_S, "not fired")


def resolved(stage: Stage, expected: dict[str, dict[str, str]]) -> float:
    def going_on() -> list[str]:
        return [name for name, labels in expected.items() if stage.inbox.latest(name, labels) != "resolved"]

    return until_none(going_on, RESOLVES_S, "not resolved")


def until_none(left: Callable[[], list[str]], timeout_s: float, text: str) -> float:
    end = time.monotonic() + timeout_s
    while left():
        assert time.monotonic() < end, f"{text} after {timeout_s:g} s: {left()}"
        time.sleep(0.2)
    return time.time()


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    folder = tmp_path_factory.mktemp("live")
    with opened(folder) as stage:
        yield perform(stage)


def perform(stage: Stage) -> Play:
    """The play, act by act."""
    for series in ("tickserve:stale:ratio_rate4s", "tickserve_drift_psi_max", "tickserve_calibration_error"):
        wait_for(lambda name=series: stage.prometheus.now(name), 20, series)  # type: ignore[misc]
    wait_for(lambda: not stage.prometheus.alerts(), 20, "no alert")
    time.sleep(2 * SHORT.window_s)
    well = {name for name, state in stage.prometheus.alerts().items() if state == "firing"}
    marks = {"faults": time.time()}

    stage.callers.wrong.set()
    stage.grow(True)
    stage.two.kill()
    stage.watched.stop()
    marks["fired"] = fired(stage, FAULTS, marks["faults"])

    stage.callers.wrong.clear()
    stage.grow(False)
    stage.watched.start()
    certify(stage.folder, days=5)
    stage.two.start(stage.newer)
    restart(stage)
    fired(stage, RESTARTED, marks["fired"])
    marks["ended"] = resolved(stage, FAULTS)

    stage.two.stop()
    certify(stage.folder, days=365)
    stage.two.start(stage.repository)
    marks["same"] = resolved(stage, RESTARTED)

    stage.one.stop()
    stage.two.stop()
    fired(stage, GONE, marks["same"])
    stage.one.start(stage.repository)
    stage.two.start(stage.repository)
    resolved(stage, GONE)
    return Play(stage.inbox, well, marks, panels(stage), expressions(stage, marks["faults"]), pictures(stage))


def restart(stage: Stage) -> None:
    """Kill the second replica once it has counted, and start it anew.

    Every other alert has fired since it was killed: on a slow machine, longer than restarts are counted over.
    """
    counted = f'nv_inference_request_success{{instance="{stage.two.target}", model="solo"}} > {COUNTED}'
    wait_for(lambda: stage.prometheus.now(counted), 60, "the second replica answers again")
    stage.two.kill()
    stage.two.start(stage.newer)


def panels(stage: Stage) -> dict[tuple[str, str, str], bool]:
    """Whether each query of each panel of each dashboard had data during the play."""
    return {
        (page.uid, panel.title, query.expr): stage.prometheus.has_data(concrete(query.expr, "4s"), stage.started)
        for page in dashboards(SHORT)
        for panel in page.panels
        for query in panel.queries
    }


def expressions(stage: Stage, since: float) -> dict[str, bool]:
    """Not of the start: a server is scraped before the first client has reported a call."""
    asked = {name: alert.expr for name, alert in alerts(SHORT).items()}
    # The clients are seen as long as they are scraped; this process may stand still, and is not then.
    scraped = f'up{{job="engine", instance=~"{"|".join(stage.engines)}"}} == 1'
    asked["TickserveClientsUnseen"] = f"({asked['TickserveClientsUnseen']}) and on () (count({scraped}) > 0)"
    return {name: stage.prometheus.has_data(expr, since) for name, expr in asked.items()}


def pictures(stage: Stage) -> list[Path]:
    seconds = time.time() - stage.started
    return picture.draw(stage.prometheus.url, SHORT, stage.folder / "pictures", seconds=seconds, interval="4s")


def test_no_alert_while_all_is_well(play: Play) -> None:
    assert play.well == set()
    before = [name for when, name, state, _ in play.inbox.received if when < play.marks["faults"] and state == "firing"]
    # Until its first scrape Prometheus knows of no server.
    assert set(before) <= {"TickserveServerAbsent"}


def test_the_model_that_is_called_well_has_no_alert_while_the_others_fail(play: Play) -> None:
    told_of_it = {
        name
        for when, name, _, labels in play.inbox.received
        if labels.get("model") == "tiny" and when < play.marks["ended"]
    }
    assert told_of_it <= {"TickserveVersionSkew"}


def test_every_alert_has_its_fault_or_its_reason() -> None:
    assert {*FAULTS, *RESTARTED, *GONE, *NOT_LIVE} == set(alerts(SHORT))
    assert not {*FAULTS, *RESTARTED, *GONE} & set(NOT_LIVE)


@pytest.mark.parametrize(("name", "labels"), [*FAULTS.items(), *RESTARTED.items(), *GONE.items()])
def test_an_alert_fires_by_its_fault_and_resolves_by_its_end(play: Play, name: str, labels: dict[str, str]) -> None:
    assert play.inbox.has(name, "firing", labels, play.marks["faults"])
    assert play.inbox.has(name, "resolved", labels, play.marks["faults"])


def test_every_alert_expression_has_data_or_its_reason(play: Play) -> None:
    assert {name for name, found in play.expressions.items() if not found} == set(NOT_LIVE)


def test_every_query_of_every_panel_has_data_or_its_reason(play: Play) -> None:
    without = {(uid, title) for (uid, title, _), found in play.panels.items() if not found}
    assert without == set(EMPTY_PANELS)
    assert len(play.panels) > 50


def test_every_dashboard_is_drawn(play: Play) -> None:
    assert {path.stem for path in play.pictures} == {page.uid for page in dashboards(SHORT)}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in play.pictures)

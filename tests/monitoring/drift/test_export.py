"""`tickserve monitor export`: a journal followed, metrics served, the action file written, a client that obeys it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner, Result

from monitoring.drift.follow import DriftExporter, run
from tests.cli.conftest import environment_with
from tests.monitoring.drift.conftest import MODEL, normal
from tickserve.cli.commands import app
from tickserve.client import RiskActions
from tickserve.config import DriftSettings, JournalSettings
from tickserve.errors import EmptyDataError, PortInUseError, TickserveError, UsageError
from tickserve.journal import Journal
from tickserve.manifest import Manifest, write_manifest
from tickserve.risk import ModelAction, read_actions, write_actions
from tickserve.testing import UP_ANSWER, make_manifest, mock_client

SETTINGS = DriftSettings(
    judge=("score", "features"), min_rows=100, min_outcomes=10, raise_s=0.0, clear_s=0.0, psi_label=0.25, psi_flat=2.0
)
QUICK = JournalSettings(flush_ms=5)
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def repository(tmp_path: Path, manifest: Manifest) -> Path:
    folder = tmp_path / "repository" / manifest.name / "1"
    folder.mkdir(parents=True)
    write_manifest(folder, manifest)
    return tmp_path / "repository"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal", QUICK) as opened:
        yield opened


def scored(journal: Journal, manifest: Manifest, rows: np.ndarray, **options: Any) -> list[Any]:
    client = mock_client(manifest, then=UP_ANSWER, observer=journal, deadline_ms=30_000, **options)
    signals = [client.score(MODEL, row[np.newaxis]) for row in rows]
    assert journal.flush()
    client.close()
    return signals


def exporter(tmp_path: Path, manifest: Manifest, **options: Any) -> DriftExporter:
    settings = options.pop("settings", SETTINGS)
    return DriftExporter(tmp_path / "journal", {manifest.digest(): manifest}, settings, **options)


def samples(of: DriftExporter) -> Samples:
    text = of.rendered()[0].decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((f"tickserve_{name}", frozenset(labels.items())))


def test_what_is_exported(tmp_path: Path, manifest: Manifest, journal: Journal) -> None:
    signals = scored(journal, manifest, normal(200))
    for number, each in enumerate(signals[:20]):
        journal.outcome(each.request_id, realised="up" if number < 15 else "down", pnl_bp=-1.0, turnover=2.0)
    assert journal.flush()
    watching = exporter(tmp_path, manifest)
    assert samples(watching) == {}  # nothing before the first look
    watching.look()
    found = samples(watching)
    for feature in "abc":
        psi = value(found, "drift_psi", model=MODEL, version="1", feature=feature)
        assert psi is not None
        assert psi < 0.2
    # The mock always says the same, which no training said.
    score = value(found, "drift_psi", model=MODEL, version="1", feature="score")
    assert score == value(found, "drift_psi_max", model=MODEL, version="1")
    assert score is not None
    assert score > 2
    assert [value(found, "drift_action", model=MODEL, action=each) for each in ("none", "label", "shrink", "flat")] == [
        0.0, 0.0, 0.0, 1.0,
    ]  # fmt: skip
    assert value(found, "calibration_error", model=MODEL, version="1") == pytest.approx(abs(0.7 - 0.75), abs=1e-6)
    for kind, expected in (("predicted", 0.7), ("realised", 0.75)):
        labels = {"model": MODEL, "version": "1", "bin": "6", "kind": kind}  # 0.7 in float32 is a little below
        assert value(found, "calibration_bin_ratio", **labels) == pytest.approx(expected)
    assert value(found, "trading_hit_ratio", model=MODEL, version="1") == 0.75
    assert value(found, "trading_outcomes_total", model=MODEL, version="1") == 20
    assert value(found, "trading_pnl_bp_total", model=MODEL, version="1") == -20
    assert value(found, "trading_turnover_total", model=MODEL, version="1") == 40
    assert value(found, "journal_records_total", model=MODEL, status="OK") == 200
    lag = value(found, "journal_lag_seconds")
    assert lag is not None
    assert 0 <= lag < 60
    text = watching.rendered("application/openmetrics-text; version=1.0.0")[0].decode()
    assert "tickserve_drift_psi" in {family.name for family in open_families(text)}


def test_without_rows_or_outcomes_nothing_is_invented(tmp_path: Path, manifest: Manifest, journal: Journal) -> None:
    scored(journal, manifest, normal(5))
    watching = exporter(tmp_path, manifest)
    watching.look()
    names = {name for name, _ in samples(watching)}
    assert names == {"tickserve_drift_action", "tickserve_journal_records_total", "tickserve_journal_lag_seconds"}


def test_it_follows_and_the_client_obeys_and_recovers(tmp_path: Path, manifest: Manifest, journal: Journal) -> None:
    path = tmp_path / "actions.json"
    obey: dict[str, Any] = {"risk_actions": RiskActions(path, look_ms=5)}
    settings = SETTINGS.model_copy(update={"window_s": 1.0, "slices": 10, "ignore": ("score",), "psi_flat": 0.5})
    watching = exporter(tmp_path, manifest, action_file=path, settings=settings)
    scored(journal, manifest, normal(200))
    watching.look()
    assert scored(journal, manifest, normal(1), **obey)[0].flags == ()
    shifted = normal(400) + np.array([0, 4, 0], np.float32)
    scored(journal, manifest, shifted, **obey)
    watching.look()
    told = read_actions(path).models[MODEL]
    assert (told.action, told.cause, told.version) == ("flat", "features", "1")
    assert told.reason.startswith("PSI of b ")
    signal = scored(journal, manifest, shifted[:1], **obey)[0]
    assert (signal.fallback, signal.size_factor) == ("flat", 0.0)
    assert signal.reason.startswith("drift: PSI of b ")
    time.sleep(1.2)  # the window moves on
    scored(journal, manifest, normal(200), **obey)  # held flat, and its features still come in
    watching.look()
    assert read_actions(path).models[MODEL].action == "none"
    assert scored(journal, manifest, normal(1), **obey)[0].ok


@pytest.mark.parametrize("again", [False, True], ids=["running", "started anew"])
def test_a_flat_that_the_score_raised_is_lifted_by_a_person(
    again: bool, tmp_path: Path, manifest: Manifest, journal: Journal
) -> None:
    path = tmp_path / "actions.json"
    obey: dict[str, Any] = {"risk_actions": RiskActions(path, look_ms=5, on_unknown="flat")}
    watching = exporter(tmp_path, manifest, action_file=path)
    scored(journal, manifest, normal(200))  # the mock always says the same, which no training said
    watching.look()
    with mock_client(manifest, then=UP_ANSWER, observer=journal, deadline_ms=30_000, **obey) as client:
        assert client.score(MODEL, normal(1)).fallback == "flat"
        assert journal.flush()
        lifted = invoke("clear", MODEL, "--action-file", path)
        assert lifted.exit_code == 0
        assert "flat -> none" in lifted.stdout
        if again:
            watching = exporter(tmp_path, manifest, action_file=path)
        for _ in range(2):
            watching.look()  # the scores that raised it are still in the journal, and inside the window
            assert read_actions(path).models[MODEL].action == "none"
        end = time.monotonic() + 5
        while not (signal := client.score(MODEL, normal(1))).ok and time.monotonic() < end:
            time.sleep(0.01)
        assert (signal.ok, signal.flags) == (True, ())
    scored(journal, manifest, normal(200))
    watching.look()
    assert read_actions(path).models[MODEL].action == "flat"  # the drift was real: it is measured anew, and raised


def test_another_bundle_lifts_what_was_asked_of_the_one_before(
    tmp_path: Path, manifest: Manifest, journal: Journal
) -> None:
    path = tmp_path / "actions.json"
    obey: dict[str, Any] = {"risk_actions": RiskActions(path, look_ms=5)}
    watching = exporter(tmp_path, manifest, action_file=path)
    scored(journal, manifest, normal(200))
    watching.look()
    newer = make_manifest(reference=manifest.reference, stride=2)
    with mock_client(newer, then=UP_ANSWER, observer=journal, deadline_ms=30_000, **obey) as client:
        assert client.score(MODEL, normal(1)).fallback == "flat"  # held as the one before was, until it is seen
        assert journal.flush()
        watching.look()
        asked = read_actions(path).models[MODEL]
        assert (asked.action, asked.measured, asked.bundle_digest) == ("none", False, newer.digest())
        end = time.monotonic() + 5
        while (signal := client.score(MODEL, normal(1))).fallback == "flat" and time.monotonic() < end:
            time.sleep(0.01)
        assert (signal.fallback, signal.flags) == (None, ("drift_unknown",))


def test_an_exporter_that_starts_reads_back_one_window_and_no_more(
    tmp_path: Path, manifest: Manifest, journal: Journal
) -> None:
    scored(journal, manifest, normal(200))
    time.sleep(1.1)
    scored(journal, manifest, normal(3))
    settings = SETTINGS.model_copy(update={"window_s": 1.0})
    told = exporter(tmp_path, manifest, settings=settings).look()
    assert sum(told.counted.statuses.values()) == 3
    assert sum(exporter(tmp_path, manifest, once=True).look().counted.statuses.values()) == 203


def test_clear_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "actions.json"
    for text, says in ((None, "--action-file: cannot read it"), ("{", "not an action file")):
        if text is not None:
            path.write_text(text)
        caught = invoke("clear", MODEL, "--action-file", path).exception
        assert isinstance(caught, TickserveError)
        assert says in str(caught)
    write_actions(path, 5, {"other": ModelAction(action="flat", factor=0.0)})
    caught = invoke("clear", MODEL, "--action-file", path).exception
    assert isinstance(caught, UsageError)
    assert "model: not in the action file: expected one of: other, was mock-model" in str(caught)
    assert read_actions(path).models["other"].action == "flat"


def test_an_earlier_run_is_taken_up_and_a_torn_file_is_not(
    tmp_path: Path, manifest: Manifest, journal: Journal
) -> None:
    path = tmp_path / "actions.json"
    write_actions(path, time.time_ns(), {MODEL: ModelAction(action="flat", factor=0.0, cause="features", reason="r")})
    watching = exporter(tmp_path, manifest, action_file=path)
    scored(journal, manifest, normal(5))
    watching.look()
    assert (read_actions(path).models[MODEL].action, read_actions(path).models[MODEL].measured) == ("flat", False)
    path.write_bytes(path.read_bytes()[:-9])
    exporter(tmp_path, manifest, action_file=path).look()
    assert read_actions(path).models[MODEL].action == "none"


def test_an_action_file_that_cannot_be_written_costs_no_metric(
    tmp_path: Path, manifest: Manifest, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    watching = exporter(tmp_path, manifest, action_file=blocked / "actions.json")
    scored(journal, manifest, normal(150))
    for _ in range(3):
        watching.look()
    assert value(samples(watching), "journal_records_total", model=MODEL, status="OK") == 150
    assert len([line for line in caplog.messages if "cannot be written" in line]) == 1
    blocked.unlink()
    watching.look()
    assert read_actions(blocked / "actions.json").models


def test_a_journal_that_cannot_be_read_is_told_once_and_tried_again(
    tmp_path: Path,
    manifest: Manifest,
    journal: Journal,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    watching, looks = exporter(tmp_path, manifest), []

    def look() -> None:
        looks.append(len(looks))
        if len(looks) == 5:
            raise KeyboardInterrupt
        if len(looks) != 3:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(watching, "look", look)
    settings = SETTINGS.model_copy(update={"port": 0, "every_s": 0.05})
    with pytest.raises(KeyboardInterrupt):
        run(watching, settings, lambda line: None)
    assert caplog.messages == ["the journal cannot be read: Permission denied"] * 2  # before and after the third look


def test_there_has_to_be_a_journal(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(EmptyDataError, match="no journal here"):
        exporter(tmp_path / "nowhere", manifest)


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []

    def begin(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tickserve.cli", "monitor", "export", *map(str, arguments)]
        environment = environment_with({"TICKSERVE_DRIFT__EVERY_S": "0.1", "TICKSERVE_DRIFT__MIN_ROWS": "100"})
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def test_the_command_serves_follows_and_stops(
    start: Start, tmp_path: Path, repository: Path, manifest: Manifest, journal: Journal
) -> None:
    scored(journal, manifest, normal(150))
    actions = tmp_path / "actions.json"
    process = start(
        "--journal", tmp_path / "journal", "--repository", repository, "--port", 0, "--action-file", actions
    )
    assert process.stderr is not None
    url = process.stderr.readline().split()[-1]
    expected = 'tickserve_journal_records_total{model="mock-model",status="OK"} '
    for count in (150, 300):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if f"{expected}{count}.0" in answer.read().decode():
                    break
            time.sleep(0.05)
        else:
            pytest.fail(f"never counted {count}")
        scored(journal, manifest, normal(150))
    assert read_actions(actions).models[MODEL].version == "1"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM


def test_the_command_measures_a_model_that_is_published_later(
    start: Start, tmp_path: Path, repository: Path, manifest: Manifest, journal: Journal
) -> None:
    process = start("--journal", tmp_path / "journal", "--repository", repository, "--port", 0)
    assert process.stderr is not None
    url = process.stderr.readline().split()[-1]
    newer = make_manifest(reference=manifest.reference, stride=2)
    (repository / MODEL / "2").mkdir()
    write_manifest(repository / MODEL / "2", newer)
    scored(journal, newer, normal(150))
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with urllib.request.urlopen(url, timeout=5) as answer:
            if "tickserve_drift_psi_max{" in answer.read().decode():
                return
        time.sleep(0.05)
    pytest.fail("never measured")


def invoke(*arguments: object) -> Result:
    environment = {"TICKSERVE_DRIFT__MIN_ROWS": "100", "COLUMNS": "200"}
    return CliRunner(env=environment).invoke(app, ["monitor", *map(str, arguments)])


def invoked(*arguments: object) -> Result:
    return invoke("export", *arguments)


def test_the_command_measures_once(tmp_path: Path, repository: Path, manifest: Manifest) -> None:
    with Journal(tmp_path / "journal") as journal:
        scored(journal, manifest, normal(150) + 3)
    arguments = ("--journal", tmp_path / "journal", "--manifest", repository / MODEL / "1", "--once")
    result = json.loads(invoked(*arguments, "--json").stdout)
    (model,) = result["models"]
    assert (model["rows"], result["records"], result["actions"][MODEL]["action"]) == (150, 150, "label")
    assert model["psi"]["a"] > 1
    shown = invoked(*arguments)
    assert shown.exit_code == 0
    assert "label" in shown.stdout
    assert "mock-model 1: largest PSI: " in shown.stdout


def test_wrong_use(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "journal").mkdir()
    place = ("--journal", tmp_path / "journal", "--repository", repository)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases: list[tuple[tuple[object, ...], type[TickserveError], str]] = [
            ((*place, "--port", port), PortInUseError, f"--port: port {port} is taken"),
            ((*place, "--json"), UsageError, "--json: goes with --once"),
            (("--journal", tmp_path / "none", *place[2:], "--once"), EmptyDataError, "no journal here"),
            ((*place[:2], "--repository", tmp_path / "journal", "--once"), UsageError, "no manifest here"),
        ]
        for arguments, kind, says in cases:
            caught = invoked(*arguments).exception
            assert isinstance(caught, kind)
            assert says in str(caught)
            assert str(tmp_path) not in str(caught)

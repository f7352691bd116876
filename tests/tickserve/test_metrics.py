"""The metrics of a client: what they count, that they are Prometheus' text, and that no scraper hurts a call."""

from __future__ import annotations

import gc
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tickserve.conftest import Triton
from tests.tickserve.exported import MODEL, ROW, patient, samples, scrape, value
from tickserve import Client
from tickserve.client import Observers
from tickserve.config import MetricsSettings
from tickserve.errors import (
    InputRejectedError,
    MissingExtraError,
    RequestError,
    TransportError,
    UsageError,
)
from tickserve.features.spec import FeatureSpec, default_book_spec
from tickserve.journal import Journal, read_journal
from tickserve.metrics import Histogram, MetricsExporter, log_buckets
from tickserve.metrics._tally import ModelTally, Observation
from tickserve.risk import ModelAction, write_actions
from tickserve.settings import load_settings
from tickserve.stream import Stream
from tickserve.testing import UP_ANSWER, Answer, make_manifest


def test_every_metric_of_a_call_is_counted(metrics: MetricsExporter) -> None:
    script = [UP_ANSWER, Answer(latency_ms=30_000), TransportError("gone")]
    client = patient(make_manifest(), script, observer=metrics, max_age_ms=1_000)
    now = time.time_ns()
    signal = client.score(MODEL, ROW, newest_event_ns=now)
    for wrong in range(2):
        with pytest.raises(RequestError):
            client.score(MODEL, ROW, newest_event_ns=now, request_id=f"bad{wrong}")
    with pytest.raises(InputRejectedError):
        client.score(MODEL, ROW.astype(np.float64), newest_event_ns=now)
    assert client.score(MODEL, ROW, newest_event_ns=now - 10**10).status == "STALE"
    count = {status: value(metrics, "calls_total", model=MODEL, version="1", status=status) for status in ("OK",)}
    assert count == {"OK": 1.0}
    assert value(metrics, "calls_total", model=MODEL, version="", status="ERROR") == 3
    assert value(metrics, "calls_total", model=MODEL, version="", status="STALE") == 1
    for error in ("DeadlineExceededError", "TransportError", "InputRejectedError"):
        assert value(metrics, "errors_total", model=MODEL, error=error) == 1
    assert value(metrics, "deadline_misses_total", model=MODEL) == 1
    assert value(metrics, "retries_total", model=MODEL) == 0
    assert value(metrics, "decisions_total", model=MODEL, decision="up") == 1
    assert value(metrics, "call_seconds_count", model=MODEL) == 5
    assert value(metrics, "stage_seconds_count", model=MODEL, stage="decode") == 1
    assert value(metrics, "stage_seconds_count", model=MODEL, stage="check") == 3
    wire = value(metrics, "stage_seconds_sum", model=MODEL, stage="wire")
    assert wire == pytest.approx(signal.stage_us["send_wait"] / 1e6)
    assert value(metrics, "event_age_seconds_count", model=MODEL) == 2
    assert value(metrics, "score_bucket", model=MODEL, le="0.5") == 0
    assert value(metrics, "score_bucket", model=MODEL, le="0.6") == 1
    digest = signal.bundle_digest
    assert value(metrics, "model_info", model=MODEL, version="1", bundle_digest=digest) == 1
    assert value(metrics, "lost_total") == 0
    assert (metrics.lost, client.statistics()["observer_errors"]) == (0, 0)


def test_fallbacks_flags_and_many_rows(metrics: MetricsExporter) -> None:
    manifest = make_manifest()
    above = Answer((0.2, 0.0, 0.8))  # in float32 a little more than 0.6 apart
    script = [above, above, TransportError("gone")]
    client = patient(manifest, script, observer=metrics, fallback="flat")
    many = np.zeros((40, 3), np.float32)
    many[:, 1:] = 1e10  # far outside its range, in two columns
    client.score(MODEL, many, newest_event_ns=time.time_ns() + 10**12)
    client.score(MODEL, ROW)
    assert client.score(MODEL, ROW).fallback == "flat"
    assert value(metrics, "flags_total", model=MODEL, flag="out_of_range") == 1  # a signal, not a column
    assert value(metrics, "flags_total", model=MODEL, flag="event_in_future") == 1
    assert value(metrics, "fallbacks_total", model=MODEL, fallback="flat") == 1
    assert value(metrics, "decisions_total", model=MODEL, decision="up") == 41
    assert value(metrics, "decisions_total", model=MODEL, decision="flat") is None  # a fallback is no model's decision
    assert value(metrics, "score_bucket", model=MODEL, le="+Inf") == 41
    assert value(metrics, "score_bucket", model=MODEL, le="0.6") == 41
    assert value(metrics, "score_bucket", model=MODEL, le="0.5") == 0


def test_names_that_callers_make_up_make_no_series(metrics: MetricsExporter) -> None:
    client = patient(make_manifest(), observer=metrics, fallback="signal")
    for number in range(50):
        with pytest.raises(RequestError):
            client.score(f"made-up-{number}", ROW)
    for number in range(1, 400):
        client.score(MODEL, ROW, version=number)  # the mock answers as version 1, so each but the first is refused
    names = {dict(labels).get("model") for _, labels in samples(metrics)} - {None}
    assert names == {"(not pinned)", MODEL}
    versions = {dict(labels).get("version") for name, labels in samples(metrics) if name.endswith("calls_total")}
    assert 256 <= len(versions - {None}) < 260
    assert "(other)" in versions


def test_stages_that_callers_make_up_make_few_series(metrics: MetricsExporter) -> None:
    client = patient(make_manifest(), observer=metrics)
    client.score(MODEL, ROW)
    assert client.observe_stage is not None
    for number in range(300):
        client.observe_stage(f"made-up-{number}", "features", 0.1)
        client.observe_stage(MODEL, f"made-up-{number}", 0.1)
    found = {labels for name, labels in samples(metrics) if name.endswith("stage_seconds_count")}
    assert {dict(labels)["model"] for labels in found} == {"(not pinned)", MODEL}
    stages = {dict(labels)["stage"] for labels in found if dict(labels)["model"] == MODEL}
    assert len(stages - {"(other)"}) == 16
    assert {"(other)", "check", "wire", "decode"} <= stages
    assert value(metrics, "stage_seconds_count", model="(not pinned)", stage="features") == 300


def test_every_status_and_error_is_there_from_the_first_call(metrics: MetricsExporter) -> None:
    client = patient(make_manifest(), observer=metrics)
    client.score(MODEL, ROW)
    for version in ("1", ""):  # that of the answer, and of calls without one
        for status in ("STALE", "DEADLINE", "REJECTED_INPUT", "UNAVAILABLE", "FALLBACK", "ERROR"):
            assert value(metrics, "calls_total", model=MODEL, version=version, status=status) == 0
    errors = {dict(labels)["error"] for name, labels in samples(metrics) if name.endswith("errors_total")}
    assert errors == {
        "RequestError", "InputRejectedError", "DeadlineExceededError", "ModelNotFoundError", "ServerRejectedError",
        "OverloadedError", "TransportError", "CertificateError", "UnavailableError", "ProtocolError",
    }  # fmt: skip
    assert value(metrics, "errors_total", model=MODEL, error="TransportError") == 0


def test_a_flat_that_drift_asked_for_is_no_failure(metrics: MetricsExporter, tmp_path: Path) -> None:
    path = tmp_path / "actions.json"
    for action in ("flat", "label"):
        write_actions(path, time.time_ns(), {MODEL: ModelAction.model_validate({"action": action})})
        script = [TransportError("gone")]
        client = patient(make_manifest(), script, observer=metrics, risk_actions=path, fallback="flat")
        signal = client.score(MODEL, ROW)
        assert (signal.fallback, "drift" in signal.flags) == ("flat", True)
        client.close()
    assert value(metrics, "fallbacks_total", model=MODEL, fallback="drift") == 1
    assert value(metrics, "fallbacks_total", model=MODEL, fallback="flat") == 1  # the call failed, of drift or not


@pytest.mark.parametrize(("attempts", "retries"), [(0, 0), (1, 0), (2, 1), (4, 3)])
def test_retries_are_the_replicas_beyond_the_first(attempts: int, retries: int) -> None:
    tally = ModelTally((1.0,))
    tally.add(Observation(MODEL, 1, "digest", {"total": 1.0}, None, TransportError, attempts))
    assert tally.retries == retries


def test_journal_and_metrics_together_and_one_that_raises(metrics: MetricsExporter, tmp_path: Path) -> None:
    class Broken:
        def decided(self, decision: Any) -> None:
            raise RuntimeError("down")

    with Journal(tmp_path) as journal:
        client = patient(make_manifest(), observer=(Broken(), journal, metrics))
        assert client.score(MODEL, ROW).ok
        assert client.statistics()["observer_errors"] == 1
        together = patient(make_manifest(), observer=Observers(journal, metrics))
        assert together.score(MODEL, ROW).ok
    assert len(list(read_journal(tmp_path))) == 2
    assert value(metrics, "calls_total", model=MODEL, version="1", status="OK") == 2
    assert patient(make_manifest(), observer=()).score(MODEL, ROW).ok
    for wrong in ("journal", MetricsExporter, (metrics, None)):
        with pytest.raises(UsageError, match="observer: cannot be told"):
            patient(make_manifest(), observer=wrong)


def test_stages_of_the_engine_are_counted(metrics: MetricsExporter) -> None:
    client = patient(make_manifest(), observer=metrics)
    assert client.observe_stage is not None
    client.observe_stage(MODEL, "features", 0.0002)
    client.observe_stage(MODEL, "features", "no time")  # type: ignore[arg-type]
    client.score(MODEL, ROW)
    client.observe_stage(MODEL, "features", 0.0002)
    assert value(metrics, "stage_seconds_count", model="(not pinned)", stage="features") == 1  # nobody asked it yet
    assert value(metrics, "stage_seconds_count", model=MODEL, stage="features") == 1
    assert value(metrics, "stage_seconds_sum", model=MODEL, stage="features") == pytest.approx(0.0002)
    assert metrics.lost == 1
    assert patient(make_manifest()).observe_stage is None
    assert patient(make_manifest(), observer=Observers(metrics)).observe_stage == metrics.observe_stage


def test_a_stream_tells_what_its_features_took(metrics: MetricsExporter) -> None:
    full = default_book_spec(1)
    spec = FeatureSpec("short", "book", 1, full.features, 10**12, 4)
    stream = Stream(patient(make_manifest(spec=spec), observer=metrics), MODEL)
    for step in range(10):
        stream.feed(1_700_000_000 * 10**9 + step * 10**6, np.array([0, 0, 0, 0, 100 + step % 3, 1, 103, 2.0]))
    names = ("(not pinned)", MODEL)  # each event, warm-up too, before which nobody had asked the model
    counts = [value(metrics, "stage_seconds_count", model=name, stage="features") or 0 for name in names]
    assert sum(counts) == 10
    assert counts[1] > 0
    taken = value(metrics, "stage_seconds_sum", model=MODEL, stage="features")
    assert taken is not None
    assert 0 < taken < 5


def test_a_full_buffer_drops_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetricsExporter, "_run", lambda self: None)  # nobody counts until it is scraped
    with MetricsExporter(MetricsSettings(buffer_records=5), port=0) as exporter:
        client = patient(make_manifest(), observer=exporter)
        for _ in range(8):
            assert client.score(MODEL, ROW).ok
        assert exporter.lost == 3
        assert value(exporter, "calls_total", model=MODEL, version="1", status="OK") == 5
        assert value(exporter, "lost_total") == 3
        assert value(exporter, "lost_total") == 3  # reading it counts nothing


def test_nothing_of_a_request_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetricsExporter, "_run", lambda self: None)  # it stays queued
    with MetricsExporter(serve=False) as exporter:
        client = patient(make_manifest(), [TransportError("gone")], observer=exporter)
        with pytest.raises(TransportError) as caught:
            client.score(MODEL, ROW)
        (kept,) = exporter._queue
        assert kept[5] is TransportError
        reached = gc.get_referents(kept)
        assert caught.value not in reached
        assert not any(isinstance(each, tuple) and each and hasattr(each[0], "data") for each in reached)


def test_without_the_extra_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    says = r"'prometheus_client' is not installed \(pip install 'tickserve\[monitoring\]'\)"
    with pytest.raises(MissingExtraError, match=says):
        MetricsExporter(port=0)


def test_buckets_are_log_spaced_and_a_bound_is_inside() -> None:
    bounds = log_buckets(1e-5, 10, 5)
    assert (bounds[0], bounds[-1], len(bounds)) == (1e-5, 10.0, 31)
    steps = np.diff(np.log10(bounds))
    np.testing.assert_allclose(steps, 0.2, atol=2e-3)
    histogram = Histogram((1.0, 2.0))
    for each in (0.5, 1.0, 1.5, 3.0):
        histogram.add(each)
    assert histogram.cumulative() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]


def test_the_section_is_in_force_and_refuses() -> None:
    assert load_settings(environ={"TICKSERVE_METRICS__PORT": "0"}).config.metrics.port == 0
    with pytest.raises(UsageError, match="metrics"):
        load_settings(environ={"TICKSERVE_METRICS__PORT": "70000"})


def test_threads_lose_nothing_while_it_is_scraped(metrics: MetricsExporter) -> None:
    client = patient(make_manifest(), observer=metrics)

    def work() -> None:
        for _ in range(300):
            client.score(MODEL, ROW)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        scrape(metrics.url)
    for thread in threads:
        thread.join()
    assert value(metrics, "calls_total", model=MODEL, version="1", status="OK") == 2_400
    assert value(metrics, "call_seconds_count", model=MODEL) == 2_400


def test_of_a_real_server(triton: Triton, metrics: MetricsExporter, rows: np.ndarray) -> None:
    with Client(triton.http, manifest=triton.repository, observer=metrics, deadline_ms=5_000) as client:
        for _ in range(20):
            assert client.score("hand-l1-gbdt", rows).ok
    names = {name for name, _ in samples(metrics)}
    assert value(metrics, "stage_seconds_count", model="hand-l1-gbdt", stage="wire") == 20
    total = sum(
        value(metrics, "decisions_total", model="hand-l1-gbdt", decision=each) or 0 for each in ("down", "flat", "up")
    )
    assert total == 40
    assert "tickserve_client_call_seconds_bucket" in names
    # What Triton's HTTP does not say of one answer is not made up.
    assert value(metrics, "stage_seconds_count", model="hand-l1-gbdt", stage="queue") is None

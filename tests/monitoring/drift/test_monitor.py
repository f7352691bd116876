"""From records to numbers: windows, references, ages, outcomes, calibration; each against a direct computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.drift.monitor import DriftMonitor, known_manifests
from monitoring.drift.psi import psi
from monitoring.drift.tally import Measured
from monitoring.drift.window import Window
from tests.monitoring.drift.conftest import MODEL, START_NS, MakeRecord, normal, probabilities_of
from tickserve.config import DriftSettings
from tickserve.errors import DeadlineExceededError, InputRejectedError, UsageError
from tickserve.journal import ActionRecord, GapRecord
from tickserve.manifest import Manifest, write_manifest
from tickserve.testing import make_manifest

BOTH: Any = ("score", "features")
SETTINGS = DriftSettings(judge=BOTH, min_rows=100, min_outcomes=10, window_s=600, slices=6)


def watching(manifest: Manifest, settings: DriftSettings = SETTINGS) -> DriftMonitor:
    return DriftMonitor({manifest.digest(): manifest}, settings)


def only(monitor: DriftMonitor) -> Measured:
    (measured,) = monitor.measure()
    return measured


def outcome(request_id: str, at_s: float = 1.0, **fields: Any) -> ActionRecord:
    texts = {name: str(value) for name, value in fields.items()}
    return ActionRecord(START_NS + int(at_s * 1e9), 1, request_id, "outcome", texts)


def test_psi_is_that_of_the_rows_that_were_sent(manifest: Manifest, record: MakeRecord) -> None:
    monitor, rows = watching(manifest), normal(500)
    rows[::7, 1] = np.nan
    monitor.feed(record(part, at_s=number) for number, part in enumerate(np.split(rows, 100)))
    measured, reference = only(monitor), manifest.reference
    assert reference is not None
    assert (measured.rows, measured.score_rows, measured.reference) == (500, 500, True)
    for name, column, values in zip(manifest.features.columns, reference.columns, rows.T, strict=True):
        assert measured.psi[name] == pytest.approx(psi(column, column.counts_of(values), reference.rows))
    assert measured.psi["b"] > 0.25  # what went missing
    assert measured.psi["a"] < 0.1
    assert measured.psi_max == max(measured.psi.values())
    score = np.tanh(rows[:, 0]) * 0.9
    assert reference.score is not None
    said = probabilities_of(score)
    served = said[:, 2] - said[:, 0]
    expected = psi(reference.score, reference.score.counts_of(served), reference.score_rows)
    assert measured.psi_score == measured.psi["score"] == pytest.approx(expected)


def test_a_feature_that_is_ignored_is_exported_and_not_judged(manifest: Manifest, record: MakeRecord) -> None:
    settings = SETTINGS.model_copy(update={"ignore": ("b",)})
    monitor, rows = watching(manifest, settings), normal(500)
    rows[:, 1] += 3
    monitor.feed([record(rows)])
    measured = only(monitor)
    assert measured.psi["b"] > 1
    assert measured.psi_max is not None
    assert measured.psi_max < 0.1


def test_features_are_judged_where_that_is_asked_for(manifest: Manifest, record: MakeRecord) -> None:
    monitor = watching(manifest, SETTINGS.model_copy(update={"judge": ("score",)}))
    rows = normal(500)
    rows[:, 1] += 3
    monitor.feed([record(rows)])
    measured = only(monitor)
    assert measured.psi["b"] > 1
    assert measured.psi_max == measured.psi_score


def test_of_a_window_the_newest_row_counts(record: MakeRecord) -> None:
    from tickserve.reference import reference_of

    manifest = make_manifest(window=4, reference=reference_of(normal(5_000, 1)))
    windows = np.full((200, 4, 3), 50, np.float32)
    windows[:, -1] = normal(200)
    monitor = watching(manifest)
    monitor.feed([record(windows, of=manifest)])
    measured = only(monitor)
    assert (measured.rows, measured.psi_score) == (200, None)  # no score in that reference
    assert all(value < 0.2 for value in measured.psi.values())


def test_old_rows_leave_the_window_and_a_clock_from_the_future_does_not_empty_it(
    manifest: Manifest, record: MakeRecord
) -> None:
    monitor = watching(manifest)
    monitor.feed([record(normal(300) + 5, at_s=0)])
    assert only(monitor).psi["a"] > 1
    monitor.feed([record(normal(300, 3), at_s=700)])
    assert only(monitor).rows == 300
    assert only(monitor).psi["a"] < 0.2
    monitor.feed([record(normal(300) + 5, at_s=10)])  # a writer that is late
    assert only(monitor).rows == 300
    monitor.feed(
        [record(normal(10), at_s=10**9)]
    )  # decades ahead: taken as of now, which is far behind the tests' start
    assert monitor.counted.newest_ns < START_NS + 10**18


def test_what_no_longer_comes_in_leaves_the_window_too(manifest: Manifest, record: MakeRecord) -> None:
    monitor = watching(manifest)
    monitor.feed([record(normal(300) + 5, request_id="r", event_age_us=5.0)])
    monitor.feed([outcome("r", realised="up", row=row) for row in range(20)])
    before = only(monitor)
    assert before.psi_score is not None
    assert before.psi_score > 1
    assert before.calibration is not None
    # Held flat: features still come in, scores and outcomes do not.
    monitor.feed([record(normal(300), at_s=700, status="FALLBACK", fallback="flat")])
    after = only(monitor)
    assert (after.score_rows, after.psi_score, after.calibration, after.hit_rate) == (0, None, None, None)
    assert (after.rows, after.age_s) == (300, {})


def test_a_version_that_is_not_asked_any_more_ages_out(manifest: Manifest, record: MakeRecord) -> None:
    newer = make_manifest(reference=manifest.reference, stride=2)
    monitor = DriftMonitor({each.digest(): each for each in (manifest, newer)}, SETTINGS)
    monitor.feed([record(normal(300) + 5), record(normal(300), of=newer, at_s=700)])
    old, new = monitor.measure()
    assert (old.psi_max, old.psi, old.rows) == (None, {}, 0)
    assert new.psi_max is not None


def test_a_model_that_is_published_later_is_found(
    manifest: Manifest, record: MakeRecord, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks: list[int] = []

    def look() -> dict[str, Manifest]:
        looks.append(len(looks))
        if len(looks) == 1:
            raise UsageError("half-written")
        return {manifest.digest(): manifest} if len(looks) > 2 else {}

    monitor = DriftMonitor({}, SETTINGS, look)
    monitor.feed([record(normal(200)), record(normal(200))])
    assert (len(looks), only(monitor).reference) == (1, False)  # not for each record
    assert "half-written" in caplog.text
    monkeypatch.setattr("monitoring.drift.monitor.RELOOK_S", 0.0)
    monitor.feed([record(normal(200)), record(normal(200)), record(normal(200))])
    measured = only(monitor)
    assert (len(looks), measured.reference, measured.rows, measured.notes) == (3, True, 400, ())
    assert measured.psi["a"] < 0.2
    monitor.feed([record(normal(1))])
    assert len(looks) == 3


def test_an_outcome_counts_when_its_decision_was_taken(manifest: Manifest, record: MakeRecord) -> None:
    monitor = watching(manifest)
    monitor.feed([record(normal(20), request_id="old"), record(normal(1), at_s=650)])
    monitor.feed([outcome("old", at_s=651, realised="up", row=row) for row in range(20)])
    assert (only(monitor).outcomes, only(monitor).calibration) == (20, None)  # the decision has left the window


def test_a_model_that_is_cleared_is_measured_anew(manifest: Manifest, record: MakeRecord) -> None:
    monitor = watching(manifest)
    monitor.feed([record(normal(300) + 5, at_s=0)])
    monitor.forget(MODEL, START_NS + 10 * 10**9)
    assert only(monitor).rows == 0
    monitor.feed([record(normal(300) + 5, at_s=9), record(normal(200), at_s=11)])
    assert (only(monitor).rows, only(monitor).score_rows) == (200, 200)


@pytest.mark.parametrize("rows", [99, 100])
def test_too_few_rows_give_no_number(rows: int, manifest: Manifest, record: MakeRecord) -> None:
    monitor = watching(manifest)
    monitor.feed([record(normal(rows))])
    measured = only(monitor)
    assert bool(measured.psi) is (rows >= 100)
    assert (measured.psi_max is None) is (rows < 100)
    assert measured.notes == (("too few rows: 99 of 100 in the window",) if rows < 100 else ())


def test_without_a_reference_no_number_is_invented(record: MakeRecord) -> None:
    older = make_manifest()
    for manifests, says in (({older.digest(): older}, "written without one"), ({}, "in no repository")):
        monitor = DriftMonitor(manifests, SETTINGS)
        monitor.feed([record(normal(500), of=older, event_age_us=2_000.0)])
        measured = only(monitor)
        assert (measured.psi, measured.psi_max, measured.psi_score) == ({}, None, None)
        assert says in measured.notes[0]
        assert measured.age_s["0.5"] == pytest.approx(2e-3, rel=0.03)  # what needs no reference is there


def test_what_was_refused_or_never_pinned_is_no_market(manifest: Manifest, record: MakeRecord) -> None:
    monitor = watching(manifest)
    refused = record(normal(1), tensors=(), signal=None, error=InputRejectedError("no"))
    failed = record(normal(150), signal=None, error=DeadlineExceededError("late"))
    unknown = record(normal(1), model="made up", bundle_digest=None, signal=None, error=InputRejectedError("no"))
    monitor.feed([refused, failed, unknown])
    assert monitor.counted.statuses == {(MODEL, "ERROR"): 2}
    measured = only(monitor)
    assert (measured.rows, measured.score_rows) == (150, 0)  # the features came in all the same
    flat = record(normal(150), status="FALLBACK", fallback="flat")
    monitor.feed([flat])
    assert (only(monitor).rows, only(monitor).score_rows) == (300, 0)
    monitor.feed([record(normal(150), status="FALLBACK", fallback="local")])
    assert only(monitor).score_rows == 150


def test_ages_are_quantiles(manifest: Manifest, record: MakeRecord) -> None:
    monitor, ages = watching(manifest), np.random.default_rng(7).lognormal(-5, 1, 1_000)
    monitor.feed(record(normal(1), event_age_us=float(age * 1e6)) for age in ages)
    monitor.feed([record(normal(1), event_age_us=-5.0), record(normal(1))])
    for quantile in (0.5, 0.9, 0.99):
        expected = np.quantile(ages, quantile)
        assert only(monitor).age_s[f"{quantile:g}"] == pytest.approx(expected, rel=0.05)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_calibration_is_the_direct_computation(seed: int, manifest: Manifest, record: MakeRecord) -> None:
    random = np.random.default_rng(seed)
    count = 300
    up = random.uniform(0, 1, count).astype(np.float32)
    said = np.stack([1 - up, np.zeros_like(up), up], axis=1)
    realised = random.choice(["down", "flat", "up"], count)
    monitor = watching(manifest)
    monitor.feed(
        record(normal(1), request_id=str(number), probabilities=said[[number]], at_s=number / 100)
        for number in range(count)
    )
    pnl, turnover = random.normal(size=count), random.uniform(size=count)
    monitor.feed(
        outcome(str(number), realised=realised[number], pnl_bp=pnl[number], turnover=turnover[number])
        for number in random.permutation(count)
    )
    measured = only(monitor)
    places = np.minimum((up * np.float64(10)).astype(int), 9)
    went_up = realised == "up"
    expected = sum(
        (places == place).sum()
        / count
        * abs(up[places == place].mean(dtype=np.float64) - went_up[places == place].mean())
        for place in np.unique(places)
    )
    assert measured.calibration is not None
    assert measured.calibration.error == pytest.approx(float(expected))
    assert measured.calibration.rows == count
    for place, (rows, predicted, share) in zip(measured.calibration.places, measured.calibration.bins, strict=True):
        assert rows == (places == place).sum()
        assert predicted == pytest.approx(up[places == place].mean(dtype=np.float64))
        assert share == pytest.approx(went_up[places == place].mean())
    called = np.array([record_class(each) for each in said])
    moved = (called != "flat") & (realised != "flat")
    assert measured.hit_rate == pytest.approx((called[moved] == realised[moved]).mean())
    assert (measured.outcomes, measured.pnl_bp) == (count, pytest.approx(pnl.sum()))
    assert measured.turnover == pytest.approx(turnover.sum())


def record_class(probabilities: np.ndarray) -> str:
    return ("down", "flat", "up")[int(probabilities.argmax())]


def test_few_outcomes_give_no_calibration_and_pnl_alone_is_no_class(manifest: Manifest, record: MakeRecord) -> None:
    monitor = watching(manifest)
    monitor.feed(record(normal(1), request_id=str(number)) for number in range(30))
    monitor.feed(outcome(str(number), realised="up") for number in range(9))
    assert only(monitor).calibration is None
    monitor.feed(outcome(str(number), pnl_bp=-2.0) for number in range(9, 20))
    measured = only(monitor)
    assert (measured.calibration, measured.outcomes, measured.pnl_bp) == (None, 20, -22.0)
    monitor.feed([outcome("20", realised="flat")])
    assert only(monitor).calibration is not None


def test_few_calls_give_no_hit_ratio(manifest: Manifest, record: MakeRecord) -> None:
    monitor, up = watching(manifest), np.array([[0.1, 0.0, 0.9]], np.float32)
    monitor.feed(record(normal(1), request_id=str(number), probabilities=up) for number in range(30))
    monitor.feed(outcome(str(number), realised="flat") for number in range(15))
    monitor.feed(outcome(str(number), realised="up" if number < 22 else "down") for number in range(15, 24))
    assert (only(monitor).outcomes, only(monitor).hit_rate) == (24, None)  # nine calls of a side that moved, of ten
    monitor.feed([outcome("24", realised="up")])
    assert only(monitor).hit_rate == 0.8


def test_an_outcome_counts_once_and_what_fits_nothing_is_counted(manifest: Manifest, record: MakeRecord) -> None:
    monitor = watching(manifest)
    monitor.feed([record(normal(2), request_id="two")])
    monitor.feed([outcome("two", realised="up"), outcome("two", realised="up"), outcome("two", realised="up", row=1)])
    monitor.feed([outcome("two", row=1), outcome("never", realised="up"), outcome("two", row=7)])
    for wrong in ({"realised": "sideways"}, {"pnl_bp": "nan"}, {"pnl_bp": "much"}, {"row": "first"}):
        monitor.feed([outcome("two", **wrong)])
    monitor.feed([ActionRecord(START_NS, 1, "two", "buy 1", {}), GapRecord(1, 2, 40, "full")])
    assert only(monitor).outcomes == 2
    assert (monitor.counted.outcomes_unmatched, monitor.counted.outcomes_unread) == (4, 4)
    assert monitor.counted.lost == 40


def test_decisions_that_wait_for_ever_are_forgotten(manifest: Manifest, record: MakeRecord) -> None:
    monitor = watching(manifest, SETTINGS.model_copy(update={"join_records": 5}))
    monitor.feed(record(normal(1), request_id=str(number)) for number in range(100))
    assert len(monitor._waiting) == 5
    monitor.feed([outcome("3", realised="up"), outcome("97", realised="up")])
    assert (only(monitor).outcomes, monitor.counted.outcomes_unmatched) == (1, 1)


def test_memory_does_not_grow_with_the_journal(manifest: Manifest, record: MakeRecord) -> None:
    monitor = watching(manifest)
    for hour in range(50):
        monitor.feed([record(normal(5), at_s=hour * 3_600)])
    tally = next(iter(monitor._bundles.values()))
    assert len(tally._features._slices) <= SETTINGS.slices
    for number in range(300):
        monitor.feed([record(normal(1), of=make_manifest(f"m-{number}"))])
    assert len(monitor.measure()) == 256


@given(moments=st.lists(st.integers(0, 200), max_size=60))
def test_a_window_holds_what_a_plain_sum_holds(moments: list[int]) -> None:
    window = Window((1,), window_s=10, slices=5)
    for second in moments:
        slot = window.at(second * 10**9)
        if slot is not None:
            slot += 1
    newest = max(moments, default=0) // 2
    kept = [second for place, second in enumerate(moments) if second // 2 > max(moments[: place + 1]) // 2 - 5]
    assert window.total()[0] == sum(second // 2 > newest - 5 for second in kept)


def test_manifests_are_found_wherever_they_lie(tmp_path: Path) -> None:
    one, two = make_manifest("one"), make_manifest("two")
    version = tmp_path / "repository" / "one" / "1"
    version.mkdir(parents=True)
    write_manifest(version, one)
    bundle = tmp_path / "bundles" / "two"
    bundle.mkdir(parents=True)
    write_manifest(bundle, two)
    for place in (version.parent.parent, version.parent, version, version / "manifest.json"):
        assert set(known_manifests([place])) == {one.digest()}
    assert set(known_manifests([version, bundle.parent])) == {one.digest(), two.digest()}
    with pytest.raises(UsageError, match="no manifest here"):
        known_manifests([tmp_path / "nowhere"])

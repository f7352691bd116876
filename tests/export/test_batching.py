"""Batching from the deadline: the simulated batcher, the rules, and the choice, on service times made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2 as schema

from export import batching
from export.batching.arrivals import Arrivals, decisions, of_times
from export.batching.derive import candidates
from export.batching.rules import Setting, lint, setting_of_config, setting_of_settings
from export.batching.service import ServiceTimes
from export.triton_config import build_config, parse_config
from tickserve.config import ExportSettings
from tickserve.errors import ArtifactError, CorruptFileError, InsufficientDataError, UsageError
from tickserve.manifest import load_manifest

# A lone row keeps an instance busy for 1 ms, each further row for 0.1 ms; the wire costs 0.2 ms.
SERVICE = ServiceTimes({size: np.array([900.0 + 100 * size]) for size in (1, 2, 4, 8, 16, 32)}, 0.0, 200.0, "by hand")
PLAIN = Setting(32, 0, (), 1, 0, 0, False)
BOUNDED = Setting(32, 0, (8,), 3, 64, 10_000, False)


def at(*times_us: float, rows: int = 1, lane: int = 1) -> Arrivals:
    times = (np.array(times_us) * 1_000).astype(np.int64)
    ones = np.ones(len(times), np.int64)
    return Arrivals(times, ones * rows, ones * lane)


def latencies(arrivals: Arrivals, setting: Setting, cores: int = 8) -> list[float]:
    return [round(value, 3) for value in batching.simulate(arrivals, SERVICE, setting, cores=cores).latency_us]


def test_a_lone_request_waits_for_its_execution_and_the_wire() -> None:
    assert latencies(at(0, 10_000), PLAIN) == [1_200.0, 1_200.0]


def test_what_arrives_meanwhile_is_the_next_batch() -> None:
    # Three wait while the first runs until 1,000; together they take 1,200.
    assert latencies(at(0, 100, 200, 300), PLAIN) == [1_200.0, 2_300.0, 2_200.0, 2_100.0]


def test_a_second_instance_does_not_wait() -> None:
    assert latencies(at(0, 100), replace(PLAIN, instances=2)) == [1_200.0, 1_200.0]


def test_more_instances_than_cores_slow_each_other_down() -> None:
    assert latencies(at(0, 100), replace(PLAIN, instances=2), cores=1) == [1_200.0, 2_200.0]


def test_a_delay_holds_a_lone_request_and_a_filled_size_ends_it() -> None:
    delayed = replace(PLAIN, delay_us=500, preferred=(2,))
    assert latencies(at(0), delayed) == [1_700.0]
    assert latencies(at(0, 100), delayed) == [1_400.0, 1_300.0]


def test_the_largest_filled_preferred_size_is_taken_and_a_request_is_never_split() -> None:
    sized = replace(PLAIN, preferred=(2, 4))
    outcome = batching.simulate(at(0, 10, 20, 30, 40, 50), SERVICE, sized, cores=8)
    assert outcome.batch_rows.tolist() == [1, 4, 1]
    large = batching.simulate(at(0, 1, 2, rows=3), SERVICE, replace(PLAIN, max_batch=4), cores=8)
    assert large.batch_rows.tolist() == [3, 3, 3]


def test_a_full_queue_refuses_and_a_late_request_is_refused_when_its_turn_comes() -> None:
    full = batching.simulate(at(0, 1, 2, 3), SERVICE, replace(PLAIN, queue_size=2), cores=8)
    assert np.isnan(full.latency_us).tolist() == [False, False, False, True]
    assert (full.deepest, full.misses(1e9)) == (2, 1)
    late = batching.simulate(at(0, 100, 900), SERVICE, replace(PLAIN, queue_timeout_us=500), cores=8)
    assert np.isnan(late.latency_us).tolist() == [False, True, False]


def test_single_decisions_pass_bulk_scoring_only_with_lanes() -> None:
    both = Arrivals(
        np.array([0, 10_000, 20_000]), np.array([1, 32, 1], np.int64), np.array([1, 2, 1], np.int64)
    )  # the bulk request and then the single decision arrive while the first runs
    single = [
        batching.simulate(both, SERVICE, replace(PLAIN, preferred=(1,), lanes=lanes), cores=8).latency_us[2]
        for lanes in (False, True)
    ]
    assert single[1] < 2_500 < 4_000 < single[0]


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.integers(0, 3_000), min_size=2, max_size=80),
    instances=st.integers(1, 4),
    delay=st.sampled_from([0, 300]),
    preferred=st.sampled_from([(), (4,), (2, 8)]),
    size=st.sampled_from([0, 5]),
    timeout=st.sampled_from([0, 2_000]),
    lanes=st.booleans(),
)
def test_every_request_ends_once_whatever_the_setting(
    gaps: list[int], instances: int, delay: int, preferred: tuple[int, ...], size: int, timeout: int, lanes: bool
) -> None:
    arrivals = replace(at(*np.cumsum(gaps)), lane=np.arange(len(gaps)) % 2 + 1)
    setting = Setting(16, delay, preferred, instances, size, timeout, lanes)
    outcome = batching.simulate(arrivals, SERVICE, setting, cores=2)
    answered = np.isfinite(outcome.latency_us)
    assert outcome.batch_rows.sum() == answered.sum()
    assert (outcome.latency_us[answered] >= 1_200 - 1e-6).all()
    assert (outcome.batch_rows <= 16).all()
    if not size and not timeout:
        assert answered.all()


def test_arrivals_are_read_from_a_file_and_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "times"
    path.write_text("30\n10\n20\n")
    assert batching.read_arrivals(path).times_ns.tolist() == [0, 10, 20]
    for content, error in (("1.5\n2\n", CorruptFileError), ("x 1", CorruptFileError), ("1", InsufficientDataError)):
        path.write_text(content)
        with pytest.raises(error):
            batching.read_arrivals(path)
    path.write_text(f"{10**30} 1")
    with pytest.raises(CorruptFileError):
        batching.read_arrivals(path)
    with pytest.raises(CorruptFileError):
        batching.read_arrivals(tmp_path / "none")


def test_the_peak_is_the_busiest_stretch() -> None:
    quiet, burst = np.arange(0, 10_000_000, 1_000_000), np.arange(20_000_000, 20_100_000, 1_000)
    peak = batching.busiest(of_times(np.concatenate([quiet, burst])), 0.0001, 1_000)
    assert (len(peak), peak.times_ns[0]) == (100, 0)
    assert len(batching.busiest(of_times(burst), 1.0, 10)) == 10
    assert decisions(of_times(burst), 10).times_ns.tolist() == list(range(0, 100_000, 10_000))
    assert len(decisions(of_times(burst), 0)) == 100


def test_bulk_requests_come_in_their_own_lane_in_order_of_time() -> None:
    mixed = batching.with_bulk(of_times(np.arange(0, 1_000_000_000, 10_000_000)), rows=8, per_second=10)
    assert (np.diff(mixed.times_ns) >= 0).all()
    assert {(8, 2), (1, 1)} == set(zip(mixed.rows.tolist(), mixed.lane.tolist(), strict=True))


def test_the_choice_satisfies_the_deadline_and_breaks_no_rule() -> None:
    random = np.random.default_rng(3)
    peak = batching.with_bulk(of_times(np.cumsum(random.exponential(2e6, 1_500)).astype(np.int64)), 16, 20)
    found = batching.derive(peak, SERVICE, deadline_us=20_000, max_batch=32, allowed=0.001, cores=4)
    assert found.satisfied
    setting = found.chosen.setting
    assert lint(setting, deadline_us=20_000, service=SERVICE, two_lanes=True) == []
    assert setting.lanes
    assert setting.queue_size
    assert setting.queue_timeout_us < 20_000
    best = min(row.outcome.quantile_us(0.99) for row in found.rows if row.outcome.misses(20_000) <= 1)
    assert found.chosen.outcome.quantile_us(0.99) <= best * 1.05
    told = found.to_json()
    assert set(told["reasons"]) >= {"max_queue_size", "default_timeout_microseconds", "instance_group.count"}
    assert len(told["candidates"]) == len(found.rows)
    again = batching.derive(peak, SERVICE, deadline_us=20_000, max_batch=32, allowed=0.001, cores=4)
    assert again.to_json() == told


def test_without_a_bound_the_queue_stays_open_and_delays_are_tried() -> None:
    peak = of_times(np.arange(0, 500_000_000, 900_000))
    tried = candidates(peak, SERVICE, 20_000, 32, 2, False, 4)
    assert {setting.instances for setting in tried} == {1, 2}
    assert any(setting.delay_us for setting in tried)
    assert not any(setting.has_policy for setting in tried)


def test_an_overload_is_said_and_not_hidden() -> None:
    peak = of_times(np.arange(0, 200_000_000, 20_000))
    found = batching.derive(peak, SERVICE, deadline_us=5_000, max_batch=2, cores=1)
    assert not found.satisfied
    assert found.chosen.outcome.misses(5_000) == min(row.outcome.misses(5_000) for row in found.rows)
    with pytest.raises(UsageError, match="deadline"):
        batching.derive(peak, SERVICE, deadline_us=1_000, max_batch=2)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"queue_size": 0, "queue_timeout_us": 0}, "max_queue_size"),
        ({"rejects": False}, "timeout_action"),
        ({"instances": 2}, "instance_group.count"),
        ({"delay_us": 100}, "max_queue_delay_microseconds"),
        ({"preferred": (8, 64)}, "preferred_batch_size"),
        ({"queue_timeout_us": 20_000}, "default_timeout_microseconds"),
        ({"queue_timeout_us": 19_000}, "default_timeout_microseconds"),
        ({"lanes": False}, "priority_levels"),
        ({"default_lane": 2}, "default_priority_level"),
        ({"queue_size": 0, "queue_timeout_us": 0, "lanes": False, "delay_us": 18_500}, "max_queue_delay_microseconds"),
        (
            {"queue_size": 0, "queue_timeout_us": 0, "lanes": False, "delay_us": 9, "preferred": ()},
            "max_queue_delay_microseconds",
        ),
    ],
)
def test_each_rule_is_named(change: dict[str, Any], field: str) -> None:
    good = replace(BOUNDED, lanes=True)
    assert lint(good, deadline_us=20_000, service=SERVICE, two_lanes=True) == []
    found = lint(replace(good, **change), deadline_us=20_000, service=SERVICE, two_lanes=True)
    assert field in [item.field for item in found]


def test_no_bound_is_a_note_only_where_it_is_said(trees_bundle_once: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.pbtxt"
    path.write_text(build_config(load_manifest(trees_bundle_once), ExportSettings(), {}))
    said = setting_of_config(path)
    assert said == setting_of_settings(ExportSettings())
    (note,) = lint(said, deadline_us=500_000)
    assert (note.field, note.note) == ("max_queue_size", True)
    assert "fewer than 3 instances can overlook a request for 500 ms, and this has 1" in note.reason
    unsaid = text_format.Parse(path.read_text(), schema.ModelConfig())
    for policy in ("", "default_timeout_microseconds: 9", "allow_timeout_override: true"):
        unsaid.dynamic_batching.ClearField("default_queue_policy")
        if policy:
            text_format.Parse(policy, unsaid.dynamic_batching.default_queue_policy)
        path.write_text(text_format.MessageToString(unsaid))
        notes = {found.field: found.note for found in lint(setting_of_config(path))}
        assert notes["max_queue_size"] is False, policy
    lanes = replace(said, lanes=True)
    assert [found.note for found in lint(lanes)] == [
        False,
        False,
    ]  # lanes are a policy: the stall is there, not the bound


@pytest.mark.parametrize("bounded", [True, False])
def test_what_is_applied_says_whether_it_has_a_bound(trees_bundle_once: Path, tmp_path: Path, bounded: bool) -> None:
    path = tmp_path / "config.pbtxt"
    export = ExportSettings(max_batch=32, preferred_batch_rows=(4,))
    path.write_text(build_config(load_manifest(trees_bundle_once), export, {}))
    peak = of_times(np.arange(0, 500_000_000, 900_000))
    found = batching.derive(peak, SERVICE, deadline_us=20_000, max_batch=32, bounded=bounded, cores=4)
    batching.apply_to_config(path, found.chosen.setting)
    assert setting_of_config(path) == found.chosen.setting
    assert [finding.note for finding in lint(found.chosen.setting)] == ([] if bounded else [True])
    if bounded:
        assert f"the recorded peak needs {found.chosen.outcome.deepest}" in found.reasons["max_queue_size"]


def test_a_setting_is_applied_to_a_published_configuration_and_read_back(
    trees_bundle_once: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.pbtxt"
    export = ExportSettings(max_batch=32, preferred_batch_rows=(4,))
    path.write_text(build_config(load_manifest(trees_bundle_once), export, {1: "sha256:" + "a" * 64}))
    before = text_format.Parse(path.read_text(), schema.ModelConfig())
    chosen = replace(BOUNDED, lanes=True, preferred=(4, 16))
    batching.apply_to_config(path, chosen)
    after = text_format.Parse(path.read_text(), schema.ModelConfig())
    assert setting_of_config(path) == chosen
    assert [warmup.batch_size for warmup in after.model_warmup] == [1, 4, 16]
    assert parse_config(path.read_text()).manifests == {1: "sha256:" + "a" * 64}
    for field in ("dynamic_batching", "instance_group", "model_warmup"):
        before.ClearField(field)
        after.ClearField(field)
    assert before == after
    with pytest.raises(UsageError, match="at least 3"):
        batching.apply_to_config(path, replace(chosen, instances=1))
    with pytest.raises(ArtifactError):
        setting_of_config(tmp_path / "none.pbtxt")


def test_the_export_writes_what_the_derivation_says(trees_bundle_once: Path, tmp_path: Path) -> None:
    chosen = replace(BOUNDED, lanes=True, preferred=(4, 16))
    export = ExportSettings.model_validate(
        {"max_batch": 32} | {key: tuple(v) if isinstance(v, list) else v for key, v in chosen.export_keys().items()}
    )
    path = tmp_path / "config.pbtxt"
    path.write_text(build_config(load_manifest(trees_bundle_once), export, {}))
    assert setting_of_config(path) == chosen == setting_of_settings(export)


def test_service_times_come_back_from_the_table() -> None:
    read = ServiceTimes.from_json(SERVICE.to_json())
    assert [read.mean_us(rows) for rows in (1, 3, 32, 64)] == [SERVICE.mean_us(rows) for rows in (1, 3, 32, 64)]
    with pytest.raises(UsageError):
        ServiceTimes.from_json({"rows": {}})

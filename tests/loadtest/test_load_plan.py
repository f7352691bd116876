from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from loadtest.plan import MIN_PHASE_S, Plan, make_plan
from loadtest.run import _with_rates
from tickserve.config import LoadtestSettings
from tickserve.errors import UsageError

URLS = {"http": "127.0.0.1:8000", "grpc": "127.0.0.1:8001"}


def plan_of(tmp_path: Path, models: int, **settings: object) -> Plan:
    folders = {f"m{n}": tmp_path / f"m{n}" / "1" for n in range(models)}
    return make_plan(URLS, folders, LoadtestSettings(**settings), tmp_path / "out.json")


def test_time_is_split_evenly_and_phases_do_not_overlap(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 4, duration_s=8.0)
    assert [(phase.transport, phase.model) for phase in plan.phases] == [
        (transport, f"m{n}") for transport in ("http", "grpc") for n in range(4)
    ]
    assert plan.phase_s * len(plan.phases) == pytest.approx(8.0)
    starts = [phase.start_s for phase in plan.phases]
    assert all(after - before > plan.phase_s for before, after in itertools.pairwise(starts))


def test_no_phase_is_too_short_to_mean_anything(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 4, duration_s=0.5)
    assert plan.phase_s == MIN_PHASE_S
    assert plan.warmup_s < plan.phase_s / 5


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 2)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Plan.from_file(tmp_path / "plan.json") == plan


def test_one_transport_only(tmp_path: Path) -> None:
    assert plan_of(tmp_path, 1, transports=("grpc",)).transports == ("grpc",)


def test_nothing_to_load_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one model"):
        plan_of(tmp_path, 0)


@pytest.mark.parametrize(("mean_us", "visible"), [(4_000.0, True), (1_000.0, False)])
def test_hidden_waiting_is_called_out(tmp_path: Path, mean_us: float, visible: bool) -> None:
    """4 users, 1,000 answers a second: 4 ms each means all were waiting; 1 ms each means three waited unmeasured."""
    plan = plan_of(tmp_path, 1, users=4, duration_s=4.0)
    window_s = plan.phase_s - plan.warmup_s
    counted = {"requests": 0, "failures": 0, "measured": round(1_000 * window_s), "mean_us": mean_us}
    row = _with_rates({"transport": "http", "model": "m0", **counted}, plan)
    assert row["rps"] == 1_000
    assert row["in_flight"] == pytest.approx(mean_us / 1_000)
    assert row["queueing_visible"] is visible

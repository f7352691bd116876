"""Two embedded servers behind one client, and one fault after another under a paced load.

Held through every one: no wrong answer, every call back by its deadline and a little, both replicas believed alive
again without help, and nothing held that was not held before. Times are bounded generously: the machine is shared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import faults
from benchmarks.faults import Report, Stage
from benchmarks.link import Link
from benchmarks.paced_load import Outcome, figures, until_true
from benchmarks.relay import Relay
from tickserve.client import Client, Resilience

pytestmark = pytest.mark.system

# What a machine that also runs two servers and a relay may need to schedule a thread, beside what was measured.
SLACK_MS = 30
FREE_DESCRIPTORS, FREE_MB = 16, 48

Fault = Callable[[Stage], Report]
# Every fault takes seconds, so some are played over gRPC too; those that judge no share of calls in half of the time.
GRPC_LENGTH = {faults.sigkill: 0.5, faults.sigstop: 1.0, faults.slow: 0.5, faults.dropped_link: 0.75}


def over_grpc(fault: Fault) -> Fault:
    return lambda stage: fault(stage.over("grpc", GRPC_LENGTH[fault]))


def played(*chosen: Fault) -> Any:
    """Each fault over HTTP, and over gRPC where that has a length."""
    both = [(f"{fault.__name__}-http", fault) for fault in chosen]
    both += [(f"{fault.__name__}-grpc", over_grpc(fault)) for fault in chosen if fault in GRPC_LENGTH]
    return pytest.mark.parametrize("fault", [fault for _, fault in both], ids=[name for name, _ in both])


def hold_invariants(report: Report, deadline_ms: float) -> None:
    for span in (report.before, report.during, report.after):
        assert span.calls > 0
        assert span.wrong == 0
        assert span.overrun_ms < deadline_ms / 10 + 3 * span.stall_ms + SLACK_MS, span
    assert report.recovery_s is not None, "the replica does not come back by itself"
    assert report.grown.descriptors <= FREE_DESCRIPTORS
    assert report.grown.threads <= 2
    assert report.grown.memory_mb <= FREE_MB
    assert {one["in_flight"] for one in report.statistics["replicas"].values()} == {0}


@played(faults.sigkill, faults.sigterm, faults.reset)
def test_no_request_fails_when_one_of_two_goes(stage: Stage, fault: Fault) -> None:
    report = fault(stage)
    hold_invariants(report, stage.deadline_ms)
    assert report.during.failed == 0, report.during.statuses
    assert report.statistics["retries"] > 0


@played(faults.sigstop, faults.half_open)
def test_one_that_hangs_is_hedged_and_comes_back(stage: Stage, fault: Fault) -> None:
    report = fault(stage)
    hold_invariants(report, stage.deadline_ms)
    assert report.during.failed <= report.during.calls * 0.02, report.during.statuses
    assert report.statistics["hedges_won"] > 0


@played(faults.slow)
def test_one_ten_times_slower_hardly_shows(stage: Stage, fault: Fault) -> None:
    report = fault(stage)
    hold_invariants(report, stage.deadline_ms)
    assert report.during.failed == 0
    # The target is p99 <= 1.5x of a healthy pair (benchmarks/faults.py prints both); here the machine's noise is in it.
    assert report.during.p50_ms < 3 * report.before.p50_ms + report.during.stall_ms


def test_all_down_is_told_at_once_and_heals(stage: Stage) -> None:
    report = faults.all_down(stage)
    hold_invariants(report, stage.deadline_ms)
    assert set(report.during.statuses) <= {"UnavailableError", "TransportError", "DeadlineExceededError", "OK"}
    assert report.during.statuses["UnavailableError"] > report.during.calls * 0.7
    assert report.during.p50_ms < 1.0 + report.during.stall_ms


@pytest.mark.usefixtures("namespaces")
@played(faults.dropped_link)
def test_a_link_that_drops_is_left_and_found_again(stage: Stage, fault: Fault) -> None:
    report = fault(stage)
    hold_invariants(report, stage.deadline_ms)
    assert report.recovery_s is not None
    # A trial comes within a second. This path is two relays longer than the other's, and a warm hedge won each trial.
    assert report.recovery_s < 5
    assert report.during.failed <= report.during.calls * 0.02, report.during.statuses


@pytest.mark.usefixtures("namespaces")
def test_a_lone_half_open_connection_is_noticed_by_keepalive(stage: Stage) -> None:
    """One server and a deadline longer than the keepalive: the dead connection ends the call before the deadline."""
    with stage.servers(1) as (server,), Link(server.http_url) as link:
        client = Client(link.address, manifest=stage.manifest, deadline_ms=60_000)
        with client:
            assert client.score(stage.model, stage.rows[:1]).ok
            link.down()
            began = time.monotonic()
            with pytest.raises(Exception, match=r"broke|connect") as caught:
                client.score(stage.model, stage.rows[:1])
            assert time.monotonic() - began < faults.KEEPALIVE_S + 3
            assert type(caught.value).__name__ == "TransportError"
            link.up()
            back = until_true(lambda: _answers(client, stage), 20)
            assert back is not None


def _answers(client: Client, stage: Stage) -> bool:
    try:
        return client.score(stage.model, stage.rows[:1], deadline_ms=1_000).ok
    except Exception:
        return False


def test_without_retries_the_same_fault_costs_answers(stage: Stage) -> None:
    """The negative control: what the invariants above show is the resilience, not luck."""
    bare = Resilience(attempts=1, hedge_budget=0, breaker_failures=1_000_000)
    with stage.servers() as (one, other), Relay(one.http_url) as bad, Relay(other.http_url) as good:
        with stage.client([bad.address, good.address], bare) as client, stage.load(client) as load:
            time.sleep(0.5)
            began = time.monotonic_ns()
            bad.order("cut 120")
            time.sleep(1)
        seen = figures(load, began, time.monotonic_ns())
    assert seen.failed > seen.calls * 0.2
    assert seen.wrong == 0


def test_a_wrong_number_would_be_seen(stage: Stage) -> None:
    """The load's own negative control: golden numbers that are another model's."""
    with stage.servers(1) as (server,), stage.client([server.http_url]) as client:
        load = stage.load(client)
        load.golden = load.golden[::-1].copy()
        with load:
            time.sleep(0.5)
    outcomes: list[Outcome] = load.outcomes
    assert sum(outcome.wrong for outcome in outcomes) > len(outcomes) / 2

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import recorder
from loadtest.recorder import Recorder, Row, bucket_floor_us, bucket_of
from tickserve.errors import TransportError


def row_of(latencies: list[float]) -> Row:
    row = Row()
    for latency in latencies:
        row.add(latency)
    return row


@given(st.lists(st.floats(1, 1e8), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 0.999]))
def test_percentiles_are_those_of_the_sorted_latencies(latencies: list[float], q: float) -> None:
    expected = np.quantile(latencies, q, method="inverted_cdf")
    assert row_of(latencies).quantile_us(q) == expected


@given(st.floats(1, 1e8))
def test_a_latency_lies_in_its_bucket(latency: float) -> None:
    bucket = bucket_of(latency)
    # A rounding error of log10 at a bucket's edge moves a latency by one part in 10^12.
    assert bucket_floor_us(bucket) * (1 - 1e-12) <= latency < bucket_floor_us(bucket + 1) * (1 + 1e-12)
    assert bucket_floor_us(bucket + 1) / bucket_floor_us(bucket) == pytest.approx(1.0233, abs=1e-4)


def test_beyond_the_cap_percentiles_come_from_the_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    latencies = np.random.default_rng(1).lognormal(6, 0.5, 5_000).tolist()
    exact = row_of(latencies)
    monkeypatch.setattr(recorder, "MAX_SAMPLES", 1_000)
    capped = row_of(latencies)
    assert len(capped.samples) == 1_000
    assert capped.to_json()["percentiles_from"] == "histogram"
    for q in (0.5, 0.9, 0.99, 0.999):
        assert exact.quantile_us(q) <= capped.quantile_us(q) <= exact.quantile_us(q) * 1.024


def test_histogram_counts_every_request() -> None:
    summary = row_of([100.0, 100.4, 5_000.0]).to_json()
    assert [count for _, count in summary["histogram"]] == [2, 1]
    assert (summary["requests"], summary["measured"], summary["failures"]) == (3, 3, 0)
    assert (summary["p50_us"], summary["max_us"], summary["mean_us"]) == (100.4, 5_000.0, 1733.5)


def test_warm_up_counts_as_requests_and_is_not_measured() -> None:
    kept = Recorder()
    kept.on_request("http", "m", 1.0, None, {"measured": False})
    kept.on_request("http", "m", 0.2505, None, {"measured": True})
    summary = kept.row("http", "m").to_json()
    assert (summary["requests"], summary["measured"], summary["p50_us"]) == (2, 1, 250.5)


def test_failures_are_counted_by_cause_and_have_no_latency() -> None:
    kept = Recorder()
    for _ in range(3):
        kept.on_request("grpc", "m", 900.0, TransportError("connection refused"), {"measured": True})
    summary = kept.row("grpc", "m").to_json()
    assert summary["errors"] == {"TransportError: connection refused": 3}
    assert (summary["requests"], summary["failures"], summary["measured"], summary["p99_us"]) == (3, 3, 0, None)
    assert math.isnan(kept.row("grpc", "m").quantile_us(0.5))

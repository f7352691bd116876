"""Triton's counters as text: every label and number kept apart, and anything else refused."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from monitoring.triton_metrics import parse, scrape, signals_counted
from tickserve.errors import ComponentError, ProtocolError, UsageError

TEXT = """\
# HELP nv_inference_request_success Number of successful inference requests, all batch sizes
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="a",version="1"} 3
nv_inference_request_success{model="a",version="2"} 5
nv_inference_request_success{model="b",version="1"} 0
# TYPE nv_inference_request_failure counter
nv_inference_request_failure{model="a",reason="REJECTED",version="1"} 2
nv_inference_request_failure{model="a",reason="BACKEND",version="1"} 1
# TYPE nv_inference_count counter
nv_inference_count{model="a",version="1"} 48
nv_inference_count{model="a",version="2"} 5
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{model="a",version="1"} 12
# TYPE nv_inference_queue_duration_us counter
nv_inference_queue_duration_us{model="a",version="1"} 1234
# TYPE nv_cpu_utilization gauge
nv_cpu_utilization 0.25
"""


def test_counts_stay_with_their_model_and_version() -> None:
    counts = parse(TEXT)
    assert set(counts) == {("a", "1"), ("a", "2"), ("b", "1")}
    first = counts["a", "1"]
    assert (first.requests_ok, first.rows, first.executions, first.queue_us) == (3, 48, 12, 1234)
    assert first.failures == {"REJECTED": 2, "BACKEND": 1}
    assert first.requests_failed == 3


@pytest.mark.parametrize("order", [1, -1])
def test_the_two_series_of_a_model_on_a_gpu_are_added(order: int) -> None:
    of_gpu = 'model="a",version="1",gpu_uuid="GPU-1"'
    lines = [
        f"nv_inference_count{{{of_gpu}}} 500",
        'nv_inference_count{model="a",version="1"} 0',
        f'nv_inference_request_failure{{{of_gpu},reason="BACKEND"}} 2',
        'nv_inference_request_failure{model="a",reason="BACKEND",version="1"} 1',
    ]
    counts = parse("\n".join(lines[::order]) + "\n")["a", "1"]
    assert (counts.rows, counts.failures, counts.requests_failed) == (500, {"BACKEND": 3}, 3)


@pytest.mark.parametrize("text", ["nv_inference_count{model=", "nv_inference_count NaN\n", "<html>no</html>\n"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="Prometheus"):
        parse(text)


def test_nobody_there_is_a_typed_error() -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(ComponentError, match="no metrics at"):
            scrape(f"http://127.0.0.1:{port}/metrics")


def test_an_address_without_http_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected http://"):
        signals_counted("file:///etc/hostname")

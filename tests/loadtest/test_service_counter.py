"""The counter of service times waits for the whole of a count: its time is added a moment after the execution."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest import service_times
from tickserve.errors import ComponentError


def stats(executions: int, ns: int) -> dict[str, Any]:
    parts = {part: {"ns": ns if part == "compute_infer" else 0} for part in service_times.COMPUTE}
    return {"execution_count": executions, "inference_stats": parts}


def test_an_execution_without_its_time_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([stats(1, 500), stats(1, 500), stats(1, 500), stats(2, 500), stats(2, 700_500)])
    monkeypatch.setattr(service_times, "_statistics", lambda *_: next(seen))
    counter = service_times._Counter("nowhere", "tiny")
    counter.read()
    assert counter.busy_us == [700.0]


def test_a_request_that_is_never_counted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_times, "_statistics", lambda *_: stats(1, 500))
    monkeypatch.setattr(service_times, "COUNTED_S", 0.05)
    counter = service_times._Counter("nowhere", "tiny")
    with pytest.raises(ComponentError, match="the server does not count an answered request"):
        counter.read()

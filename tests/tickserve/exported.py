"""A client that an exporter watches, and what the exporter says."""

from __future__ import annotations

import urllib.request
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from tickserve.metrics import MetricsExporter
from tickserve.testing import MockClient, mock_client

ROW = np.zeros((1, 3), np.float32)
MODEL = "mock-model"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def patient(*arguments: Any, **options: Any) -> MockClient:
    """A mock client whose deadline no busy machine misses."""
    return mock_client(*arguments, **({"deadline_ms": 20_000} | options))


def samples(exporter: MetricsExporter) -> Samples:
    found = {}
    for family in text_string_to_metric_families(exporter.render().decode()):
        for sample in family.samples:
            found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


def value(exporter: MetricsExporter, name: str, **labels: str) -> float | None:
    return samples(exporter).get((f"tickserve_client_{name}", frozenset(labels.items())))


def scrape(url: str | None, accept: str = "") -> tuple[str, str]:
    assert url is not None
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=10) as answer:
        return answer.read().decode(), answer.headers["Content-Type"]

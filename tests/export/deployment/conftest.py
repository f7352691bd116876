"""helm from npm (`make test` installs it), the project's chart, and tables as `batching derive` leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.batching import ServiceTimes
from export.deployment.chart import Chart
from tests.k8s.chart.rendering import CHART, HELM, installed


@pytest.fixture(scope="session")
def helm() -> str:
    return str(installed(HELM))


@pytest.fixture(scope="session")
def chart(helm: str) -> Chart:
    return Chart(CHART, helm)


def times(overhead_us: float = 300.0, **mean_us: float) -> ServiceTimes:
    """Service times by rows: `times(r1=1000, r8=2000)`."""
    samples = {int(rows[1:]): np.array([value]) for rows, value in mean_us.items()}
    return ServiceTimes(samples, 0.0, overhead_us, "a test")


def write_table(folder: Path, model: str, service: ServiceTimes, deadline_us: float, **peak: Any) -> Path:
    """The parts of a table of `batching derive` that deployment reads."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{model}.json"
    path.write_text(json.dumps({"deadline_us": deadline_us, "peak": peak, "service": service.to_json()}))
    return path

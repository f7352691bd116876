"""A real model on a real server over a recorded market: its own rows are no drift, a wrong feed is, and is obeyed.

The model is trained here, so the reference is what training wrote into its manifest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitoring.drift.follow import DriftExporter
from monitoring.drift.monitor import known_manifests
from monitoring.drift.tally import Measured
from serving.embedded import EmbeddedTriton
from tickserve import Client, pipeline
from tickserve.client import RiskActions
from tickserve.config import DriftSettings, ServeSettings
from tickserve.journal import Journal
from tickserve.manifest import Manifest, load_bundle
from tickserve.metrics import MetricsExporter
from tickserve.risk import read_actions
from tickserve.settings import load_settings

RECORDING = "binance_l2_stream/usdm_btcusdt_20230405.us.jsonl.gz"
ROWS = 1_500
pytestmark = pytest.mark.system


@dataclass(frozen=True)
class Served:
    """A trained model on its server, the rows it was trained on, and those that came after."""

    repository: Path
    url: str
    manifest: Manifest
    trained: np.ndarray
    later: np.ndarray


@pytest.fixture(scope="module")
def served(market_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    small = {
        "lstm.enabled": False,
        "gbdt.rounds": 20,
        "features.max_rows": 12_000,
        "validation.folds": 2,
        "features.store": str(folder / "features"),
    }
    config = load_settings(environ={}, overrides=small).config
    built = pipeline.build_features(pipeline.open_source([market_data / RECORDING], config), config)
    (bundle,) = pipeline.train(built, config, folder / "bundles")
    repository = folder / "model_repository"
    pipeline.export(bundle.path, repository, config)
    features = built.load().features
    rows = np.where(np.isinf(features), np.float32(np.nan), features).astype(np.float32)
    cut = len(rows) * 2 // 3
    with EmbeddedTriton(repository, ServeSettings(http_port=0, grpc_port=0, metrics_port=0)) as server:
        yield Served(repository, server.http_url, load_bundle(bundle.path), rows[:cut], rows[cut:])


def played(served: Served, rows: np.ndarray, journal: Path, **options: Any) -> list[Any]:
    name, metrics = served.manifest.name, MetricsExporter(serve=False)
    with Journal(journal) as written, metrics:
        with Client(
            served.url, manifest=served.repository, observer=(written, metrics), deadline_ms=20_000, **options
        ) as client:
            signals = [client.score(name, row[np.newaxis]) for row in rows]
        assert written.flush()
        assert f'model="{name}",status="{signals[-1].status}"' in metrics.render().decode()
    return signals


def measured(served: Served, journal: Path, **changes: Any) -> tuple[Measured, DriftExporter]:
    settings = DriftSettings(min_rows=1_000, **{"judge": ("score", "features"), "psi_label": 0.0} | changes)
    exporter = DriftExporter(
        journal, known_manifests([served.repository]), settings, journal.parent / "actions.json", once=True
    )
    (told,) = exporter.look().measured
    return told, exporter


def by_lot(rows: np.ndarray) -> np.ndarray:
    return rows[np.random.default_rng(7).permutation(len(rows))[:ROWS]]


def test_training_wrote_what_drift_is_measured_by(served: Served) -> None:
    reference = served.manifest.reference
    assert reference is not None
    assert reference.score is not None
    assert len(reference.columns) == len(served.manifest.features.columns)
    assert reference.rows > 1_000
    assert reference.score_rows > 500


def test_rows_like_those_of_training_are_no_drift(served: Served, tmp_path: Path) -> None:
    played(served, by_lot(served.trained), tmp_path / "journal")
    told, _ = measured(served, tmp_path / "journal", judge=("features",))
    assert told.rows == told.score_rows == ROWS
    assert told.psi_max is not None
    assert told.psi_max < 0.25, sorted(told.psi.items(), key=lambda pair: -pair[1])[:5]


def test_a_feed_that_goes_wrong_is_caught_named_and_obeyed(served: Served, tmp_path: Path) -> None:
    rows, columns = by_lot(served.trained).copy(), served.manifest.features.columns
    place = columns.index("level_imbalance_1")
    rows[:, place] = np.abs(rows[:, place])  # bids are counted where bids less asks should be
    played(served, rows, tmp_path / "journal")
    told, exporter = measured(served, tmp_path / "journal", judge=("features",), psi_flat=0.5)
    assert max(told.psi_features, key=lambda name: told.psi[name]) == columns[place]
    asked = read_actions(tmp_path / "actions.json").models[served.manifest.name]
    assert (asked.action, asked.cause) == ("flat", "features")
    assert asked.reason.startswith("PSI of level_imbalance_1 ")
    (signal,) = played(served, rows[:1], tmp_path / "second", risk_actions=RiskActions(tmp_path / "actions.json"))
    assert (signal.status, signal.fallback, signal.attempts) == ("FALLBACK", "flat", 0)
    assert signal.reason == f"drift: {asked.reason}"
    assert exporter.damaged == 0


def test_later_hours_lie_further_away_than_rows_drawn_by_lot(served: Served, tmp_path: Path) -> None:
    played(served, by_lot(served.trained), tmp_path / "lot" / "journal")
    played(served, served.later[:ROWS], tmp_path / "later" / "journal")
    lot, _ = measured(served, tmp_path / "lot" / "journal")
    later, _ = measured(served, tmp_path / "later" / "journal")
    assert np.median(list(later.psi_features.values())) > np.median(list(lot.psi_features.values()))

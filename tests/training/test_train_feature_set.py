"""`train` from a feature set on disk: the simulator's events, through the feature engine, to a bundle that says so."""

from __future__ import annotations

from pathlib import Path

from market.build import build_features
from market.simulator import SimulatedSource
from tickserve.features.spec import default_book_spec
from tickserve.settings import load_settings
from training.train import train


def test_a_simulated_book_becomes_a_bundle_labelled_as_simulated(tmp_path: Path) -> None:
    overrides = {"features.store": str(tmp_path / "features"), "validation.folds": 1, "gbdt.rounds": 5}
    config = load_settings(environ={}, overrides=overrides).config
    source = SimulatedSource(seed=3, events=6_000, levels=2)
    built = build_features(source, default_book_spec(2), config.features)
    [bundle] = train(built, config, tmp_path / "bundles", families=("gbdt",), name_prefix="trial")
    manifest = bundle.manifest
    assert manifest.name == "trial-gbdt"
    assert manifest.provenance.simulated
    assert manifest.provenance.data == dict(source.digests())
    assert manifest.features.digest == built.spec.digest
    assert manifest.features.columns == built.spec.columns
    assert (manifest.horizon.unit, manifest.horizon.value) == ("ms", config.labels.book_horizon_ms)
    last = bundle.report["folds"][-1]
    assert last["metrics"]["n_eff"] < last["test"]

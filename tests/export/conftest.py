"""Real bundles, small: trees on real one-minute bars with a few hand-made features, and a net on windows of them.

And a real S3 service on loopback.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import xgboost as xgb
from moto.server import ThreadedMotoServer

from export.repository import bucket
from export.repository.places import Local
from export.verify import verify_versions
from tests.export.mirror import OTHER, SIGNED
from tests.export.tiny import publish_seeds
from tickserve.config import ExportSettings, RepositorySettings
from tickserve.manifest import FeatureContract, Horizon, Manifest, Provenance, TensorSpec, Tolerance, write_manifest
from tickserve.store import sha256_file

FEATURES = 6
WINDOW = 5
OUTPUTS = (
    TensorSpec(name="probabilities", dtype="FP32", shape=(3,)),
    TensorSpec(name="score", dtype="FP32", shape=(1,)),
    TensorSpec(name="bundle_id", dtype="INT64", shape=(1,)),
)


def verify_model(folder: Path) -> dict[int, Manifest]:
    """Every version of a model in a repository, verified; the first that cannot be trusted raises."""
    verified, refused = verify_versions(folder)
    for error in refused.values():
        raise error
    return verified


@dataclass(frozen=True)
class RealRows:
    """Features [N, F] with the holes a warm-up leaves, and the class of the next move [N]."""

    features: np.ndarray
    classes: np.ndarray


@pytest.fixture(scope="session")
def real_rows(market_data: Path) -> RealRows:
    table = pq.read_table(market_data / "bars_1m" / "bitfinex" / "BTCUSD_1m_201804_201812.parquet").slice(0, 6_000)
    close, high, low, volume = (table[name].to_numpy() for name in ("close", "high", "low", "volume"))
    move = np.diff(np.log(close), prepend=np.log(close[0]))
    columns = [move, (high - low) / close, np.log1p(volume)]
    for span in (5, 20, 60):
        past = np.full(len(close), np.nan)
        past[span:] = np.log(close[span:] / close[:-span])
        columns.append(past)
    future = np.append(move[1:], 0.0)
    classes = np.where(future > 2e-4, 2, np.where(future < -2e-4, 0, 1))
    return RealRows(np.stack(columns, axis=1).astype(np.float32), classes)


@pytest.fixture(scope="session")
def booster(real_rows: RealRows) -> Any:
    matrix = xgb.QuantileDMatrix(real_rows.features[:4_000], label=real_rows.classes[:4_000], max_bin=64)
    parameters = {
        "objective": "multi:softprob",
        "num_class": 3,
        "max_depth": 4,
        "eta": 0.3,
        "max_bin": 64,
        "seed": 7,
        "nthread": 1,
    }
    return xgb.train(parameters, matrix, num_boost_round=20)


@pytest.fixture(scope="session")
def settings() -> ExportSettings:
    return ExportSettings(parity_rows=300, max_batch=16, preferred_batch_rows=(4, 8))


def manifest_for(folder: Path, name: str, model_file: str, tensor: TensorSpec, **changes: Any) -> Manifest:
    """A manifest that names every file now in `folder`."""
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"}
    columns = tuple(f"column_{index}" for index in range(FEATURES))
    fields: dict[str, Any] = {
        "name": name,
        "family": "gbdt",
        "horizon": Horizon(unit="rows", value=1, threshold=2e-4),
        "model_file": model_file,
        "inputs": (tensor,),
        "outputs": OUTPUTS,
        "nan_policy": "native",
        "features": FeatureContract(
            spec="test",
            digest="sha256:" + "1" * 64,
            columns=columns,
            minimum=(-1.0,) * FEATURES,
            maximum=(1.0,) * FEATURES,
        ),
        "tolerance": Tolerance(atol=1e-6, rtol=1e-5),
        "files": files,
        "provenance": Provenance(created="2024-01-01T00:00:00Z", seed=7),
    }
    return Manifest(**(fields | changes))


def write_pairs(folder: Path, name: str, rows: np.ndarray, probabilities: np.ndarray, golden: np.ndarray) -> None:
    score = probabilities[:, 2:3] - probabilities[:, 0:1]
    np.savez(folder / "parity.npz", **{name: rows, "probabilities": probabilities})
    picked = {name: rows[golden], "probabilities": probabilities[golden], "score": score[golden]}
    np.savez(folder / "golden.npz", **picked)


MakeBundle = Callable[..., Path]


@pytest.fixture(scope="session")
def trees_bundle_once(booster: Any, real_rows: RealRows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "btcusd-bars-gbdt"
    folder.mkdir()
    booster.save_model(folder / "model.ubj")
    rows = np.concatenate([real_rows.features[:10], real_rows.features[4_000:4_400]])
    probabilities = booster.predict(xgb.DMatrix(rows, missing=np.nan))
    write_pairs(folder, "features", rows, probabilities, np.r_[0, 100:115])
    tensor = TensorSpec(name="features", dtype="FP32", shape=(FEATURES,))
    write_manifest(folder, manifest_for(folder, folder.name, "model.ubj", tensor))
    return folder


@pytest.fixture
def trees_bundle(trees_bundle_once: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(trees_bundle_once, tmp_path / "bundle" / trees_bundle_once.name))


@pytest.fixture
def rewrite() -> Callable[..., Manifest]:
    """Name the files of a changed bundle anew, with other manifest fields where given."""

    def run(folder: Path, **changes: Any) -> Manifest:
        from tickserve.manifest import load_manifest

        old = load_manifest(folder)
        files = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"}
        new = Manifest.model_validate(old.model_dump() | {"files": files} | changes)
        write_manifest(folder, new)
        return new

    return run


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "served" / "model_repository"


@pytest.fixture(scope="session")
def pairs() -> Callable[..., None]:
    """Writes parity.npz and golden.npz into a bundle."""
    return write_pairs


@pytest.fixture(scope="session")
def describe() -> Callable[..., Manifest]:
    """Makes the manifest of a bundle's files."""
    return manifest_for


@pytest.fixture(scope="session")
def four_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("four") / "models"
    publish_seeds(root, 1, 2, 3, 4)
    publish_seeds(root, 5, name="other")
    return root


@pytest.fixture
def four(four_once: Path, tmp_path: Path) -> Local:
    """Four versions of `tiny` and one of `other`, for a test to spoil."""
    return Local(Path(shutil.copytree(four_once, tmp_path / "models")))


@pytest.fixture(scope="module")
def service() -> Iterator[RepositorySettings]:
    """A real HTTP S3 service of this test's own, and credentials it takes."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in credentials.items():
            patch.setenv(name, value)
        # A session costs a fifth of a second, and these tests open a bucket a hundred times.
        patch.setattr(bucket, "_filesystem", functools.cache(bucket._filesystem))
        yield RepositorySettings(s3_endpoint_url=f"http://{host}:{port}")
    server.stop()


@pytest.fixture(scope="module")
def raw(service: RepositorySettings) -> Any:
    """The bucket as anyone with the credentials sees it."""
    return fsspec.filesystem(
        "s3", endpoint_url=service.s3_endpoint_url, use_listings_cache=False, skip_instance_cache=True
    )


@pytest.fixture(scope="module")
def signed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("signed") / "models"
    publish_seeds(root, 1, 2, 3, terms=SIGNED)
    publish_seeds(root, 4, name=OTHER, terms=SIGNED)
    return root


@pytest.fixture
def desk(signed_once: Path, tmp_path: Path) -> Path:
    """The source: version 3 of one model in force, version 1 of another, all signed."""
    return Path(shutil.copytree(signed_once, tmp_path / "desk"))


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "models"

"""The same run on a Ray cluster of two nodes: the same weights, metrics, feature sets and failures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.universe.conftest import universe_config
from tickserve.config import Config
from tickserve.errors import ComponentError
from training.universe import build_universe, train_universe

pytestmark = [pytest.mark.system, pytest.mark.filterwarnings("default")]
MEMORY = 100 * 2**20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": MEMORY}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    nodes.add_node(num_cpus=1, object_store_memory=MEMORY)
    yield nodes.address
    nodes.shutdown()


def on_ray(scratch: Path, address: str, **extra: Any) -> Config:
    return universe_config(scratch, universe__engine="ray", universe__ray_address=address, universe__workers=2, **extra)


def learned(result: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the clock: model files and metrics by bundle, errors by symbol."""
    found: dict[str, Any] = {}
    for record in [*result["symbols"], *result["pooled"]]:
        if "error" in record:
            found[record["name"]] = record["error"]
        for bundle in record.get("bundles", ()):
            found[bundle["name"]] = (bundle["files"]["model.ubj"], bundle["pooled"], bundle["comparison"])
    return found


def test_ray_learns_what_this_machine_learns(small_universe: Path, cluster: str, tmp_path: Path) -> None:
    here, there = universe_config(tmp_path / "here"), on_ray(tmp_path / "there", cluster)
    local = train_universe([small_universe], here, lambda _: None, run="run", resume=False)
    spread = train_universe([small_universe], there, lambda _: None, run="run", resume=False)
    assert len(learned(local)) == 4
    assert learned(spread) == learned(local)
    assert (spread["exit_code"], spread["engine"]) == (1, "ray")


def test_ray_builds_the_feature_sets_of_this_machine(small_universe: Path, cluster: str, tmp_path: Path) -> None:
    built = [
        build_universe([small_universe], config, lambda _: None)["symbols"]
        for config in (universe_config(tmp_path / "here"), on_ray(tmp_path / "there", cluster))
    ]
    for here, there in zip(*built, strict=True):
        assert there["status"] == here["status"]
        assert there.get("key") == here.get("key")
        assert there.get("digest") == here.get("digest")  # of the description, which names every part's bytes


def test_a_cluster_that_is_not_there_is_named(small_universe: Path, tmp_path: Path) -> None:
    with pytest.raises(ComponentError, match=r"universe.ray_address"):
        train_universe([small_universe], on_ray(tmp_path, "127.0.0.1:1"), lambda _: None, run="x", resume=False)

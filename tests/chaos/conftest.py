"""The hand-made model of tests/tickserve, published once, and the stage on which faults are played."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from benchmarks.faults import Stage
from benchmarks.link import may_make_namespaces
from tests.tickserve.conftest import build_manifest, publish


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Two servers at a time are on it; a fault that ends one has another started."""
    repository = tmp_path_factory.mktemp("chaos") / "model_repository"
    publish(repository, build_manifest())
    # Long enough for a machine that is shared: what is held against it is in the same proportion.
    opened = Stage(repository, deadline_ms=500)
    yield opened
    opened.close()


@pytest.fixture
def namespaces() -> None:
    """Skips where a network namespace cannot be made, and fails where CI must be able to."""
    if may_make_namespaces():
        return
    reason = "needs iproute2 and the right to make a network namespace (root or CAP_SYS_ADMIN)"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)

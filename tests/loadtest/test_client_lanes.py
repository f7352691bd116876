"""The client's lanes on the real Triton: bulk scoring named as such does not stand before single decisions."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from export.batching import Setting, apply_to_config
from serving.embedded import EmbeddedTriton
from tests.loadtest.test_batching_served import slow_graph
from tests.serving import conftest as tiny_models
from tests.serving.conftest import ANY_PORTS, FEATURES, Tiny, publish_tiny
from tickserve.client import AsyncClient, Client
from tickserve.client._url import TransportName
from tickserve.config import ExportSettings

pytestmark = pytest.mark.system  # a minute under load
MAX_BATCH, INSTANCES, BULK, CALLS = 4, 3, 16, 5
LONG_MS = 60_000.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EmbeddedTriton, dict[str, Tiny]]]:
    """`lanes` with two lanes, `flat` with the same queue without them; both equally slow."""
    repository = tmp_path_factory.mktemp("lanes") / "models"
    settings = ExportSettings(max_batch=MAX_BATCH, preferred_batch_rows=(MAX_BATCH,), instances=INSTANCES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_models, "graph", slow_graph)
        models = {name: publish_tiny(repository, name, 5, settings) for name in ("lanes", "flat")}
    for name in models:
        setting = Setting(MAX_BATCH, 0, (), INSTANCES, 8 * BULK, 50_000_000, lanes=name == "lanes")
        apply_to_config(repository / name / "config.pbtxt", setting)
    with EmbeddedTriton(repository, ANY_PORTS) as server:
        yield server, models


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(9).normal(size=(count, FEATURES)).astype(np.float32)


@contextmanager
def flood(url: str, transport: TransportName, tiny: Tiny) -> Iterator[None]:
    """`BULK` full batches always under way in lane 2, sent by the asyncio client."""
    over, deep = threading.Event(), threading.Event()

    async def keep_asking(client: AsyncClient) -> None:
        while not over.is_set():
            await client.score(tiny.name, rows(MAX_BATCH), deadline_ms=LONG_MS, priority=2)
            deep.set()

    async def everyone() -> None:
        async with AsyncClient(url, manifest=tiny.manifest, transport=transport) as client:
            await asyncio.gather(*(keep_asking(client) for _ in range(BULK)))

    thread = threading.Thread(target=lambda: asyncio.run(everyone()))
    thread.start()
    try:
        assert deep.wait(30)
        yield
    finally:
        over.set()
        thread.join()


def median_s(client: Client, model: str, priority: int | None) -> float:
    taken = []
    for _ in range(CALLS):
        began = time.perf_counter()
        client.score(model, rows(1), deadline_ms=LONG_MS, priority=priority)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_a_flood_of_bulk_scoring_does_not_stand_before_single_decisions(
    served: tuple[EmbeddedTriton, dict[str, Tiny]], transport: TransportName
) -> None:
    server, models = served
    url = server.http_url if transport == "http" else server.grpc_url
    waited: dict[tuple[str, int | None], float] = {}
    for name, lanes in (("lanes", (1, None, 2)), ("flat", (1,))):
        with (
            flood(url, transport, models[name]),
            Client(url, manifest=models[name].manifest, transport=transport) as client,
        ):
            for lane in lanes:
                waited[name, lane] = median_s(client, name, lane)
    # Before a single decision are only the batches that execute; in lane 2, and without lanes, the whole flood.
    for single in (waited["lanes", 1], waited["lanes", None]):
        assert 1.5 * single < waited["lanes", 2], waited
        assert 1.5 * single < waited["flat", 1], waited

"""Clients that follow go over to what the running server has loaded, and to nothing else, over every transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from serving.embedded import EmbeddedTriton
from serving.swap import rollback, swap
from tests.serving.conftest import ANY_PORTS, FEATURES, publish_tiny
from tickserve.client import AsyncClient, Client
from tickserve.client._ready import NOT_LOADED, Readiness
from tickserve.client._url import parse_endpoint
from tickserve.config import SwapSettings

QUICK = SwapSettings(drain_quiet_ms=150, memory_requests=16)
ROWS = np.random.default_rng(7).normal(size=(1, FEATURES)).astype(np.float32)
MODELS = ("http", "grpc", "shm", "async-http", "async-grpc", "idle")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedTriton]:
    """A server of its own: what is published beside it stays there."""
    folder = tmp_path_factory.mktemp("follow")
    for name in MODELS:
        publish_tiny(folder / "models", name, 1)
    with EmbeddedTriton(folder / "models", ANY_PORTS, log=folder / "triton.log") as running:
        yield running


def repository_of(server: EmbeddedTriton) -> Path:
    return server.target.repository


def url_of(server: EmbeddedTriton, kind: str) -> str:
    return f"grpc://{server.grpc_url}" if kind.endswith("grpc") else f"http://{server.http_url}"


def until(true: Callable[[], bool], within_s: float = 10) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end


def told(caplog: pytest.LogCaptureFixture, model: str) -> list[str]:
    return [text for record in caplog.records if f"model {model!r}" in (text := record.getMessage())]


@pytest.mark.system
@pytest.mark.parametrize("kind", ["http", "grpc", "shm"])
def test_an_export_beside_a_running_server_sends_nobody_to_a_version_that_is_not_there(
    kind: str, server: EmbeddedTriton, caplog: pytest.LogCaptureFixture
) -> None:
    shared = {"transport": "shm", "credential": server.credential} if kind == "shm" else {}
    repository = repository_of(server)
    with Client(url_of(server, kind), manifest=repository, follow_ms=5, deadline_ms=5_000, **shared) as client:  # type: ignore[arg-type]

        def version() -> int | None:
            return client.score(kind, ROWS).version

        assert version() == 1
        publish_tiny(repository, kind, 2)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            assert version() == 1
        (line,) = told(caplog, kind)  # said once
        assert (
            f"version 2 is in force, but {server.grpc_url if kind == 'grpc' else server.http_url} {NOT_LOADED}" in line
        )
        assert swap(server.target, kind, settings=QUICK).previous == 1
        until(lambda: version() == 2)
        assert version() == 2
        assert len(told(caplog, kind)) == 1


@pytest.mark.parametrize("kind", ["async-http", "async-grpc"])
def test_asyncio_waits_for_the_version_too(kind: str, server: EmbeddedTriton) -> None:
    repository = repository_of(server)

    async def ask() -> None:
        async with AsyncClient(url_of(server, kind), manifest=repository, follow_ms=5, deadline_ms=5_000) as client:
            assert (await client.score(kind, ROWS)).version == 1
            publish_tiny(repository, kind, 2)
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                assert (await client.score(kind, ROWS)).version == 1
            await asyncio.to_thread(swap, server.target, kind, settings=QUICK)
            end = time.monotonic() + 10
            while (await client.score(kind, ROWS)).version == 1:
                assert time.monotonic() < end

    asyncio.run(ask())


def test_the_first_call_after_a_swap_in_a_pause_is_right(server: EmbeddedTriton) -> None:
    """The old version is unloaded by then, so this call cannot begin with it."""
    repository = repository_of(server)
    publish_tiny(repository, "idle", 2, activate=False)
    urls = (url_of(server, "http"), url_of(server, "grpc"))
    clients = [Client(url, manifest=repository, follow_ms=50, deadline_ms=5_000) for url in urls]
    for version in (2, 1, 2, 1):
        if version == 2:
            assert swap(server.target, "idle", 2, settings=QUICK).drained
        else:
            assert rollback(server.target, "idle", settings=QUICK).drained
        for client in clients:
            assert client.score("idle", ROWS).version == version
    for client in clients:
        client.close()


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_the_server_says_what_it_has(scheme: str, server: EmbeddedTriton) -> None:
    url = url_of(server, scheme)
    name = url.partition("://")[2]
    servers = Readiness([parse_endpoint(url, None)], lambda: {name: "closed"})
    assert servers.missing("idle", server.versions["idle"][0]) is None
    assert servers.missing("idle", 9) == f"{name} {NOT_LOADED}"
    assert servers.missing("no such model", 1) == f"{name} {NOT_LOADED}"

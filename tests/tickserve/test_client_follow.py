"""Following the version in force, without a server: what is noticed when, and what is refused."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tickserve.client import AsyncClient, Client
from tickserve.client._follow import Follower
from tickserve.current import CURRENT_NAME, write_current
from tickserve.errors import RequestError, TransportError, UsageError
from tickserve.manifest import load_manifest, write_manifest

ROWS = np.zeros((1, 4), np.float32)
NOWHERE = "127.0.0.1:1"


def model_of(repository: Path) -> str:
    return next(path.name for path in repository.iterdir() if path.is_dir())


def seed_of(client: Any) -> int | None:
    (manifest,) = client.manifests.values()
    return manifest.provenance.seed


def call(client: Client) -> None:
    with pytest.raises(RequestError):
        client.score(next(iter(client.manifests)), ROWS)


def test_a_call_after_the_flip_asks_for_the_new_version(repository: Path) -> None:
    with Client(NOWHERE, manifest=repository, follow_ms=1e-3) as client:
        call(client)
        assert seed_of(client) == 1
        write_current(repository / model_of(repository), 2)
        assert seed_of(client) == 1, "between calls nothing is read"
        call(client)
        assert seed_of(client) == 2
        write_current(repository / model_of(repository), 1)
        call(client)
        assert seed_of(client) == 1


def test_without_following_the_pin_stays(repository: Path) -> None:
    with Client(NOWHERE, manifest=repository) as client:
        write_current(repository / model_of(repository), 2)
        call(client)
        assert seed_of(client) == 1


def test_the_file_is_looked_at_no_more_often_than_asked(repository: Path) -> None:
    with Client(NOWHERE, manifest=repository, follow_ms=3_600_000) as client:
        call(client)
        write_current(repository / model_of(repository), 2)
        call(client)
        assert seed_of(client) == 1


def test_asyncio_follows_too(repository: Path) -> None:
    async def ask() -> int | None:
        async with AsyncClient(NOWHERE, manifest=repository, follow_ms=1e-3) as client:
            write_current(repository / model_of(repository), 2)
            with pytest.raises(TransportError):
                await client.score(next(iter(client.manifests)), ROWS)
            return seed_of(client)

    assert asyncio.run(ask()) == 2


def damage_file(model: Path) -> None:
    (model / CURRENT_NAME).write_text("{")


def damage_version(model: Path) -> None:
    write_current(model, 2)
    (model / "2" / "manifest.json").write_text("{}")


def exchange_version(model: Path) -> None:
    """A manifest that is good in itself, and not the one that was put in force."""
    write_current(model, 2)
    good = load_manifest(model / "2")
    write_manifest(model / "2", good.model_copy(update={"provenance": good.provenance.model_copy(update={"seed": 3})}))


def remove_file(model: Path) -> None:
    (model / CURRENT_NAME).unlink()


@pytest.mark.parametrize("damage", [damage_file, damage_version, exchange_version])
def test_what_cannot_be_trusted_is_not_taken(
    repository: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    model = repository / model_of(repository)
    with Client(NOWHERE, manifest=repository, follow_ms=1e-3) as client:
        call(client)
        with caplog.at_level(logging.WARNING, "tickserve.client"):
            damage(model)
            call(client)
            call(client)
        assert seed_of(client) == 1
        assert [record.name for record in caplog.records].count("tickserve.client") == 1, "said once, not every call"


def test_a_file_that_is_gone_changes_nothing(repository: Path) -> None:
    with Client(NOWHERE, manifest=repository, follow_ms=1e-3) as client:
        call(client)
        remove_file(repository / model_of(repository))
        call(client)
        assert seed_of(client) == 1


@pytest.mark.parametrize("source", ["version", "manifest", "mapping", "nothing"])
def test_only_a_repository_can_be_followed(repository: Path, source: str) -> None:
    folder = repository / model_of(repository) / "1"
    manifest: Any = {
        "version": folder,
        "manifest": folder / "manifest.json",
        "mapping": {model_of(repository): folder},
        "nothing": None,
    }[source]
    with pytest.raises(UsageError, match="nothing to follow"):
        Client(NOWHERE, manifest=manifest, follow_ms=50)


@pytest.mark.parametrize("every", [0, -1, float("nan"), "50", True])
def test_how_often_is_a_time_span(repository: Path, every: Any) -> None:
    with pytest.raises(UsageError, match="follow_ms"):
        Client(NOWHERE, manifest=repository, follow_ms=every)


def test_many_threads_take_a_change_once(repository: Path) -> None:
    taken: list[dict[str, Path]] = []
    model = model_of(repository)
    follower = Follower(repository, taken.append, [model], 1e-3)
    follower.look()
    write_current(repository / model, 2)
    threads = [threading.Thread(target=lambda: [follower.look() for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == [{model: repository / model / "1"}, {model: repository / model / "2"}]


def test_a_forked_child_follows_on(repository: Path) -> None:
    taken: list[dict[str, Path]] = []
    follower = Follower(repository, taken.append, [model_of(repository)], 1e-3)
    with follower._lock:  # another thread of the parent is looking just now
        pid = os.fork()
        if pid == 0:
            follower.look()
            os._exit(0 if taken else 1)
    assert os.waitpid(pid, 0)[1] == 0

"""A usual call takes the short way past every check that has one: what real servers answer is what was thought of.

Each short way gives what the long one gives, which other tests hold. None of them sees one that is never taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.conftest import FEATURES, Running
from tickserve.client import Client, _http
from tickserve.client._check import Contract
from tickserve.client._wire import Connection
from tickserve.journal import Journal, _schema

ROW = np.linspace(-1, 1, FEATURES, dtype=np.float32)[None]
CALLS = 20
LONG: dict[str, tuple[tuple[Any, str], ...]] = {  # which may be taken by the first call alone, of each way to a model
    "http": ((Contract, "_check_outputs"), (Connection, "_whole_head"), (_http, "_parse_layout")),
    "grpc": (),
    "local": ((Contract, "_check_outputs"),),
}
NEVER = ((Contract, "_checked"), (_schema, "encode_any"))


@pytest.mark.parametrize("way", LONG)
def test_every_call_but_the_first_takes_the_short_way(
    way: str, running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = running.server
    url = {"http": server.http_url, "grpc": f"grpc://{server.grpc_url}", "local": f"local://{running.tiny.path}"}[way]
    taken: list[str] = []

    def watch(owner: Any, name: str) -> None:
        long = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            taken.append(name)
            return long(*arguments, **named)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in NEVER:
        watch(owner, name)
    with (
        Journal(tmp_path / "journal") as journal,
        Client(url, manifest=running.tiny.manifest, deadline_ms=5_000, observer=journal) as client,
    ):
        client.score("tiny", ROW)
        for owner, name in LONG[way]:
            watch(owner, name)
        for _ in range(CALLS):
            client.score("tiny", ROW)
        journal.flush()
        assert (journal.stats.written, journal.stats.lost) == (CALLS + 1, 0)
    assert taken == []

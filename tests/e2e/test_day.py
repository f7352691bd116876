"""Ticks through stream, server, journal and replay: identical, for every kind of model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import COMMAND, RECORDING, SETS_UP_A_DEMO, Served, environment
from tests.e2e.test_wire import models
from tickserve import Client, pipeline
from tickserve.journal import ActionRecord, DecisionRecord, Journal, read_journal
from tickserve.manifest import load_manifest
from tickserve.settings import load_settings
from tickserve.stream import Stream

pytestmark = [pytest.mark.system, SETS_UP_A_DEMO]  # a minute under load

Event = tuple[int, np.ndarray]


def events_of(files: list[Path], levels: int) -> Iterator[Event]:
    for chunk in pipeline.open_source(files, load_settings(overrides={"features.levels": levels}).config).chunks(
        65_536
    ):
        yield from zip(chunk.ts_ns.tolist(), chunk.values, strict=True)


def stream_into(journal: Path, url: str, repository: Path, model: str, events: Iterator[Event]) -> Counter[str]:
    """Feed `events`; returns how many signals there were by status."""
    with Journal(journal) as written, Client(url, manifest=repository, observer=written, deadline_ms=5_000) as client:
        stream = Stream(client, model, deadline_ms=5_000)
        statuses: Counter[str] = Counter()
        for ts_ns, row in events:
            signal = stream.feed(ts_ns, row).signal
            if signal is not None:
                statuses[signal.status] += 1
        return statuses


def replayed(journal: Path, *where: object) -> dict[str, Any]:
    command = [*COMMAND, "replay", str(journal), "--json", *map(str, where)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr + done.stdout[-2000:]
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_every_model_replays_identically(served: Served, market_data: Path, tmp_path: Path) -> None:
    """Trees, windows, half precision, INT8 and carried state; recorded over one transport, replayed over the others."""
    kinds = set()
    for version in models(served.repository):
        manifest = load_manifest(version)
        events = islice(events_of([market_data / RECORDING], 5), 600)
        journal = tmp_path / manifest.name
        statuses = stream_into(journal, served.http, served.repository, manifest.name, events)
        assert set(statuses) == {"OK"}
        assert statuses["OK"] >= 100
        for where in (("--url", f"grpc://{served.grpc}"), ("--repository", served.repository)):
            told = replayed(journal, *where)
            assert (told["replayed"], told["identical"], told["different"]) == (told["identical"], statuses["OK"], 0)
        records = [one for one in read_journal(journal) if isinstance(one, DecisionRecord)]
        assert {one.bundle_digest for one in records} == {manifest.digest()}
        kinds.add((len(manifest.inputs), len(manifest.inputs[0].shape)))
    assert {(1, 1), (1, 2)} <= kinds


def test_the_plain_loop_trades_and_its_journal_replays(
    served: Served, market_data: Path, tmp_path: Path, root: Path
) -> None:
    model = next(path.parent.name for path in models(served.repository) if path.parent.name.endswith("gbdt"))
    options = {
        "--data": market_data / RECORDING,
        "--model": model,
        "--url": served.http,
        "--repository": served.repository,
        "--journal": tmp_path / "journal",
        "--deadline-ms": 5_000,
        "--signals": 2_000,
    }
    command = [sys.executable, str(root / "examples" / "plain_loop.py"), *map(str, sum(options.items(), ()))]
    done = subprocess.run(
        command, cwd=root, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    found = re.match(r"(\d+) signals, (\d+) trades, 0 failures", last)
    assert found, last
    signals, trades = map(int, found.groups())
    assert signals == 2_000
    assert 0 < trades == done.stdout.count(" -> ")
    records = list(read_journal(tmp_path / "journal"))
    answers = {one.request_id: one for one in records if isinstance(one, DecisionRecord)}
    actions = [one for one in records if isinstance(one, ActionRecord)]
    assert (len(answers), len(actions)) == (signals, trades)
    position = {"down": "-1", "flat": "0", "up": "1"}
    for action in actions:
        decision = answers[action.request_id].decision
        assert decision is not None
        assert action.fields["position"] == position[decision[0]]
    assert replayed(tmp_path / "journal", "--url", served.http)["identical"] == signals

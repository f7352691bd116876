"""Ticks through stream, server, journal and replay: identical, for every kind of model and for a whole day."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.embedded import EmbeddedTriton
from tests.e2e.conftest import COMMAND, RECORDING, Served, environment
from tests.e2e.test_wire import models
from tickserve import Client, pipeline
from tickserve.config import ServeSettings, load_settings
from tickserve.journal import ActionRecord, DecisionRecord, Journal, read_journal
from tickserve.manifest import load_manifest
from tickserve.stream import Stream

DAY = ("us_equity_tick/aig/20131009_quote.zip", "us_equity_tick/aig/20131009_trade.zip")
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


@dataclass(frozen=True)
class Published:
    """A model of one day of a US share, trees only, and its server."""

    repository: Path
    model: str
    url: str


@pytest.fixture(scope="module")
def equity(market_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("equity")
    overrides = {"lstm.enabled": False, "gbdt.rounds": 20, "features.store": str(folder / "features")}
    config = load_settings(environ={}, overrides=overrides).config
    source = pipeline.open_source([market_data / name for name in DAY], config)
    (bundle,) = pipeline.train(pipeline.build_features(source, config), config, folder / "bundles")
    pipeline.export(bundle.path, folder / "models", config)
    ports = ServeSettings(http_port=0, grpc_port=0, metrics_port=0)
    with EmbeddedTriton(folder / "models", ports) as server:
        yield Published(folder / "models", load_manifest(bundle.path).name, server.http_url)


@pytest.mark.system
def test_a_day_of_ticks_replays_identically(equity: Published, market_data: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def counted() -> Iterator[Event]:
        for event in events_of([market_data / name for name in DAY], 1):
            seen.append(event[0])
            yield event

    statuses = stream_into(tmp_path / "journal", equity.url, equity.repository, equity.model, counted())
    assert len(seen) > 300_000
    assert (seen[-1] - seen[0]) / 3.6e12 > 6.4  # hours: the whole session
    assert set(statuses) == {"OK"}
    assert statuses["OK"] > 20_000
    told = replayed(tmp_path / "journal", "--url", equity.url)
    assert (told["replayed"], told["different"], told["skipped"]) == (statuses["OK"], 0, {})
    records = [one for one in read_journal(tmp_path / "journal") if isinstance(one, DecisionRecord)]
    newest = [one.newest_event_ns for one in records]
    assert newest == sorted(newest)
    assert set(newest) <= set(seen)


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

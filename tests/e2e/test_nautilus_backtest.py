"""A NautilusTrader backtest on a real recording: the served model in its event loop, and all it said held twice."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.research import load_research
from market.readers import open_source
from tests.e2e.conftest import COMMAND, RECORDING, SETS_UP_A_DEMO, DemoRun, Served, environment
from tickserve import Client
from tickserve.client import newest_versions
from tickserve.errors import InputRejectedError, SchemaError
from tickserve.journal import ActionRecord, DecisionRecord, read_journal
from tickserve.manifest import Manifest, load_bundle, load_manifest
from tickserve.stream import Stream

pytestmark = [pytest.mark.system, SETS_UP_A_DEMO]

MODEL = "btcusdt-l5-gbdt"
DEADLINE_MS = 10_000


def backtest(root: Path, market_data: Path, repository: Path, **options: object) -> dict[str, Any]:
    given = {"data": market_data / RECORDING, "model": MODEL, "repository": repository, "deadline-ms": DEADLINE_MS}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in (given | options).items()]
    command = [sys.executable, str(root / "examples" / "nautilus_backtest.py"), "--json", *sum(pairs, ())]
    done = subprocess.run(
        command, cwd=root, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@dataclass(frozen=True)
class Ran:
    """One backtest over the server, its journal, and the version it pinned."""

    told: dict[str, Any]
    journal: Path
    manifest: Manifest
    decisions: list[DecisionRecord]
    actions: list[ActionRecord]


@pytest.fixture(scope="module")
def ran(served: Served, market_data: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    journal = tmp_path_factory.mktemp("backtest") / "journal"
    told = backtest(root, market_data, served.repository, url=served.http, journal=journal)
    records = list(read_journal(journal))
    return Ran(
        told,
        journal,
        load_manifest(newest_versions(served.repository)[MODEL]),
        [each for each in records if isinstance(each, DecisionRecord)],
        [each for each in records if isinstance(each, ActionRecord)],
    )


def test_the_served_model_is_asked_in_the_loop_and_traded_on(ran: Ran) -> None:
    assert ran.told["events"] > 9_000
    assert ran.told["signals"] > 9_000
    assert ran.told["by_status"] == {"OK": ran.told["signals"]}
    assert ran.told["orders"] == ran.told["filled"] > 10
    assert ran.told["rows_refused"] == {}
    assert 0 < ran.told["call_us"]["p50"] <= ran.told["call_us"]["p99"] < DEADLINE_MS * 1e3
    assert len(ran.decisions) == ran.told["signals"]
    assert {each.bundle_id for each in ran.decisions} == {ran.manifest.bundle_id()}
    assert {each.bundle_digest for each in ran.decisions} == {ran.manifest.digest()}
    assert {each.replica for each in ran.decisions} != {""}


def test_each_order_stands_beside_the_decision_it_follows(ran: Ran) -> None:
    decisions = {each.request_id: each for each in ran.decisions}
    assert len(ran.actions) == ran.told["orders"]
    for action in ran.actions:
        decision = decisions[action.request_id].decision
        assert decision is not None
        side = {"up": "buy", "down": "sell"}.get(decision[0])
        assert side is None or action.action.startswith(side)
        assert action.fields["reduce_only"] == str(decision[0] == "flat")


def test_what_was_said_in_the_backtest_is_researchs_and_the_streams(
    ran: Ran, served: Served, demo_run: DemoRun, market_data: Path
) -> None:
    """The same recording through the stream without any engine, scored in process; and the bundle's own model."""
    rows, scores = [], []
    with Client(f"local://{served.repository}") as client:
        stream = Stream(client, MODEL, deadline_ms=DEADLINE_MS)
        for chunk in open_source([market_data / RECORDING], levels=5).chunks():
            for ts_ns, row in zip(chunk.ts_ns.tolist(), chunk.values, strict=True):
                signal, _, features = stream.feed(ts_ns, row)
                if signal is not None and signal.score is not None and features is not None:
                    rows.append(features)
                    scores.append(signal.score)
    sent = b"".join(each.tensors[0].data for each in ran.decisions)
    assert sent == np.array(rows).tobytes()
    assert (
        np.concatenate([each.outputs["score"] for each in ran.decisions]).tobytes() == np.concatenate(scores).tobytes()
    )
    bundle = demo_run.run / "bundles" / MODEL
    expected = load_research(bundle, load_bundle(bundle)).predict(np.array(rows))
    said = np.concatenate([each.outputs["probabilities"] for each in ran.decisions])
    np.testing.assert_allclose(said, expected, rtol=ran.manifest.tolerance.rtol, atol=ran.manifest.tolerance.atol)


def test_its_journal_replays_identically(ran: Ran, served: Served) -> None:
    for where in (("--url", served.http), ("--repository", str(served.repository))):
        command = [*COMMAND, "replay", str(ran.journal), "--json", *where]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 0, done.stderr + done.stdout[-2000:]
        told = json.loads(done.stdout)
        assert (told["identical"], told["different"]) == (ran.told["signals"], 0)


def test_without_a_server_every_signal_is_labelled_and_nothing_is_opened(
    served: Served, market_data: Path, root: Path, tmp_path: Path
) -> None:
    nobody = "127.0.0.1:1"
    journal = tmp_path / "journal"
    told = backtest(root, market_data, served.repository, url=nobody, journal=journal, fallback="flat", events=1_000)
    assert told["by_status"] == {"FALLBACK": told["signals"]}
    assert told["signals"] > 500
    assert (told["orders"], float(told["position"])) == (0, 0)
    assert {each.fallback for each in read_journal(journal) if isinstance(each, DecisionRecord)} == {"flat"}


def test_rows_that_are_not_the_models_are_refused_by_the_contract(served: Served, ran: Ran) -> None:
    row = np.frombuffer(ran.decisions[0].tensors[0].data, np.float32).reshape(1, -1)
    columns = ran.manifest.features.columns
    with Client(served.http, manifest=served.repository, deadline_ms=DEADLINE_MS) as client:
        assert client.score(MODEL, row, columns=columns).ok
        with pytest.raises(InputRejectedError, match="columns"):
            client.score(MODEL, row, columns=columns[::-1])
        with pytest.raises(InputRejectedError):
            client.score(MODEL, row[:, :-1])
        with pytest.raises(InputRejectedError, match="feature"):
            client.score(MODEL, row, feature_digest="sha256:" + "0" * 64)
        with pytest.raises(SchemaError):
            Stream(client, MODEL).feed(1, np.zeros(8))  # a row of one level, the model takes five

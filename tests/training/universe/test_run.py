"""A universe run on real bars: two symbols beside a file that is none, gone on with, and a process that dies."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from market.build import build_features
from market.readers import open_source
from tests.training.universe.conftest import universe_config
from tickserve.config import Config
from tickserve.errors import UsageError
from tickserve.features.spec import default_bars_spec
from tickserve.manifest import load_bundle
from tickserve.meter import Meter
from training.universe import train_universe
from training.universe.local import LocalEngine
from training.universe.tasks import Call


@dataclass(frozen=True)
class Done:
    config: Config
    result: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def done(small_universe: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    scratch = tmp_path_factory.mktemp("universe")
    config = universe_config(scratch)
    result = train_universe([small_universe], config, lambda _: None, run="first", resume=False)
    return Done(config, result, scratch / "runs" / "first")


def test_one_failure_is_one_record_and_the_others_are_trained(done: Done) -> None:
    by_name = {record["name"]: record for record in done.result["symbols"]}
    assert {name: record["status"] for name, record in by_name.items()} == {
        "bad": "failed",
        "btcusd": "trained",
        "ethusd": "trained",
    }
    assert (by_name["bad"]["error"]["type"], by_name["bad"]["stage"]) == ("CorruptFileError", "features")
    assert done.result["exit_code"] == 1
    for name, record in by_name.items():
        assert json.loads((done.folder / f"{name}.json").read_text())["status"] == record["status"]
    assert json.loads(done.folder.with_name("first.json").read_text())["id"] == "first"


def test_every_symbol_has_its_model_and_all_have_one_together(done: Done) -> None:
    names = sorted(path.name for path in (done.folder / "bundles").iterdir())
    assert names == ["btcusd-bars-gbdt", "ethusd-bars-gbdt", "universe-bars-gbdt"]
    own, pooled = (load_bundle(done.folder / "bundles" / name) for name in names[1:])
    assert pooled.features.digest == own.features.digest
    assert pooled.stream == own.stream
    assert {name.partition("/")[0] for name in pooled.provenance.data} == {"btcusd", "ethusd"}
    (record,) = done.result["pooled"]
    (bundle,) = record["bundles"]
    assert sum(each["rows"] for each in bundle["symbols"].values()) == bundle["pooled"]["model"]["rows"]
    assert set(pooled.metrics["symbols"]) == {"btcusd", "ethusd"}


def test_features_are_those_of_a_symbol_alone(done: Done, small_universe: Path) -> None:
    settings = done.config.features.model_copy(update={"max_rows": done.config.features.bars_max_rows})
    source = open_source([small_universe / "ETHUSD_1m_201804_201812.parquet"])
    alone = build_features(source, default_bars_spec(), settings)
    (record,) = (each for each in done.result["symbols"] if each["name"] == "ethusd")
    assert (alone.reused, alone.meta["key"]) == (True, record["features"]["key"])


def test_going_on_trains_only_what_is_not_done(done: Done, small_universe: Path) -> None:
    stored = done.folder / "ethusd.json"
    stored.unlink()
    again = train_universe([small_universe], done.config, lambda _: None, run=None, resume=True)
    assert [record["status"] for record in again["symbols"]] == ["failed", "reused", "trained"]
    assert [record["status"] for record in again["pooled"]] == ["reused"]
    assert again["id"] == "first"


def test_a_run_that_is_there_is_not_written_over(done: Done, small_universe: Path) -> None:
    with pytest.raises(UsageError, match="--resume"):
        train_universe([small_universe], done.config, lambda _: None, run="first", resume=False)


def die(_: Any) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def live(_: Any) -> dict[str, Any]:
    return {"threads": os.environ["OMP_NUM_THREADS"]}


def test_a_process_that_dies_is_one_lost_call() -> None:
    with Meter() as meter:
        engine = LocalEngine({"prepare": 1, "train": 1}, 1, meter, lambda _: None)
        try:
            answers = []
            for function in (die, live):
                engine.start("train", Call("x", function, ()))
                while not (found := engine.finished(1.0)):
                    pass
                answers.append(found[0][2])
        finally:
            engine.close()
    assert answers[0].error is not None
    assert (answers[0].error["type"], answers[0].error["was"]) == ("ComponentError", "signal 9")
    assert answers[1].value == {"threads": "1"}

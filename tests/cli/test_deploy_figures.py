"""What `deploy render` is computed from: rates of files and journals, memory of manifests, tables that are none."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.cli.conftest import Deploy
from tests.serving.conftest import FEATURES, publish_tiny
from tests.tickserve.test_journal_files import make_decision, tensor_of
from tickserve.cli.deploy_figures import _of_manifests, parse_rates
from tickserve.errors import ArtifactError, UsageError
from tickserve.journal import Journal

MS = 1_000_000


def rows(count: int) -> Any:
    return tensor_of("features", np.zeros((count, FEATURES), np.float32))


def reason_of(done: Any, path: str) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    (found,) = [each for each in json.loads(done.stdout)["values"] if each["path"] == path]
    return dict(found)


def test_the_peak_of_a_file_of_times(deploy: Deploy, published: Path) -> None:
    """Ten a second for a minute, and a thousand a second for the ten busiest seconds."""
    calm, busy = range(0, 60_000, 100), range(60_000, 70_000)
    (published / "times").write_text("\n".join(str(at * MS) for at in (*calm, *busy)))
    done = deploy("render", "--model", "tiny", "--memory", "chart", "--arrivals", "times", "--json")
    value = reason_of(done, "replicaCount")
    assert value["source"].startswith("busiest 10 s of times; service times in tiny.json")
    assert "peak 1000 requests/s of 1 rows" in value["reason"]


def test_a_journal_knows_the_models_and_their_rows(deploy: Deploy, published: Path) -> None:
    publish_tiny(published / "model_repository", "other", 2)
    (published / "runs/batching/other.json").write_text((published / "runs/batching/tiny.json").read_text())
    with Journal(published / "journal") as opened:
        for at in range(0, 1_000, 5):
            opened.decided(make_decision(model="tiny", wall_ns=at * MS, tensors=(rows(4),)))
        for at in range(0, 1_000, 50):
            opened.decided(make_decision(model="other", wall_ns=at * MS, tensors=(rows(1),)))
    arguments = ("render", "--model", "tiny", "--model", "other", "--memory", "chart", "--journal", "journal", "--json")
    reason = reason_of(deploy(*arguments), "replicaCount")["reason"]
    assert "tiny: peak 201 requests/s of 4 rows" in reason
    assert "other: peak 21.05 requests/s of 1 rows" in reason
    refused = deploy("render", "--model", "tiny", "--model", "other", "--arrivals", "runs/batching/tiny.json")
    assert (refused.returncode, "a file of times is of one model" in refused.stderr) == (2, True)


@pytest.mark.parametrize("text", ["not JSON", "[]", "{}", '{"deadline_us": 1, "peak": {}, "service": {"rows": {}}}'])
def test_what_is_no_table_is_refused(deploy: Deploy, published: Path, text: str) -> None:
    (published / "runs/batching/tiny.json").write_text(text)
    done = deploy("render", "--model", "tiny", "--memory", "chart")
    assert done.returncode in (2, 3)
    assert "service times" in done.stderr or "tiny.json: not a table that batching derive writes" in done.stderr


def test_without_table_and_server_times_of_the_manifest_give_no_replicas(deploy: Deploy, published: Path) -> None:
    (published / "runs/batching/tiny.json").unlink()
    done = deploy("render", "--model", "tiny", "--memory", "chart", "--rate", "10", "--json")
    assert "no served times of tiny are known" in reason_of(done, "replicaCount")["reason"]


def test_rates() -> None:
    assert parse_rates(["120"], ["a"]) == {"a": 120.0}
    assert parse_rates(["a=1e3", "b=2.5"], ["a", "b"]) == {"a": 1000.0, "b": 2.5}
    assert parse_rates([], ["a", "b"]) == {}
    for text in ("a=nan", "a=inf", "a=0", "a=", "a=x"):
        with pytest.raises(UsageError, match="--rate: not a rate"):
            parse_rates([text], ["a", "b"])


def test_memory_of_manifests_is_added_up() -> None:
    def model(stages: dict[str, Any] | None) -> Any:
        return SimpleNamespace(name="m", manifest=SimpleNamespace(export=SimpleNamespace(stages=stages)))

    memory = _of_manifests([model({"measure": {"peak_memory_mb": 300.5}}), model({"measure": {"peak_memory_mb": 100}})])
    assert memory.bytes == int(400.5 * 2**20)
    assert "not a server" in memory.source
    for stages in (None, {}, {"measure": {"peak_memory_mb": None}}):
        with pytest.raises(ArtifactError, match="no memory of the stage 'measure'"):
            _of_manifests([model(stages)])

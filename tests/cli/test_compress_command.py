"""`tickserve compress` as a user runs it: children and a report, exit 1 for a refusal, one line for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import Run, environment_with, tickserve_in

SMALL = {
    "TICKSERVE_FEATURES__BARS_MAX_ROWS": "20000",
    "TICKSERVE_VALIDATION__FOLDS": "2",
    "TICKSERVE_GBDT__ROUNDS": "20",
    "TICKSERVE_LSTM__ENABLED": "false",
    "TICKSERVE_EXPORT__PARITY_ROWS": "100",
}
RECIPE = """
name = "small"
latency_calls = 200
[gates]
min_ic_share = {share}
max_latency_ratio = 1.25
[[step]]
kind = "truncate"
rounds = 8
"""


@dataclass(frozen=True)
class Trained:
    """A forest's bundle, and the bars that it was trained on."""

    bundle: str
    data: Path


@pytest.fixture(scope="module")
def trained(market_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    whole = market_data / "bars_1m" / "bitfinex" / "BTCUSD_1m_201804_201812.parquet"
    data = folder / "bars.parquet"
    pq.write_table(pq.read_table(whole).slice(0, 20_000), data)
    done = tickserve_in(folder)("train", "--data", data, "--out", folder / "bundles", "--json", **SMALL)
    assert done.returncode == 0, done.stderr
    [teacher] = json.loads(done.stdout)
    return Trained(teacher["bundle"], data)


@pytest.mark.system
def test_a_forest_is_cut_or_refused_and_the_exit_code_says_which(
    tickserve: Run, trained: Trained, tmp_path: Path
) -> None:
    data = trained.data
    (tmp_path / "strict.toml").write_text(RECIPE.format(share=2.0))
    done = tickserve("compress", trained.bundle, "--recipe", "strict.toml", "--data", data, "--json", **SMALL)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "runs" / "compress" / "report.json").read_text())
    [step] = report["steps"]
    assert (report["accepted"], step["passed"]) == (False, False)
    assert "200.0% needed" in step["verdict"]
    assert [path.name for path in (tmp_path / "runs" / "compress").iterdir()] == ["report.json"]
    assert "step 1/1, truncate" in done.stderr

    other = tickserve(
        "compress", trained.bundle, "--recipe", "strict.toml", "--data", data, **SMALL, TICKSERVE_SEED="8"
    )
    assert (other.returncode, "provenance.seed: the teacher is of other data" in other.stderr) == (3, True)
    weaker = {**SMALL, "TICKSERVE_GBDT__LEARNING_RATE": "0.0001"}
    refit = tickserve("compress", trained.bundle, "--recipe", "strict.toml", "--data", data, **weaker)
    assert (refit.returncode, "the refit of fold 1 is not the model" in refit.stderr) == (3, True)


@pytest.mark.system
def test_a_run_that_is_killed_leaves_nothing_and_can_be_made_again(
    tickserve: Run, trained: Trained, tmp_path: Path
) -> None:
    (tmp_path / "loose.toml").write_text(RECIPE.format(share=0.9))
    arguments = ["compress", trained.bundle, "--recipe", "loose.toml", "--data", str(trained.data)]
    command = [sys.executable, "-m", "tickserve.cli", *arguments]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment_with(SMALL), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as running:
        assert running.stderr
        told = next(line for line in running.stderr if "step 1/1" in line)
        running.kill()
    assert "truncate" in told
    assert not list((tmp_path / "runs" / "compress").rglob("*.json"))
    again = tickserve(*arguments, "--json", **SMALL)
    assert again.returncode in (0, 1), again.stderr
    report = json.loads(again.stdout)
    visible = {path.name for path in (tmp_path / "runs" / "compress").iterdir()}
    assert visible == {"report.json"} | ({report["steps"][0]["model"]} if report["accepted"] else set())


def test_what_is_wrong_is_one_line(tickserve: Run, tmp_path: Path) -> None:
    none = tickserve("compress", tmp_path, "--recipe", "none.toml")
    assert (none.returncode, "no such recipe" in none.stderr, none.stderr.count("\n")) == (2, True, 1)
    missing = tickserve("compress", tmp_path / "none", "--recipe", "fast")
    assert (missing.returncode, "BUNDLE: no such folder" in missing.stderr) == (2, True)
    inert = tmp_path / "inert.toml"
    inert.write_text('name = "a"\n[[step]]\nkind = "prune"\nshare = 0.5\nschedule = "linear"\n')
    refused = tickserve("compress", tmp_path, "--recipe", inert)
    assert (refused.returncode, "no effect with rounds 1" in refused.stderr) == (2, True)

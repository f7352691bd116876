"""A study: what it tries, what it keeps out, what it gives up, and that another run goes on where one was killed."""

from __future__ import annotations

import operator
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from market.build import FeatureTable
from tests.training.conftest import quick_config
from tickserve.errors import ComponentError, GateRefusedError, InsufficientDataError, UsageError
from tickserve.settings import load_settings
from training.examples import DataMeta
from training.tune import study as study_module
from training.tune.outcome import choose, outcome, write_outcome
from training.tune.space import Range
from training.tune.study import Search, locked, open_storage, open_study, search
from training.tune.trial import question

SPACE: Any = {"gbdt.max_depth": Range(2, 5), "gbdt.learning_rate": Range(0.05, 0.3, log=True)}
SCRIPT = (
    "import pickle, sys; from training.tune.study import search; search(pickle.load(open(sys.argv[1], 'rb')), print)"
)


@pytest.fixture
def wanted(table: FeatureTable, meta: DataMeta, tmp_path: Path) -> Any:
    def made(name: str = "study", **keys: Any) -> Search:
        settings = {"tune__folder": str(tmp_path), "tune__latency_calls": 50, "gbdt__rounds": 30} | keys
        return Search(partial(operator.getitem, (table,), 0), meta, quick_config(**settings), "gbdt", SPACE, name)

    return made


def quiet(text: str) -> None:
    pass


def test_a_study_gives_a_front_and_a_configuration_that_trains_it(wanted: Any) -> None:
    asked = wanted(tune__trials=3)
    result = outcome(search(asked, quiet), asked)
    assert [row["state"] for row in result["trials"]] == ["complete"] * 3
    assert all(2 <= row["values"]["gbdt.max_depth"] <= 5 and row["size_bytes"] > 1_000 for row in result["trials"])
    for row in result["trials"]:  # whatever is not on the front is beaten in everything by one that is
        beaten = [
            other
            for other in result["trials"]
            if other is not row
            and other["ic"] >= row["ic"]
            and other["p99_us"] <= row["p99_us"]
            and other["size_bytes"] <= row["size_bytes"]
        ]
        assert (row["trial"] in result["pareto_front"]) == (not beaten)
    config = load_settings(write_outcome(result, asked), environ={}).config
    chosen = result["trials"][result["chosen"]]["values"]
    assert (config.gbdt.max_depth, config.gbdt.learning_rate) == (
        chosen["gbdt.max_depth"],
        chosen["gbdt.learning_rate"],
    )
    assert config.families == ("gbdt",)
    assert config.validation.trials == 3  # the training that follows is deflated by what was tried
    more = wanted(tune__trials=3, validation__trials=11)
    assert load_settings(write_outcome(result, more), environ={}).config.validation.trials == 13


def test_a_study_goes_on_and_draws_other_values(wanted: Any) -> None:
    search(wanted(tune__trials=1), quiet)
    study = search(wanted(tune__trials=2), quiet)
    drawn = [trial.params["gbdt.learning_rate"] for trial in study.get_trials()]
    assert len(drawn) == len(set(drawn)) == 2
    assert len(search(wanted(tune__trials=2), quiet).get_trials()) == 2


def test_the_last_fold_is_never_seen(wanted: Any, table: FeatureTable, meta: DataMeta) -> None:
    asked = wanted()
    whole = question(table, meta, asked.config, "gbdt").examples
    assert [fold.number for fold in whole.folds] == [1]
    with pytest.raises(InsufficientDataError, match=r"validation.folds.*at least 2, was 1"):
        question(table, meta, wanted(validation__folds=1).config, "gbdt")


@pytest.mark.system
def test_several_processes_share_a_database(wanted: Any, tmp_path: Path) -> None:
    asked = wanted(tune__trials=4, tune__workers=2, tune__storage=f"sqlite:///{tmp_path}/studies.db")
    said: list[str] = []
    study = search(asked, said.append)
    assert [trial.state.name for trial in study.get_trials()] == ["COMPLETE"] * 4
    assert said == ["2 processes try, up to 4 trials"]
    assert len({trial.params["gbdt.learning_rate"] for trial in study.get_trials()}) == 4


def test_workers_that_count_at_once_begin_no_trial_too_many(wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, count = wanted(tune__trials=1), study_module._trials
    asked.folder.mkdir(parents=True)

    def slow_to_act(study: Any, states: Any) -> list[Any]:
        found = count(study, states)
        time.sleep(0.3)
        return found

    monkeypatch.setattr(study_module, "_trials", slow_to_act)
    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(study_module._work, asked, number, quiet) for number in range(2)]
    assert [worker.result() for worker in workers] == [None, None]
    study = open_study(open_storage(asked.folder, asked.config.tune), asked.name, asked.config.tune)
    assert [trial.state.name for trial in study.get_trials()] == ["COMPLETE"]


def test_a_run_killed_in_mid_trial_is_gone_on_with(wanted: Any, tmp_path: Path) -> None:
    asked = wanted(tune__trials=3)
    (tmp_path / "search.pickle").write_bytes(pickle.dumps(asked))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    killed = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "search.pickle")], env=environment)
    try:
        cut = _wait_for_a_running_trial(asked)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    said: list[str] = []
    study = search(asked, said.append)
    assert said[0] == f"trial {cut.number} was cut off: its values are tried again"
    trials = study.get_trials()
    assert trials[cut.number].state.name == "FAIL"
    again = [trial for trial in trials if trial.user_attrs.get("retry_of") == cut.number]
    assert [trial.params for trial in again] == [cut.params]
    assert sum(trial.state.name == "COMPLETE" for trial in trials) == 3


def _wait_for_a_running_trial(asked: Search) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (asked.folder / "journal.log").exists():
            study = open_study(open_storage(asked.folder, asked.config.tune), asked.name, asked.config.tune)
            running = [
                trial for trial in study.get_trials() if trial.state.name == "RUNNING" and len(trial.params) == 2
            ]
            if running and running[0].number > 0:
                return running[0]
        time.sleep(0.02)
    raise AssertionError("no trial ran")


def test_a_trial_worse_than_the_median_is_given_up(wanted: Any) -> None:
    asked = wanted(tune__trials=8, tune__sampler="random", tune__pruner_startup_trials=2, tune__pruner_warmup_steps=1)
    states = [trial.state.name for trial in search(asked, quiet).get_trials()]
    assert set(states) == {"COMPLETE", "PRUNED"}
    assert states[:2] == ["COMPLETE"] * 2
    kept = wanted("kept", tune__trials=3, tune__pruner="none")
    assert [trial.state.name for trial in search(kept, quiet).get_trials()] == ["COMPLETE"] * 3


def test_a_study_in_use_or_with_other_objectives_is_refused(wanted: Any) -> None:
    search(wanted(tune__trials=1), quiet)
    with pytest.raises(UsageError, match=r"tune.objectives.*expected ic, p99_us, size_bytes"):
        search(wanted(tune__trials=2, tune__objectives=("ic",)), quiet)
    with locked(wanted().folder), pytest.raises(ComponentError, match="another run works on this study"):
        search(wanted(), quiet)


def test_the_choice_is_the_best_that_is_fast_enough(wanted: Any) -> None:
    front = [{"trial": 0, "ic": 0.2, "p99_us": 90.0}, {"trial": 1, "ic": 0.1, "p99_us": 20.0}]
    assert choose(front, wanted().config.tune) == 0
    assert choose(front, wanted(tune__max_p99_us=50.0).config.tune) == 1
    with pytest.raises(GateRefusedError, match=r"at most 10 us, was 20 us at best"):
        choose(front, wanted(tune__max_p99_us=10.0).config.tune)
    with pytest.raises(GateRefusedError, match="no trial that ended"):
        choose([], wanted().config.tune)

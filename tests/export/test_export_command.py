"""`tickserve export` as a person uses it: what is in force afterwards, and what it says to do next."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from export.validation import Evidence, judged
from serving import runfile
from tests.export.bundles import Rewrite, nothing_published
from tickserve.cli.commands import app
from tickserve.config import ValidationSettings
from tickserve.errors import ArtifactError, GateRefusedError, TickserveError

NAME = "btcusd-bars-gbdt"
QUICK = {"TICKSERVE_EXPORT__PARITY_ROWS": "100", "TICKSERVE_RUNTIME__MEASURE": "off"}


@pytest.fixture(autouse=True)
def _own_runtime_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))


def export(bundle: Path, repository: Path, *options: str) -> str:
    """Standard output; in this process, whose start would take longer than the rest."""
    done = CliRunner().invoke(app, ["export", str(bundle), "--repository", str(repository), *options], env=QUICK)
    assert done.exit_code == 0, done.output
    return done.stdout


def announce(repository: Path, pid: int) -> None:
    """As if `tickserve serve` ran here as process `pid`."""
    started, common = runfile.started_ticks(pid), {"metrics": "m", "credential": ("h", "v"), "view": "v"}
    where = str(repository.resolve())
    runfile.write(runfile.Run(pid, 1, f"127.0.0.1:{pid}", None, repository=where, started=started, **common))  # type: ignore[arg-type]


def test_without_activating_what_is_in_force_stays(trees_bundle: Path, repository: Path, rewrite: Rewrite) -> None:
    assert f"next: tickserve serve --repository {repository}" in export(trees_bundle, repository)
    current = repository / NAME / "current.json"
    before = current.read_bytes()
    rewrite(trees_bundle, metrics={"accuracy": 0.5})
    told = export(trees_bundle, repository, "--no-activate")
    assert (repository / NAME / "2" / "model.onnx").is_file()
    assert current.read_bytes() == before
    assert f"next: tickserve repo rollback {NAME} --to 2 --repository {repository}\n" in told
    rewrite(trees_bundle, metrics={"accuracy": 0.6})
    (done,) = json.loads(export(trees_bundle, repository, "--no-activate", "--json"))
    assert (done["version"], done["in_force"]) == (3, 1)
    rewrite(trees_bundle, metrics={"accuracy": 0.7})
    (done,) = json.loads(export(trees_bundle, repository, "--json"))
    assert (done["version"], done["in_force"]) == (4, 4)


def test_a_running_server_is_asked_to_swap(trees_bundle: Path, repository: Path, tmp_path: Path) -> None:
    announce(tmp_path / "another", os.getpid())
    assert "next: tickserve serve" in export(trees_bundle, repository), "that one serves another repository"
    announce(repository, os.getpid())
    assert export(trees_bundle, repository).endswith(f"next: tickserve models swap {NAME} --version 1\n")
    announce(tmp_path / "another", os.getppid())
    told = export(trees_bundle, repository)
    assert told.endswith(f"next: tickserve models swap {NAME} --version 1 --pid {os.getpid()}\n")


def test_a_version_that_is_new_is_the_newest(trees_bundle: Path, repository: Path) -> None:
    repository.mkdir(parents=True)
    announce(repository, os.getpid())
    told = export(trees_bundle, repository, "--no-activate")
    assert told.endswith(f"next: tickserve models swap {NAME}\n"), "which takes the newest"


def test_a_runtime_folder_that_is_open_to_others_names_no_server(trees_bundle: Path, repository: Path) -> None:
    announce(repository, os.getpid())
    (Path(os.environ["XDG_RUNTIME_DIR"]) / "tickserve").chmod(0o755)
    assert "next: tickserve serve" in export(trees_bundle, repository)


def gate(**changes: Any) -> dict[str, Any]:
    """A gate's record with its evidence, which passes but for the changes."""
    known: dict[str, Any] = {
        "outcome": "better", "words": "better than every baseline", "baseline": "linear", "ic_difference": 0.03,
        "ic_difference_95": (0.01, 0.05), "ic": 0.1, "ic_95": (0.05, 0.15), "n_eff": 900.0, "trials": 1,
        "ic_probability": 0.99,
    }  # fmt: skip
    return judged(Evidence(**known | changes), ValidationSettings())


def test_models_that_did_not_pass_the_validation_gate_are_refused_where_that_is_asked(
    trees_bundle: Path, repository: Path, rewrite: Rewrite
) -> None:
    def refused(*options: str, kind: type[TickserveError] = GateRefusedError, **environment: str) -> str:
        command = ["export", str(trees_bundle), "--repository", str(repository), "--require-gate", *options]
        done = CliRunner().invoke(app, command, env=QUICK | environment)
        assert isinstance(done.exception, kind)
        assert done.exception.exit_code == (1 if kind is GateRefusedError else 3)
        assert nothing_published(repository)
        return done.stdout if options else str(done.exception)

    rewrite(trees_bundle, metrics={"accuracy": 0.5})
    assert f"was {NAME}: no record of the gate" in refused()
    rewrite(trees_bundle, metrics={"gate": gate(n_eff=42.0)})
    assert f"{NAME}: not passed (expected at least 100 effective rows out of sample, was 42)" in refused()
    told = json.loads(refused("--json"))
    assert told["counterexample"]["refused"] == {
        NAME: "not passed (expected at least 100 effective rows out of sample, was 42)"
    }
    rewrite(trees_bundle, metrics={"gate": gate(n_eff=42.0) | {"passed": True, "reasons": []}})
    assert "not passed (expected at least 100" in refused(), "its own word is not enough"
    rewrite(trees_bundle, metrics={"gate": gate() | {"passed": False}})
    assert "not passed under the limits of its training" in refused()
    rewrite(trees_bundle, metrics={"gate": gate()})
    assert "at least 5,000 effective rows" in refused(TICKSERVE_VALIDATION__MIN_EFFECTIVE_ROWS="5000")
    for broken in (True, "yes", 5, [], {"passed": True}, {"passed": True, "evidence": {"ic": "much"}}):
        rewrite(trees_bundle, metrics={"gate": broken})
        assert f"{NAME}: metrics.gate" in refused(kind=ArtifactError)
    for scores in (5, {"model": {}}):
        rewrite(trees_bundle, metrics={"gate": gate(), "pooled": scores, "comparison": {}, "deflation": {}})
        assert f"{NAME}: metrics.gate" in refused(kind=ArtifactError)
    rewrite(trees_bundle, metrics={"gate": gate()})
    export(trees_bundle, repository, "--require-gate")
    assert (repository / NAME / "1" / "model.onnx").is_file()


def test_one_model_that_did_not_pass_keeps_all_of_a_folder_from_being_published(
    trees_bundle: Path, repository: Path, rewrite: Rewrite, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    rewrite(trees_bundle, metrics={"gate": gate()})
    shutil.copytree(trees_bundle, both / "a")
    rewrite(trees_bundle, name="other", metrics={"gate": gate(outcome="none")})
    shutil.copytree(trees_bundle, both / "b")
    done = CliRunner().invoke(app, ["export", str(both), "--repository", str(repository), "--require-gate"], env=QUICK)
    assert isinstance(done.exception, GateRefusedError)
    assert "was other: not passed" in str(done.exception)
    assert nothing_published(repository)


def test_repo_publish_asks_for_the_gate_too(
    trees_bundle: Path, repository: Path, rewrite: Rewrite, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    rewrite(trees_bundle, metrics={"gate": gate()})
    shutil.copytree(trees_bundle, both / "a")
    rewrite(trees_bundle, name="other", metrics={"gate": gate(outcome="none")})
    shutil.copytree(trees_bundle, both / "b")
    asked = ["repo", "publish", str(both), "--repository", str(repository), "--require-gate", "--json"]
    done = CliRunner().invoke(app, asked, env=QUICK)
    assert isinstance(done.exception, GateRefusedError)
    assert "was other: not passed" in json.loads(done.stdout)["refused"]
    assert nothing_published(repository)
    shutil.rmtree(both / "b")
    done = CliRunner().invoke(app, asked, env=QUICK)
    assert done.exit_code == 0, done.output
    assert [(each["model"], each["version"]) for each in json.loads(done.stdout)] == [(NAME, 1)]

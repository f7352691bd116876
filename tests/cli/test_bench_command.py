"""`tickserve bench`: figures are kept with the machine they came from, and two results are compared, or refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.cli.conftest import Run
from tickserve.cli import bench
from tickserve.cli.commands import app
from tickserve.errors import ArtifactError, GateRefusedError, StageMissingError, UsageError
from tickserve.figures import FORMAT, better, load_result
from tickserve.machine import fingerprint

MACHINE = {"cpu": "one", "cores": 2, "memory_gb": 8, "gpus": []}
ROWS = [
    {"client": "ours", "at_once": 1, "p50_us": 100.0, "per_s": 900.0, "ratio": 1.0},
    {"client": "ours", "at_once": 16, "p50_us": 300.0, "per_s": 5_000.0, "ratio": 1.0},
]
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(name: str, rows: Any = ROWS, **changes: Any) -> Path:
        saved = {
            "format": FORMAT,
            "benchmark": "asyncio_clients",
            "arguments": [],
            "fingerprint": MACHINE,
            "result": {"machine": "a text", "rows": rows, "failed": 0},
        }
        (tmp_path / name).write_text(json.dumps(saved | changes))
        return tmp_path / name

    return write


def invoked(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def told(*arguments: Any) -> Any:
    done = invoked("--json", *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def changed(**values: float) -> list[dict[str, Any]]:
    return [ROWS[0] | values, ROWS[1]]


def test_a_benchmark_is_run_and_its_figures_are_kept(tickserve: Run, tmp_path: Path) -> None:
    done = tickserve("bench", "--json", "--out", "kept/a.json", "shared_memory", "--rounds", 1, "--block", 5)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "kept" / "a.json").read_text())
    assert (saved["benchmark"], saved["arguments"]) == ("shared_memory", ["--rounds", "1", "--block", "5"])
    assert saved["fingerprint"] == fingerprint()
    assert json.loads(done.stdout) == {"path": "kept/a.json", **saved}
    figures = load_result(tmp_path / "kept" / "a.json").figures
    assert figures["rows.4 B gRPC.p50_us"] > 0


def test_a_benchmark_that_fails_keeps_its_exit_code_and_saves_nothing(tickserve: Run, tmp_path: Path) -> None:
    done = tickserve("bench", "shared_memory", "--rounds", "many")
    assert done.returncode == 2
    assert "invalid int value" in done.stderr
    assert list((tmp_path / "runs" / "bench").iterdir()) == []


def test_the_same_results_are_the_same(save: Save) -> None:
    found = told("--compare", save("a"), save("b"), "--fail-above", 1.0)
    assert (found["worse"], found["same_machine"], found["same_arguments"]) == ([], True, True)
    assert {change["ratio"] for change in found["figures"] if change["before"]} == {1.0}
    names = {change["name"] for change in found["figures"]}
    assert {"rows.ours at_once=1.p50_us", "rows.ours at_once=16.per_s", "failed"} <= names


@pytest.mark.parametrize(
    ("values", "name"),
    [({"p50_us": 120.0}, "rows.ours at_once=1.p50_us"), ({"per_s": 700.0}, "rows.ours at_once=1.per_s")],
)
def test_what_is_worse_than_the_bound_fails_and_what_is_inside_does_not(
    values: dict[str, float], name: str, save: Save
) -> None:
    before, after = save("a"), save("b", changed(**values))
    assert told("--compare", before, after)["worse"] == [name]  # marked, and no failure without a bound
    failed = invoked("--compare", before, after, "--fail-above", 1.10)
    assert isinstance(failed.exception, GateRefusedError)
    assert name in str(failed.exception)
    assert told("--compare", before, after, "--fail-above", 1.30)["worse"] == []
    assert told("--compare", after, before, "--fail-above", 1.10)["worse"] == []  # better is not worse


def test_a_failure_where_there_was_none_is_worse_by_any_bound(save: Save) -> None:
    after = save("b", result={"rows": ROWS, "failed": 3})
    assert isinstance(invoked("--compare", save("a"), after, "--fail-above", 1_000).exception, GateRefusedError)
    (change,) = [each for each in told("--compare", save("a"), after)["figures"] if each["name"] == "failed"]
    assert (change["ratio"], change["worse"]) == (None, True)


def test_a_figure_without_a_known_direction_is_not_judged(save: Save) -> None:
    assert told("--compare", save("a"), save("b", changed(ratio=50.0)))["worse"] == []


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("rows.a.p99_us", "lower"), ("loadtest.m http.rps", "higher"), ("train.m.rows_per_s", "higher"),
        ("stages.train.seconds", "lower"), ("stages.train.rate", "higher"), ("stages.train.peak_memory_mb", "lower"),
        ("p99_ms_by_step.load", "lower"), ("rows.x.ratio", None), ("rows.x.calls", None),
        ("journal.bytes_per_record", "lower"),
    ],
)  # fmt: skip
def test_which_way_is_better(name: str, way: str | None) -> None:
    assert better(name) == way


def test_different_machines_and_arguments_are_said(save: Save) -> None:
    other = save("b", fingerprint=MACHINE | {"cores": 64}, arguments=["--rounds", "3"])
    text = invoked("--compare", save("a"), other).stdout
    assert "DIFFERENT MACHINES: one, 2 cores, 8 GB, no GPU; then one, 64 cores" in text
    assert "DIFFERENT ARGUMENTS" in text
    assert told("--compare", save("a"), other)["same_machine"] is False
    unknown = save("c", fingerprint=None)
    assert told("--compare", save("a"), unknown)["same_machine"] is None
    assert "MACHINE UNKNOWN" in invoked("--compare", save("a"), unknown).stdout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("", "not JSON"),
        ("\x00", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a saved benchmark: expected tickserve.benchmark/1, was list"),
        ('{"format": "other/1"}', "was other/1"),
        (json.dumps({"format": FORMAT}), "without its name"),
        (json.dumps({"format": FORMAT, "benchmark": "x", "arguments": 3}), "without its name or arguments"),
        (json.dumps({"format": FORMAT, "benchmark": "x", "result": {"texts": ["a"]}}), "no figure in it"),
    ],
)
def test_files_that_are_no_result(text: str | None, says: str, save: Save, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "bad").write_text(text)
    caught = invoked("--compare", save("a"), tmp_path / "bad").exception
    assert isinstance(caught, ArtifactError)
    assert says in str(caught)
    assert str(tmp_path) not in str(caught)


def test_results_of_different_benchmarks_are_not_compared(save: Save) -> None:
    for other, says in (
        (save("b", benchmark="swap"), "expected asyncio_clients, was swap"),
        (save("c", result={"x_us": 1.0}), "no figure is in both"),
    ):
        caught = invoked("--compare", save("a"), other).exception
        assert isinstance(caught, ArtifactError)
        assert says in str(caught)


def demo_run(folder: Path, total_s: float, **run: Any) -> Path:
    folder.mkdir()
    row = {"model": "m", "transport": "http", "p50_us": 10.0, "p90_us": 2.0, "p99_us": 3.0, "rps": 5.0, "failures": 0}
    report = {"model": "m", "seconds": 2.0, "rows_per_s": 9.0, "pooled": {"model": {"hit_rate": 0.6, "macro_f1": 0.4}}}
    files = {
        "run": {"status": "done", "total_s": total_s, "peak_memory_mb": 900.0, "fingerprint": MACHINE} | run,
        "stages": [{"stage": "train", "seconds": 3.0, "peak_memory_mb": 800.0, "rows": 3, "rate": None}],
        "loadtest": {"rows": [row]},
        "train": [report],
    }
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_two_runs_of_the_demo(tmp_path: Path) -> None:
    found = told("--compare", demo_run(tmp_path / "one", 40.0), demo_run(tmp_path / "two", 60.0))
    assert found["benchmark"] == "demo"
    assert found["worse"] == ["run.total_s"]
    names = {change["name"] for change in found["figures"]}
    assert {"loadtest.m http.p50_us", "stages.train.seconds", "train.m.hit_rate", "run.peak_memory_mb"} <= names


def test_features_that_were_reused_are_not_compared_with_features_that_were_built(tmp_path: Path) -> None:
    runs = [demo_run(tmp_path / name, 40.0) for name in ("built", "reused")]
    stage = {"stage": "features", "seconds": 4.0, "peak_memory_mb": 300.0}
    for run, reused in zip(runs, (False, True), strict=True):
        (run / "stages.json").write_text(json.dumps([stage]))
        (run / "features.json").write_text(json.dumps({"reused": reused}))
    found = told("--compare", *runs)
    assert "stages.features.seconds" in found["only_before"]
    assert "stages.features reused.seconds" in found["only_after"]


def test_a_run_that_did_not_end_well_is_no_result(tmp_path: Path) -> None:
    good = demo_run(tmp_path / "one", 40.0)
    bad = demo_run(tmp_path / "two", 40.0, status="failed")
    assert "not a finished run" in str(invoked("--compare", good, bad).exception)
    (tmp_path / "three").mkdir()
    assert "run.json: cannot be read" in str(invoked("--compare", good, tmp_path / "three").exception)
    (bad / "run.json").write_text((good / "run.json").read_text())
    (bad / "loadtest.json").write_text('{"rows": [{"model": 3}]}')
    assert "not what its stage writes" in str(invoked("--compare", good, bad).exception)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "NAME: unknown benchmark: expected one of asyncio_clients"),
        (["../client"], "unknown benchmark"),
        (["--fail-above", "1.1", "client"], "goes with --compare"),
        (["--compare", "a", "b", "client"], "no NAME and no --out"),
    ],
)
def test_wrong_use(arguments: list[str], says: str) -> None:
    caught = invoked(*arguments).exception
    assert isinstance(caught, UsageError)
    assert says in str(caught)


def test_every_measurement_of_the_project_can_be_kept(root: Path) -> None:
    programs = {path.stem for path in (root / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    # A relay is a tool of others; what an installation takes, and what families and recipes are worth, are tables.
    assert set(bench.benchmarks()) == programs - {"relay", "install", "families", "compression"}
    rule = (root / "Makefile").read_text().partition("\nbench: ")[2].partition("\n\n")[0]
    # These need bars, two days, a folder of symbols, or the network: more than `make bench` is given.
    more = {"compression", "psi", "universe", "install"}
    assert set(re.findall(r"-m benchmarks\.(\w+)", rule)) == programs - {"relay"} - more


def test_without_a_checkout_there_are_no_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.stages, "checkout_root", lambda: tmp_path)
    assert isinstance(invoked("client").exception, StageMissingError)


def test_the_person_reads_elsewhere_than_the_program() -> None:
    code = (
        "from benchmarks.harness import told_apart\n"
        "with told_apart(True): print('for a person')\n"
        "with told_apart(False): print('also')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("also\n", "for a person\n")

"""`tickserve profile`: each tool around a real command, its exit code passed on, and what is refused."""

from __future__ import annotations

import json
import os
import pstats
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cli.conftest import Run
from tickserve.child import run_child
from tickserve.cli.commands import app
from tickserve.errors import ComponentError, MissingExtraError, TickserveError, UsageError
from tickserve.profiling import tools
from tickserve.profiling.tools import Asked

# Stands in for Nsight Systems: it writes down its command line and a file where it was told to, and runs the program.
NSYS_STAND_IN = """#!/bin/sh
for argument in "$@"; do echo "$argument" >> "$(dirname "$0")/argv"; done
for argument in "$@"; do case "$argument" in --output=*) echo report > "${argument#--output=}.nsys-rep";; esac; done
while [ "$1" != "$PROGRAM" ]; do shift; done
exec "$@"
"""
# Stands in for py-spy where the kernel forbids ptrace: what py-spy 0.4 says then, and its exit code.
SPY_STAND_IN = """#!/bin/sh
echo "Permission Denied: Try running again with elevated permissions by going 'sudo env \\"PATH=\\$PATH\\" !!'" >&2
exit 1
"""


def program(folder: Path, text: str) -> Path:
    path = folder / "program"
    path.write_text(text)
    path.chmod(0o755)
    return path


def result_of(done: subprocess.CompletedProcess[str]) -> Any:
    result = json.loads(done.stdout)
    assert result["exit_code"] == done.returncode
    return result


def refused(*arguments: str) -> TickserveError:
    caught = CliRunner().invoke(app, ["profile", *arguments]).exception
    assert isinstance(caught, TickserveError)
    return caught


def test_cprofile_names_the_functions_and_keeps_them(tickserve: Run, tmp_path: Path) -> None:
    done = tickserve("profile", "--json", "--", "features", "list", "--kind", "bars")
    assert done.returncode == 0, done.stderr
    result = result_of(done)
    assert "sha256:" in done.stderr  # what the command itself prints
    (file,) = result["files"]
    stats: Any = pstats.Stats(str(tmp_path / file["path"]))
    assert any("tickserve/cli/features.py" in where[0] for where in stats.stats)
    assert len(result["top"]) == 25
    assert result["top"][0]["own_s"] >= result["top"][-1]["own_s"] > 0
    assert json.loads((tmp_path / result["folder"] / "profile.json").read_text()) == result
    assert "exit_code" not in {path.name for path in (tmp_path / result["folder"]).iterdir()}


def test_a_person_reads_the_command_then_where_the_time_went(tickserve: Run) -> None:
    done = tickserve("profile", "--", "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("tickserve ")
    for text in ("most time of their own", "exit code 0", "profile.prof", "open with: python -m pstats"):
        assert text in done.stdout


@pytest.mark.parametrize("tool", ["cprofile", "py-spy"])
def test_the_exit_code_is_the_commands(tool: str, tickserve: Run) -> None:
    done = tickserve("profile", "--tool", tool, "--json", "--", "train", "--data", "absent.parquet")
    _skip_without_ptrace(done)
    assert done.returncode == 2
    assert result_of(done)["tool"] == tool
    assert "error:" in done.stderr


def _skip_without_ptrace(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode == 4 and "ptrace" in done.stderr:
        reason = "this kernel does not let py-spy read another process"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.mark.system
def test_py_spy_samples_the_stacks_of_the_command(tickserve: Run, tmp_path: Path) -> None:
    done = tickserve("profile", "--tool", "py-spy", "--rate", 200, "--json", "--", "features", "list")
    _skip_without_ptrace(done)
    assert done.returncode == 0, done.stderr
    (file,) = result_of(done)["files"]
    frames = json.loads((tmp_path / file["path"]).read_text())["shared"]["frames"]
    assert any(frame["file"].endswith("tickserve/profiling/inside.py") for frame in frames)
    assert "speedscope.app" in file["open_with"]
    drawn = tickserve("profile", "--tool", "py-spy", "--format", "flamegraph", "--json", "--", "features", "list")
    (file,) = result_of(drawn)["files"]
    assert (tmp_path / file["path"]).read_text().lstrip().startswith("<?xml")
    assert "<svg" in (tmp_path / file["path"]).read_text()


def test_py_spy_that_may_not_read_a_process_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = program(tmp_path, SPY_STAND_IN)
    monkeypatch.setattr(tools, "program", lambda _: stand_in)
    error = refused("--tool", "py-spy", "--out", str(tmp_path / "out"), "--", "features", "list")
    assert isinstance(error, ComponentError)
    assert "does not let py-spy read another process (ptrace)" in str(error)
    assert "SYS_PTRACE" in str(error)
    stand_in.write_text("#!/bin/sh\necho 'Error: something else' >&2\n")
    error = refused("--tool", "py-spy", "--out", str(tmp_path / "out"), "--", "features", "list")
    assert str(error) == "py-spy: it left no profile: Error: something else"


@pytest.mark.system
def test_torch_tells_the_operators_of_a_training(tickserve: Run, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(
        "[features]\nmax_rows = 2000\n[gbdt]\nenabled = false\n[validation]\nfolds = 1\n"
        "[lstm]\nwindow = 4\nhidden = 4\nepochs = 1\nmax_train_windows = 600\nstepped = false\n"
        "[compress]\nfp16 = false\nint8 = false\n"
    )
    command = ("train", "--config", "small.toml", "--out", "bundles")
    done = tickserve("profile", "--tool", "torch", "--json", "--", *command)
    assert done.returncode == 0, done.stderr
    result = result_of(done)
    operators, trace = (tmp_path / file["path"] for file in result["files"])
    assert any(row["operator"].startswith("aten::") and row["own_us"] > 0 for row in result["top"])
    assert len(json.loads(operators.read_text())) >= len(result["top"])
    assert json.loads(trace.read_text())["traceEvents"]
    assert list((tmp_path / "bundles").glob("*/manifest.json"))


def test_the_command_line_of_nsight_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = program(tmp_path, NSYS_STAND_IN)
    monkeypatch.setattr(tools, "program", lambda _: stand_in)
    monkeypatch.setenv("PROGRAM", sys.executable)
    done = CliRunner().invoke(
        app, ["profile", "--tool", "nsys", "--out", str(tmp_path / "out"), "--", "train", "--data", "absent"]
    )
    assert done.exit_code == 2, done.output
    (folder,) = (tmp_path / "out").iterdir()
    expected = ["profile", f"--output={folder}/nsys", "--force-overwrite=true", "--trace=cuda,nvtx,osrt,cudnn,cublas"]
    inside = [
        sys.executable,
        "-m",
        "tickserve.profiling.inside",
        str(folder),
        "nsys",
        "--",
        "train",
        "--data",
        "absent",
    ]
    assert (tmp_path / "argv").read_text().splitlines() == [*expected, "--sample=process-tree", *inside]
    result = json.loads((folder / "profile.json").read_text())
    assert result["files"][0]["path"] == f"{folder}/nsys.nsys-rep"
    assert "nsys-ui" in result["files"][0]["open_with"]


@pytest.mark.parametrize(
    ("tool", "kind", "says"),
    [
        ("py-spy", MissingExtraError, "'py-spy' is not installed (pip install 'tickserve[profile]')"),
        ("nsys", ComponentError, "Nsight Systems is not on the PATH"),
        ("torch", MissingExtraError, "'torch' is not installed (pip install 'tickserve[train]')"),
    ],
)
def test_a_profiler_that_is_not_here(tool: str, kind: type, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "program", lambda _: None)
    monkeypatch.setattr(tools, "find_spec", lambda _: None)
    error = refused("--tool", tool, "--", "features", "list")
    assert type(error) is kind
    assert says in str(error)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND: nothing to profile"),
        (["--", "profile", "--", "train"], "a profiler is not profiled"),
        (["--tool", "perf", "--", "train"], "--tool: unknown tool: expected cprofile, py-spy, torch, nsys, was perf"),
        (["--rate", "5", "--", "train"], "--rate: has no effect: expected --tool py-spy, was cprofile"),
        (["--tool", "torch", "--format", "flamegraph", "--", "train"], "--format: has no effect"),
        (["--tool", "py-spy", "--format", "png", "--", "train"], "expected speedscope or flamegraph, was png"),
    ],
)
def test_wrong_use(arguments: list[str], says: str) -> None:
    error = refused(*arguments)
    assert isinstance(error, UsageError)
    assert says in str(error)


def test_every_tool_says_what_it_sees() -> None:
    assert set(tools.SEEN) == set(tools.TOOLS)
    assert len({Asked(tool, ["x"]).result(Path()) for tool in tools.TOOLS}) == len(tools.TOOLS)


def test_a_child_does_not_outlive_the_command_and_says_how_it_ended() -> None:
    assert run_child(["sh", "-c", "kill -9 $$"]).exit_code == 128 + signal.SIGKILL
    code = "import sys; from tickserve.child import run_child; run_child(['sleep', '600'])"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import signal, sys; signal.signal(15, lambda *_: sys.exit(143)); {code}"]
    )
    sleeping = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    until = time.monotonic() + 10
    while not (children := sleeping.read_text().split()) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.1)
    parent.terminate()
    assert parent.wait(10) == 143
    assert children
    assert not Path(f"/proc/{children[0]}").exists()

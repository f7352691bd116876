"""Small manners: a reader that goes away, an output that cannot be written, a run that is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from tests.cli.conftest import Run
from tests.serving.conftest import publish_tiny
from tickserve.cli import interrupts
from tickserve.cli.commands import app
from tickserve.errors import UsageError

COMMAND = [sys.executable, "-m", "tickserve.cli"]


def test_a_reader_that_goes_away_is_no_failure(root: Path) -> None:
    script = f"set -o pipefail; {sys.executable} -m tickserve.cli config show | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=root, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments", [("train", "--out", "file"), ("demo", "--runs", "file"), ("demo", "--repository", "file")]
)
def test_an_output_that_cannot_be_written_is_noticed_before_any_work(
    tickserve: Run, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    done = tickserve(*arguments)
    assert done.returncode == 4, done.stderr
    assert "cannot write" in done.stderr
    assert not (tmp_path / ".tickserve").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[true, 1]]", "was text, true, false or null"),
        ('[["a"]]', "expected lists of numbers"),
        ("[[1, 2], [3]]", "expected lists of numbers"),
        ("[[1e300]]", "too large"),
        ("[", "not JSON"),
    ],
)
def test_rows_that_are_no_numbers_are_refused(text: str, message: str, tmp_path: Path) -> None:
    from tickserve.cli.predict import _rows_of
    from tickserve.errors import SchemaError

    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(SchemaError, match=message):
        _rows_of(tmp_path / "rows.json")


def test_a_run_that_is_ended_says_so_and_leaves_nothing_running(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TICKSERVE_")}
    says = tmp_path / "says"
    with says.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, "demo"], cwd=tmp_path, env=environment, stderr=file, start_new_session=True
        )
    deadline = time.monotonic() + 60
    while "2/5" not in says.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_two_runs_in_one_second_have_a_folder_each(tmp_path: Path) -> None:
    from tickserve.cli.demo import _run_folder

    folders = {_run_folder(tmp_path / "runs", "aapl") for _ in range(5)}
    assert len(folders) == 5


def test_predict_counts_newest_rows_of_market_data_only(root: Path) -> None:
    for options in (["--last", "5"], ["--last", "1"], ["--last", "5", "--rows", "rows.json"]):
        done = CliRunner().invoke(app, ["predict", "any-model", "--repository", str(root), *options])
        assert isinstance(done.exception, UsageError)
        assert str(done.exception) == "--last: names the newest rows of market data: expected with --data, was without"


SIGNALS = [signal.SIGINT, signal.SIGTERM]
WHILE_IMPORTED = """
import builtins, os, sys
from tickserve.cli import main
imported, number = builtins.__import__, int(sys.argv.pop())
def watched(name, *rest):
    if name == "typer":
        os.kill(os.getpid(), number)
    return imported(name, *rest)
builtins.__import__ = watched
main()
"""
WHILE_RUNNING = """
import os, sys, time
from tickserve import pipeline
from tickserve.cli import main
number = int(sys.argv.pop())
def interrupted(repository):
    try:
        exec("os.kill(os.getpid(), number); time.sleep(60)")
    finally:
        print("undone")
pipeline.models_in = interrupted
main()
"""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("code", "undone"), [(WHILE_IMPORTED, ""), (WHILE_RUNNING, "undone\n")])
def test_a_command_that_is_told_to_end_says_one_line(tmp_path: Path, code: str, undone: str, number: int) -> None:
    (tmp_path / "command.py").write_text(code)
    command = [sys.executable, "-m", "command", "serve", str(int(number))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, undone, "interrupted\n")


def test_little_is_imported_before_a_signal_is_handled() -> None:
    code = "import sys; import tickserve.cli; print({'typer', 'rich', 'numpy', 'tickserve.errors'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_what_a_library_made_of_an_interrupt_is_one_and_an_exit_code_of_its_own_is_none() -> None:
    def raised(error: BaseException, cause: BaseException) -> BaseException:
        error.__cause__ = cause
        return error

    assert interrupts.behind(raised(ImportError("initialization failed"), KeyboardInterrupt())) == signal.SIGINT
    assert interrupts.behind(raised(SystemExit(130), KeyboardInterrupt())) == signal.SIGINT
    assert interrupts.behind(interrupts.Terminated(143)) == signal.SIGTERM
    assert interrupts.behind(raised(SystemExit(0), KeyboardInterrupt())) is None
    assert interrupts.behind(SystemExit(130)) is None, "a child's own: that has said so"
    assert interrupts.behind(ValueError()) is None


def children_of(pid: int, doing: str, within_s: float = 60) -> list[psutil.Process]:
    """The processes below `pid`, once one of them has `doing` in its command line."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            found = psutil.Process(pid).children(recursive=True)
            if any(doing in " ".join(child.cmdline()) for child in found):
                return found
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.005)
    raise AssertionError(f"nothing does {doing!r}")


@pytest.mark.system
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("whom", ["group", "parent"])
@pytest.mark.parametrize("doing", ["inspection", "tritonserver"])
def test_a_start_that_is_told_to_end_ends_at_once(tmp_path: Path, number: int, whom: str, doing: str) -> None:
    """While a model file is checked, and while the server comes up: no model is blamed, and nothing is left."""
    for seed in range(5 if doing == "inspection" else 1):  # each check lives for a second only
        publish_tiny(tmp_path / "model_repository", f"tiny{seed}", seed)
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    process = subprocess.Popen(
        [*COMMAND, "serve", *ports], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children = children_of(process.pid, doing)
    (os.killpg if whom == "group" else os.kill)(process.pid, number)
    sent = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - sent < 5, "a second, on a machine with nothing else to do"
    assert (process.returncode, said.splitlines()[1:]) == (128 + number, ["interrupted"])
    _, alive = psutil.wait_procs(children, timeout=5)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []

"""Small manners: a reader that goes away, an output that cannot be written, a run that is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.cli.conftest import Run
from tickserve.cli import app
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

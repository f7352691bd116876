"""`tickserve train --resume`: the command that was killed goes on, in another process, to the same bundle."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tickserve.manifest import load_bundle

Done = subprocess.CompletedProcess[str]
CONFIG = """
[features]
max_rows = 6000
store = "features"
[validation]
folds = 2
[gbdt]
enabled = false
[lstm]
window = 5
hidden = 8
epochs = 3
max_train_windows = 2000
stepped = false
[compress]
fp16 = false
int8 = false
[trainer]
checkpoint_steps = 2
checkpoint_async = false
"""

KILLED = """
import os, signal
from training.nets import checkpoints
from tickserve.cli import main

write, written = checkpoints.CheckpointFolder.write, []

def write_and_die(self, checkpoint):
    write(self, checkpoint)
    written.append(self.folder.name)
    if len([name for name in written if "fold-2" in name]) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints.CheckpointFolder.write = write_and_die
raise SystemExit(main())
"""


@pytest.mark.system
def test_a_command_that_was_killed_is_resumed_to_the_same_bundle(tmp_path: Path, root: Path) -> None:
    (tmp_path / "small.toml").write_text(CONFIG)

    def train(out: str, *options: str, program: tuple[str, ...] = ("-m", "tickserve.cli")) -> Done:
        command = [sys.executable, *program, "train", "--config", "small.toml", "--out", out, *options]
        env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    killed = train("killed", "--checkpoints", "points", program=("-c", KILLED))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = train("resumed", "--checkpoints", "points", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    said = dict(re.findall(r"fold (\d)/2.* resumed at step (\d+)", resumed.stderr))
    assert said == {"1": "6", "2": "6"}  # fold 1 was finished, fold 2 was in its second epoch
    whole = train("whole")
    assert whole.returncode == 0, whole.stderr
    assert "resumed" not in whole.stderr
    one, two = (load_bundle(next((tmp_path / name).glob("*-lstm"))) for name in ("resumed", "whole"))
    assert one.files["model.safetensors"] == two.files["model.safetensors"]


def test_resume_without_checkpoints_is_one_line(tickserve: Run) -> None:
    done = tickserve("train", "--resume")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "trainer.checkpoint_steps: expected at least 1 with resume, was 0 (from default)" in done.stderr

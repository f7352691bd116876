"""Two processes by `torchrun` over gloo: the weights that one process learns, whole or in shards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tickserve.config import Config, TrainerSettings
from tickserve.errors import ComponentError, ConfigError
from training.examples import Examples
from training.nets import NetJob

# Of 601 rows, the last batch of an epoch has one: a process that has none of its rows still has to take part.
ROWS, BATCH = 601, 200


def job(examples: Examples, config: Config, **trainer: Any) -> tuple[NetJob, list[float]]:
    settings = config.lstm.model_copy(update={"max_train_windows": ROWS, "batch_rows": BATCH, "epochs": 2})
    made, losses = NetJob("lstm", examples, settings, 7, TrainerSettings(**trainer)), []
    made.watch = lambda step, loss: losses.append(loss)
    return made, losses


def learned(made: tuple[NetJob, list[float]], examples: Examples) -> tuple[np.ndarray, list[float], int]:
    fit = made[0].fit(examples.folds[0])
    weights = torch.cat([tensor.flatten() for tensor in fit.model.state_dict().values()]).numpy()
    return weights, made[1], fit.resumed_at


def test_ddp_reaches_the_weights_of_one_process(examples: Examples, config: Config) -> None:
    weights, losses, _ = learned(job(examples, config), examples)
    together, said, _ = learned(job(examples, config, processes=2, sharding="ddp", shared_memory=True), examples)
    np.testing.assert_allclose(together, weights, atol=1e-5)
    assert said == pytest.approx(losses, rel=1e-5)


@pytest.mark.system
def test_shards_reach_the_weights_of_one_process_and_are_resumed_as_such(
    examples: Examples, config: Config, tmp_path: Path
) -> None:
    weights, losses, _ = learned(job(examples, config, accumulate=2), examples)
    shards: dict[str, Any] = {"processes": 2, "sharding": "fsdp", "accumulate": 2}
    shards |= {"checkpoint_steps": 3, "checkpoint_folder": str(tmp_path), "checkpoint_keep": 9}
    together, said, _ = learned(job(examples, config, **shards), examples)
    np.testing.assert_allclose(together, weights, atol=1e-5)
    assert said == pytest.approx(losses, rel=1e-5)
    (folder,) = tmp_path.iterdir()
    (max(folder.iterdir()) / "digest.json").unlink()  # the finished one: what is left is of the second epoch
    again, _, resumed = learned(job(examples, config, **shards, resume=True), examples)
    assert resumed == 3
    np.testing.assert_array_equal(again, together)


@pytest.mark.system
def test_each_process_holds_a_part_of_every_weight(tmp_path: Path, root: Path) -> None:
    """Not so with Accelerate's own plugin on a CPU, which wraps for DDP: every process would hold all of them."""
    script = tmp_path / "part.py"
    script.write_text(PART)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert (done.stdout.count("half"), done.stdout.count("whole")) == (2, 0)


PART = """
import torch
from torch.distributed.tensor import DTensor
from models.lstm import LstmClassifier
from tickserve.config import LstmSettings, TrainerSettings
from training.nets.engine import Engine
from training.nets.launch import leave
from training.nets.windows import Batch

settings = TrainerSettings(processes=2, sharding="fsdp")
engine = Engine(LstmClassifier(6, 4, 8, 1), LstmSettings(), settings, torch.device("cpu"))
engine.backward(engine.loss(Batch(torch.rand(5, 4, 6), torch.zeros(5, dtype=torch.int64))), last=True)
engine.step(0.1)
shards = [each for each in engine.module.parameters() if isinstance(each, DTensor) and each.shape[0] % 2 == 0]
state = engine.optimizer.state[shards[0]]["exp_avg"]
held = all(2 * each.to_local().numel() == each.numel() for each in shards) and state.to_local().shape[0] * 2 == 32
print("half" if len(shards) == 4 and held else "whole")
torch.distributed.destroy_process_group()
leave(0)
"""


def of_the_fit() -> list[psutil.Process]:
    """Processes of a fit, `torchrun` among them; other tests' servers are this process's children too."""
    return [each for each in psutil.Process().children(recursive=True) if "training.nets.launch" in told(each)]


def told(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""


@pytest.mark.system
def test_what_a_process_refuses_is_what_the_caller_is_told(examples: Examples, config: Config) -> None:
    with pytest.raises(ConfigError, match="lstm has no blocks"):
        learned(job(examples, config, processes=2, sharding="ddp", activation_checkpointing=True), examples)


@pytest.mark.system
def test_a_process_that_is_lost_ends_the_fit_and_leaves_none_behind(examples: Examples, config: Config) -> None:
    made, losses = job(examples, config, processes=2, sharding="ddp")
    made.settings = made.settings.model_copy(update={"epochs": 10_000, "patience": 10_000})

    def kill_one(step: int, loss: float) -> None:
        losses.append(loss)
        if len(losses) == 1:
            ranks = [each for each in psutil.Process().children(recursive=True) if "LOCAL_RANK" in each.environ()]
            ranks[-1].send_signal(signal.SIGKILL)

    made.watch = kill_one
    with pytest.raises(ComponentError, match=r"trainer\.processes"):
        made.fit(examples.folds[0])
    assert losses
    deadline = time.monotonic() + 10
    while of_the_fit() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not of_the_fit()


@pytest.mark.system
def test_a_watch_that_gives_up_ends_the_processes(examples: Examples, config: Config) -> None:
    made, _ = job(examples, config, processes=2, sharding="ddp")
    made.settings = made.settings.model_copy(update={"epochs": 10_000, "patience": 10_000})

    def give_up(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    made.watch = give_up
    with pytest.raises(KeyboardInterrupt):
        made.fit(examples.folds[0])
    assert not of_the_fit()

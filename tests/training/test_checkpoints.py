"""Checkpoints: a fit that was killed goes on to the same bits, and nothing half-written is ever read."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from safetensors import safe_open

from models.registry import NETS
from tests.training.small_nets import block_job
from tickserve.config import TrainerSettings
from tickserve.errors import ArtifactError, ComponentError
from tickserve.store import STAGING_PREFIX
from training.examples import Examples
from training.nets import NetJob
from training.nets.checkpoints import (
    DIGEST_NAME,
    PROGRESS,
    STATE,
    WEIGHTS,
    Checkpoint,
    CheckpointFolder,
    read_checkpoint,
)
from training.nets.writer import Writer


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    yield
    NETS.pop("blocks", None)


def checkpoint(step: int, rows: int = 1_000) -> Checkpoint:
    weights = {"w": torch.full((rows,), float(step))}
    return Checkpoint(step, weights, {"optimizer:w/step": torch.tensor(step)}, {"fit": {"step": step}})


def job(examples: Examples, folder: Path, *, steps: int = 3, resume: bool = False, **more: Any) -> NetJob:
    seed = more.pop("seed", 7)
    trainer = TrainerSettings(checkpoint_steps=steps, checkpoint_folder=str(folder), resume=resume, **more)
    return block_job(examples, trainer, seed)


def weights(net_job: NetJob, examples: Examples) -> tuple[np.ndarray, int]:
    fit = net_job.fit(examples.folds[0])
    return torch.cat([tensor.flatten() for tensor in fit.model.state_dict().values()]).numpy(), fit.resumed_at


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.conftest import bar_table, meta_of, quick_config
from tests.training.test_checkpoints import job
from training.examples import prepare
from training.nets import checkpoints

compress, written = checkpoints.CheckpointFolder._compress, []

def compress_and_die(self, data, path):
    compress(self, data, path)
    written.append(path.name)
    if written.count(path.name) == 4:  # in mid-checkpoint: the weights are written, the rest is not
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints.CheckpointFolder._compress = compress_and_die
examples = prepare(bar_table(Path(sys.argv[1])), meta_of(), quick_config())
job(examples, Path(sys.argv[2]), checkpoint_async=False).fit(examples.folds[0])
"""


def test_a_fit_killed_in_mid_checkpoint_goes_on_to_the_same_bits(
    examples: Examples, market_data: Path, tmp_path: Path, root: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), market_data, tmp_path],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2_000:]
    (folder,) = tmp_path.iterdir()
    assert list(folder.glob(f"{STAGING_PREFIX}*"))
    resumed, step = weights(job(examples, tmp_path, resume=True), examples)
    whole, from_the_start = weights(block_job(examples, TrainerSettings()), examples)
    assert (step, from_the_start) == (9, 0)  # 8 steps an epoch: in the middle of the second
    np.testing.assert_array_equal(resumed, whole)
    assert not list(folder.glob(f"{STAGING_PREFIX}*"))


def test_checkpoints_change_no_bit_and_a_finished_fit_is_not_fitted_again(examples: Examples, tmp_path: Path) -> None:
    plain, _ = weights(block_job(examples, TrainerSettings()), examples)
    watched, _ = weights(job(examples, tmp_path, steps=1), examples)
    np.testing.assert_array_equal(watched, plain)
    again = job(examples, tmp_path, resume=True)
    again.watch = lambda step, loss: pytest.fail("trained again")
    np.testing.assert_array_equal(weights(again, examples)[0], plain)


def test_another_jobs_checkpoints_are_not_taken_and_a_fresh_run_clears_its_own(
    examples: Examples, tmp_path: Path
) -> None:
    weights(job(examples, tmp_path), examples)
    assert weights(job(examples, tmp_path, resume=True, seed=8), examples)[1] == 0
    assert weights(job(examples, tmp_path, resume=True, accumulate=2), examples)[1] == 0
    assert len(list(tmp_path.iterdir())) == 3
    assert weights(job(examples, tmp_path, steps=1_000), examples)[1] == 0
    assert sorted(len(list(folder.iterdir())) for folder in tmp_path.iterdir()) == [1, 2, 2]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (5, 10, 100, 20):
        folder.write(checkpoint(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000000020", "step-000000000100"]
    found = folder.newest()
    assert found is not None
    assert (found.step, float(found.weights["w"][0]), int(found.state["optimizer:w/step"])) == (100, 100.0, 100)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, change, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", [WEIGHTS, STATE, PROGRESS, DIGEST_NAME])
def test_what_is_cut_changed_or_missing_is_passed_over(
    tmp_path: Path, name: str, damage: Callable[[Path], Any]
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.write(checkpoint(1))
    newest = folder.write(checkpoint(2))
    damage(newest / name)
    with pytest.raises(ArtifactError):
        read_checkpoint(newest)
    found = folder.newest()
    assert found is not None
    assert found.step == 1
    damage(tmp_path / "step-000000000001" / name)
    assert folder.newest() is None


def test_a_file_of_another_checkpoint_is_not_taken(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    older, newest = folder.write(checkpoint(1)), folder.write(checkpoint(2))
    shutil.copy(older / WEIGHTS, newest / WEIGHTS)
    with pytest.raises(ArtifactError, match=f"{WEIGHTS}: cut or changed"):
        read_checkpoint(newest)


def test_files_are_safetensors_and_json(examples: Examples, tmp_path: Path) -> None:
    weights(job(examples, tmp_path), examples)
    (folder,) = tmp_path.iterdir()
    newest = max(folder.iterdir())
    for name in (WEIGHTS, STATE):
        plain = tmp_path / "plain.safetensors"
        plain.write_bytes(zstandard.ZstdDecompressor().decompress((newest / name).read_bytes()))
        with safe_open(plain, "pt") as tensors:
            names = set(tensors.keys())
        kinds = {each.partition(":")[0] for each in names}
        assert kinds == ({"best", "optimizer", "random"} if name == STATE else names)
    assert json.loads((newest / PROGRESS).read_text())["fit"]["finished"]


def test_a_full_disk_leaves_what_was_there_and_nothing_half_written(examples: Examples, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "own")
    folder.write(checkpoint(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_048, hard))
    try:
        with pytest.raises(ComponentError, match="cannot write"):
            folder.write(Checkpoint(2, {"w": torch.rand(10_000)}, {}, {}))
        with pytest.raises(ComponentError, match="cannot write"):
            weights(job(examples, tmp_path / "fit"), examples)  # also from the writer's thread
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = folder.newest()
    assert found is not None
    assert found.step == 1
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["step-000000000001"]
    assert not [path for folder in (tmp_path / "fit").iterdir() for path in folder.iterdir()]


def test_training_waits_for_no_disk_and_only_the_newest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, begun, written = threading.Event(), threading.Event(), []

    def slow(self: CheckpointFolder, given: Checkpoint) -> None:
        begun.set()
        assert free.wait(10)
        written.append(given.step)

    monkeypatch.setattr(CheckpointFolder, "write", slow)
    with Writer(CheckpointFolder(tmp_path)) as writer:
        writer.submit(checkpoint(1))
        assert begun.wait(10)
        for step in (2, 3, 4):
            writer.submit(checkpoint(step))
        free.set()
    assert written == [1, 4]


@pytest.mark.parametrize("steps", [1, 1_000])  # in mid-training, and of the last checkpoint alone
def test_what_the_writer_failed_with_ends_the_fit(
    examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(CheckpointFolder, "_compress", full)
    with pytest.raises(ComponentError, match="No space left on device"):
        weights(job(examples, tmp_path, steps=steps), examples)
    assert [thread.name for thread in threading.enumerate() if thread.name == "checkpoints"] == []


def test_a_folder_that_cannot_be_written_is_told_before_training(examples: Examples, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    net_job = job(examples, tmp_path / "file")
    net_job.watch = lambda step, loss: pytest.fail("trained")
    with pytest.raises(ComponentError, match="cannot write"):
        weights(net_job, examples)


MOUNTED = """
import sys
from pathlib import Path
import torch
from tickserve.errors import ComponentError
from training.nets.checkpoints import Checkpoint, CheckpointFolder

folder = CheckpointFolder(Path(sys.argv[1]))
try:
    for step in range(2, 9):
        folder.write(Checkpoint(step, {"w": torch.rand(20_000)}, {}, {}))
except ComponentError as error:
    found = folder.newest()
    print(found.step, step, error)
    left = sorted(path.name for path in Path(sys.argv[1]).iterdir())
    assert left == [f"step-{number:012d}" for number in range(max(1, step - 2), step)], left
"""


@pytest.mark.system
@pytest.mark.parametrize(
    ("mount", "reason", "step"),
    [
        ("mount -t tmpfs -o size=200k none {0} && cp -r {0}.one/. {0}", "No space left on device", 4),
        ("cp -r {0}.one/. {0} && mount --bind {0} {0} && mount -o remount,bind,ro {0}", "Read-only file system", 2),
    ],
)
def test_on_a_real_small_or_read_only_file_system(
    mount: str, reason: str, step: int, tmp_path: Path, root: Path
) -> None:
    place = tmp_path / "mounted"
    place.mkdir()
    CheckpointFolder(tmp_path / "mounted.one").write(checkpoint(1))
    (tmp_path / "inside.py").write_text(MOUNTED)
    command = f"{mount.format(place)} && exec {sys.executable} {tmp_path / 'inside.py'} {place}"
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", command],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    newest, failed = done.stdout.split()[:2]
    assert (int(newest), int(failed)) == (step - 1, step)
    assert reason in done.stdout

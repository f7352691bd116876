"""The training loop of every family of nets: Adam on cross-entropy, early stopping on the purged validation rows.

A step's gradient is the mean over all rows of the step, however many batches and processes they are spread over, so
that accumulation and sharding change no result beyond rounding. The order of the rows follows from the seed and the
epoch alone: a fit that goes on from a checkpoint meets the batches it would have met.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tickserve.store import check_writable
from training.examples import IntArray
from training.job import Watch
from training.nets.checkpoints import Checkpoint, CheckpointFolder
from training.nets.engine import Engine, Weights
from training.nets.machine import configured, device_of, refuse_inert, refuse_unfit
from training.nets.task import Task
from training.nets.windows import Batch, Loader, WindowSet, shared
from training.nets.writer import Writer

PREDICT_ROWS = 2_048
BEST, OPTIMIZER, RANDOM = "best:", "optimizer:", "random:"


@dataclass(frozen=True)
class Progress:
    """Where a fit is: `done` steps of epoch `epoch` (from 1), `step` of all; the `best` epoch so far and its loss."""

    epoch: int = 1
    done: int = 0
    step: int = 0
    best: int = 0
    lowest: float | None = None
    finished: bool = False


@dataclass(frozen=True)
class Learned:
    """The weights of the `best` epoch, and the step of the checkpoint that the fit went on from (0: none).

    With several processes the first one has the weights.
    """

    weights: Weights
    best: int
    resumed_at: int = 0


def learn(task: Task, watch: Watch | None = None) -> Learned:
    """Fit a task in this process, or this process's part of it. `watch` is told each epoch's validation loss.

    Raises ConfigError and ComponentError for options without effect here, ComponentError for a checkpoint that cannot
    be written.
    """
    device = device_of(task.trainer)
    refuse_inert(task.trainer, device)
    with reproducible(task.seed, task.settings.threads), configured(task.trainer, device), ExitStack() as stack:
        net = task.new_net()
        refuse_unfit(task.architecture["kind"], net, task.settings, task.trainer)
        if task.trainer.lora_rank:
            from training.nets.lora import attach

            attach(net, task.trainer.lora_rank, task.trainer.lora_alpha)
        engine = Engine(net, task.settings, task.trainer, device)
        loader = stack.enter_context(Loader(_windows(task, net.input_shape), task.trainer))
        learned = _Fit(task, engine, loader, _writer(task, engine, stack), watch).run()
        if task.trainer.lora_rank and learned.weights:
            from training.nets.lora import merged

            return replace(learned, weights=merged(task, learned.weights))
        return learned


def _windows(task: Task, shape: tuple[int, ...]) -> WindowSet:
    in_workers = task.trainer.shared_memory and task.trainer.loader_workers and task.trainer.processes == 1
    features = shared(task.features) if in_workers else task.features
    return WindowSet(features, task.classes, task.window, shape)


def _writer(task: Task, engine: Engine, stack: ExitStack) -> Writer | None:
    """The writer of the first process; None where no checkpoints are wanted, and in the other processes."""
    trainer = task.trainer
    if not trainer.checkpoint_steps:
        return None
    place = Path(trainer.checkpoint_folder) / f"{task.name}-{task.fingerprint()}"
    folder = CheckpointFolder(place, trainer.checkpoint_keep, trainer.checkpoint_level)
    writer = Writer(folder, asynchronous=trainer.checkpoint_async)
    if engine.rank == 0:
        check_writable(place)
        folder.sweep() if trainer.resume else folder.clear()
    engine.accelerator.wait_for_everyone()
    return stack.enter_context(writer)


class _Fit:
    """One fit under way."""

    def __init__(self, task: Task, engine: Engine, loader: Loader, writer: Writer | None, watch: Watch | None) -> None:
        self._task, self._engine, self._loader, self._writer = task, engine, loader, writer
        self._watch = watch
        self._at = Progress()
        self._kept: Weights = {}

    def run(self) -> Learned:
        """Learn to the end, from the beginning or from a checkpoint."""
        if self._engine.rank:
            torch.manual_seed(self._task.seed + self._engine.rank)  # the same weights everywhere, other dropout
        resumed = self._resume()
        while not self._at.finished:
            self._epoch()
            self._judge(self._validation_loss())
        return Learned(self._kept, self._at.best, resumed)

    def _epoch(self) -> None:
        """What is left of the epoch under way."""
        groups = self._groups()[self._at.done :]
        batches = self._loader.batches([self._own(rows) for group in groups for rows in group])
        self._engine.module.train()
        for group in groups:
            self._step(group, batches)
            self._at = replace(self._at, done=self._at.done + 1, step=self._at.step + 1)
            if self._writer and self._at.step % self._task.trainer.checkpoint_steps == 0:
                self._save(self._writer)

    def _groups(self) -> list[list[IntArray]]:
        """The batches of the epoch under way, in the groups that make a step."""
        rows = self._task.train
        order = np.random.default_rng((self._task.seed, self._at.epoch)).permutation(len(rows))
        batches = _cut(rows[order], self._task.settings.batch_rows)
        size = self._task.trainer.accumulate
        return [batches[start : start + size] for start in range(0, len(batches), size)]

    def _own(self, rows: IntArray) -> IntArray:
        """The process's rows of a batch. One without any takes a row that counts nothing: all have to take part."""
        own: IntArray = rows[self._engine.rank :: self._engine.world]
        return own if len(own) else rows[:1]

    def _counts(self, rows: IntArray) -> bool:
        return len(rows) > self._engine.rank

    def _step(self, group: Sequence[IntArray], batches: Iterator[Batch]) -> None:
        engine, total = self._engine, sum(len(rows) for rows in group)
        for place, rows in enumerate(group, start=1):
            # The processes' gradients are averaged: `world` makes a sum of that.
            share = engine.world / total if self._counts(rows) else 0.0
            engine.backward(engine.loss(next(batches)) * share, last=place == len(group))
        engine.step(self._rate())

    def _rate(self) -> float:
        rate = self._task.settings.learning_rate
        if self._task.trainer.schedule == "constant":
            return rate
        per_step = self._task.settings.batch_rows * self._task.trainer.accumulate
        steps = self._task.settings.epochs * math.ceil(len(self._task.train) / per_step)
        return rate * 0.5 * (1 + math.cos(math.pi * self._at.step / steps))

    def _validation_loss(self) -> float:
        """Mean cross-entropy of the validation rows."""
        order = _cut(self._task.validation, PREDICT_ROWS)
        self._engine.module.eval()
        total = 0.0
        with torch.no_grad():
            for rows, batch in zip(order, self._loader.batches([self._own(rows) for rows in order]), strict=True):
                loss = float(self._engine.loss(batch))
                total += loss if self._counts(rows) else 0.0
        return self._engine.total(total) / len(self._task.validation)

    def _judge(self, loss: float) -> None:
        """Keep the weights of the lowest loss, and stop when it has not fallen for `patience` epochs."""
        settings, epoch = self._task.settings, self._at.epoch
        if self._watch:
            self._watch(epoch, loss)
        if loss < (math.inf if self._at.lowest is None else self._at.lowest) or not self._at.best:
            lowest = loss if math.isfinite(loss) else None
            self._at = replace(self._at, lowest=lowest, best=epoch)
            self._kept = self._engine.weights()
        finished = epoch >= settings.epochs or epoch - self._at.best >= settings.patience
        self._at = replace(self._at, epoch=epoch + 1, done=0, finished=finished)
        if finished and self._writer:
            self._save(self._writer)

    def _save(self, writer: Writer) -> None:
        """Copy what the fit is made of, in every process; the first has it written."""
        optimizer, rest = self._engine.optimizer_state()
        parts = ((BEST, self._kept), (OPTIMIZER, optimizer), (RANDOM, self._engine.random_state()))
        state = {prefix + name: tensor for prefix, tensors in parts for name, tensor in tensors.items()}
        weights = self._engine.weights()
        if self._engine.rank == 0:
            writer.submit(Checkpoint(self._at.step, weights, state, {"fit": asdict(self._at), "optimizer": rest}))

    def _resume(self) -> int:
        """Go on from the newest whole checkpoint; its step, or 0 where there is none."""
        found = self._writer.folder.newest() if self._writer and self._task.trainer.resume else None
        if found is None:
            return 0
        best, optimizer, random = (_named(found.state, prefix) for prefix in (BEST, OPTIMIZER, RANDOM))
        self._engine.restore(found.weights, optimizer, found.progress["optimizer"])
        self._engine.restore_random_state(random)
        self._at, self._kept = Progress(**found.progress["fit"]), best
        return found.step


def _cut(rows: IntArray, size: int) -> list[IntArray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _named(tensors: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@contextmanager
def reproducible(seed: int, threads: int) -> Iterator[None]:
    """Fixed random numbers and thread count inside, the caller's untouched afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)

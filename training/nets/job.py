"""The job of every family of nets: rows or windows of rows, gathered batch by batch, early stopping on validation loss.

No window crosses a session boundary, the scaler sees the training rows only, and the windows never exist all at once.
Letters: N rows of the table, n windows, T steps, F features.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from models.net import Net
from models.registry import NETS
from tickserve.config import NetSettings, TrainerSettings
from tickserve.errors import InsufficientDataError
from tickserve.manifest import Family, NanPolicy, TensorSpec, Tolerance
from training.examples import Examples, IntArray, LabelledFold, Rows, evenly
from training.job import Fit, Watch
from training.nets.task import Task
from training.nets.trainer import PREDICT_ROWS, Learned, learn, reproducible
from training.nets.windows import scaler, view

# Validation only has to rank epochs: a quarter of the training cap is enough.
VALIDATION_SHARE = 4


class NetJob:
    """Trains the net of one family on rows, or on windows that end at a row (T is 1 where the family reads a row)."""

    model_file = "model.safetensors"
    nan_policy: NanPolicy = "impute_mean"
    tolerance = Tolerance(atol=1e-5, rtol=1e-4)

    def __init__(
        self,
        family: Family,
        examples: Examples,
        settings: NetSettings,
        seed: int,
        trainer: TrainerSettings = TrainerSettings(),  # noqa: B008 - frozen
    ) -> None:
        self.family, self.examples, self.settings, self.seed = family, examples, settings, seed
        self.trainer = trainer
        self.watch: Watch | None = None
        self.window = int(getattr(settings, "window", 1))
        if len(examples.features) < self.window:
            raise self._too_short(len(examples.features))
        self._windows = view(examples.features, self.window)

    @property
    def tensor(self) -> TensorSpec:
        """`features` FP32 (F,), or `window` FP32 (T, F), oldest row first."""
        features = self.examples.features.shape[1]
        if "window" in NETS[self.family].sizes:
            return TensorSpec(name="window", dtype="FP32", shape=(self.window, features))
        return TensorSpec(name="features", dtype="FP32", shape=(features,))

    def eligible(self, rows: IntArray) -> IntArray:
        """Rows whose window lies in their own session."""
        first = rows - (self.window - 1)
        session = self.examples.session
        kept: IntArray = rows[(first >= 0) & (session[np.maximum(first, 0)] == session[rows])]
        return kept

    def inputs(self, rows: IntArray) -> Rows:
        """Rows [n, F], or windows [n, T, F] that end at `rows`, copied."""
        taken = np.ascontiguousarray(self._windows[rows - (self.window - 1)])
        return taken.reshape(len(rows), *self.tensor.shape)

    def fit(self, fold: LabelledFold) -> Fit:
        """Adam on cross-entropy; the weights of the epoch with the lowest validation loss are kept.

        Raises InsufficientDataError when no session is as long as the window, ConfigError and ComponentError for
        options of [trainer] that have no effect here, and ComponentError for a checkpoint that cannot be written.
        """
        task = self.task(fold)
        learned = self._learn(task)
        with reproducible(self.seed, self.settings.threads):
            net = NETS[self.family].from_architecture(task.architecture)
        net.load_state_dict(learned.weights)
        return Fit(net.eval(), learned.best, len(task.train), resumed_at=learned.resumed_at)

    def task(self, fold: LabelledFold) -> Task:
        """What a fold's fit is about. Raises InsufficientDataError."""
        cap = self.settings.max_train_windows
        mean, std = scaler(self.examples.features, fold.rows.train)
        return Task(
            name=f"{self.family}-fold-{fold.number}",
            architecture=NETS[self.family].declared(self.settings, self.examples.columns),
            features=self.examples.features,
            classes=self._classes(fold),
            train=evenly(self._some(fold.rows.train), cap),
            validation=evenly(self._some(fold.rows.validation), math.ceil(cap / VALIDATION_SHARE)),
            mean=mean,
            std=std,
            settings=self.settings,
            trainer=self.trainer,
            seed=self.seed,
            window=self.window,
        )

    def _classes(self, fold: LabelledFold) -> npt.NDArray[np.int8]:
        """Class of every training and validation row; -1, which no loss takes, of the others. [N]"""
        classes = np.full(len(self.examples.ret), -1, dtype=np.int8)
        for rows in (fold.rows.train, fold.rows.validation):
            classes[rows] = self.examples.classes(rows, fold.threshold)
        return classes

    def _learn(self, task: Task) -> Learned:
        if self.trainer.processes == 1:
            return learn(task, self.watch)
        from training.nets.distributed import learn_together

        return learn_together(task, self.watch)

    def _some(self, rows: IntArray) -> IntArray:
        kept = self.eligible(rows)
        if not len(kept):
            raise self._too_short(len(rows))
        return kept

    def _too_short(self, rows: int) -> InsufficientDataError:
        return InsufficientDataError(
            "no session is as long as the window",
            field=f"{self.family}.window",
            expected=f"sessions of at least {self.window} rows",
            was=f"shorter ones in {rows} rows",
            hint=f"use a shorter {self.family}.window or a longer recording",
        )

    def predict(self, fit: Fit, rows: IntArray) -> Rows:
        """Probabilities [n, 3] of table `rows`."""
        parts = [self.score(fit, self.inputs(rows[at : at + PREDICT_ROWS])) for at in range(0, len(rows), PREDICT_ROWS)]
        return np.concatenate(parts) if parts else np.zeros((0, 3), dtype=np.float32)

    def score(self, fit: Fit, inputs: Rows) -> Rows:
        """Probabilities [n, 3] of model inputs."""
        with reproducible(self.seed, self.settings.threads), torch.inference_mode():
            answer: Rows = fit.model(torch.from_numpy(np.ascontiguousarray(inputs))).numpy()
        return answer

    def save(self, fit: Fit, path: Path) -> None:
        """Write `.safetensors`."""
        save_file({name: tensor.contiguous() for name, tensor in fit.model.state_dict().items()}, path)

    def architecture(self, fit: Fit) -> dict[str, Any]:
        """Sizes of the net, and that its steps are `stride` events apart."""
        net: Net = fit.model
        return net.architecture() | {"stride": self.examples.stride}

    def importance(self, fit: Fit, columns: tuple[str, ...]) -> list[dict[str, Any]]:
        """A net does not say."""
        return []

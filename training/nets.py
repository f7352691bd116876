"""The job of every family of nets: rows or windows of rows, gathered batch by batch, early stopping on validation loss.

No window crosses a session boundary, the scaler sees the training rows only, and the windows never exist all at once.
Letters: N rows of the table, n windows, T steps, F features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from models.net import Net
from models.registry import NETS
from tickserve.config import NetSettings
from tickserve.errors import InsufficientDataError
from tickserve.manifest import Family, NanPolicy, TensorSpec, Tolerance
from training.baselines import column_scale
from training.examples import Examples, IntArray, LabelledFold, Rows, evenly
from training.job import Fit, Watch

PREDICT_ROWS = 2_048
# Validation only has to rank epochs: a quarter of the training cap is enough.
VALIDATION_SHARE = 4


class NetJob:
    """Trains the net of one family on rows, or on windows that end at a row (T is 1 where the family reads a row)."""

    model_file = "model.safetensors"
    nan_policy: NanPolicy = "impute_mean"
    tolerance = Tolerance(atol=1e-5, rtol=1e-4)

    def __init__(self, family: Family, examples: Examples, settings: NetSettings, seed: int) -> None:
        self.family, self.examples, self.settings, self.seed = family, examples, settings, seed
        self.watch: Watch | None = None
        self.window = int(getattr(settings, "window", 1))
        if len(examples.features) < self.window:
            raise self._too_short(len(examples.features))
        windows = np.lib.stride_tricks.sliding_window_view(examples.features, self.window, axis=0)
        self._windows = windows.swapaxes(1, 2)  # a view [N - T + 1, T, F]

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

        Raises InsufficientDataError when no session is as long as the window.
        """
        cap = self.settings.max_train_windows
        train = evenly(self._some(fold.rows.train), cap)
        validation = evenly(self._some(fold.rows.validation), math.ceil(cap / VALIDATION_SHARE))
        with reproducible(self.seed, self.settings.threads):
            net = self._new_net(fold)
            best = self._learn(net, train, validation, fold)
        return Fit(net.eval(), best, len(train))

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

    def _new_net(self, fold: LabelledFold) -> Net:
        declared = NETS[self.family].declared(self.settings, self.examples.columns)
        net = NETS[self.family].from_architecture(declared)
        mean, std = column_scale(self.examples.features[fold.rows.train].astype(np.float64))
        net.set_scaler(torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(std.astype(np.float32)))
        return net

    def _learn(self, net: Net, train: IntArray, validation: IntArray, fold: LabelledFold) -> int:
        optimizer = torch.optim.Adam(net.parameters(), lr=self.settings.learning_rate)
        lowest, best, kept = math.inf, 0, copy.deepcopy(net.state_dict())
        for epoch in range(1, self.settings.epochs + 1):
            self._epoch(net, optimizer, train, fold)
            loss = self._validation_loss(net, validation, fold)
            if self.watch:
                self.watch(epoch, loss)
            if loss < lowest:
                lowest, best, kept = loss, epoch, copy.deepcopy(net.state_dict())
            elif epoch - best >= self.settings.patience:
                break
        net.load_state_dict(kept)
        return best

    def _epoch(self, net: Net, optimizer: torch.optim.Optimizer, rows: IntArray, fold: LabelledFold) -> None:
        net.train()
        order = torch.randperm(len(rows)).numpy()
        for windows, classes in self._batches(rows[order], fold, self.settings.batch_rows):
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(net.logits(windows), classes)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()

    def _validation_loss(self, net: Net, rows: IntArray, fold: LabelledFold) -> float:
        net.eval()
        total = 0.0
        with torch.inference_mode():
            for windows, classes in self._batches(rows, fold, PREDICT_ROWS):
                total += float(nn.functional.cross_entropy(net.logits(windows), classes, reduction="sum"))
        return total / len(rows)

    def _batches(self, rows: IntArray, fold: LabelledFold, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            classes = self.examples.classes(chosen, fold.threshold)
            yield torch.from_numpy(self.inputs(chosen)), torch.from_numpy(classes)

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


@contextmanager
def reproducible(seed: int, threads: int) -> Iterator[None]:
    """Fixed random numbers and thread count inside, the caller's untouched afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)

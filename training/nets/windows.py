"""Windows of rows as views of the table, gathered batch by batch in an order that no number of workers changes.

The table may be a file that is mapped into memory: only the rows of a batch are read. Windows never exist all at once.
Letters: N rows of the table, n windows of a batch, T steps, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tickserve.config import TrainerSettings
from training.examples import CHUNK_ROWS, FloatArray, IntArray, Rows


class Batch(NamedTuple):
    """`rows` float32 [n, F] or [n, T, F] with `classes` int64 [n]."""

    rows: torch.Tensor
    classes: torch.Tensor


def view(features: Rows, window: int) -> Rows:
    """Every window [N - T + 1, T, F] of `features` [N, F], oldest row first, without a copy."""
    windows: Rows = np.lib.stride_tricks.sliding_window_view(features, window, axis=0).swapaxes(1, 2)
    return windows


def scaler(features: Rows, rows: IntArray) -> tuple[Rows, Rows]:
    """Mean and standard deviation float32 [F] of the finite values of `rows`, in bounded memory.

    As `training.baselines.column_scale`, which takes the whole matrix at once.
    """
    parts = np.array_split(rows, max(1, -(-len(rows) // CHUNK_ROWS)))
    count = np.maximum(sum(np.isfinite(features[part]).sum(axis=0) for part in parts), 1)
    mean = sum((_finite(features[part], 0.0).sum(axis=0) for part in parts), start=np.zeros(features.shape[1])) / count
    square = sum(((_finite(features[part], mean) ** 2).sum(axis=0) for part in parts), start=np.zeros(len(mean)))
    std = np.sqrt(square / count)
    # Below float32's resolution of the mean, spread is rounding: such a column is constant.
    std = np.where(std > np.maximum(1e-6 * np.abs(mean), 1e-12), std, 1.0)
    return mean.astype(np.float32), std.astype(np.float32)


def _finite(part: Rows, mean: FloatArray | float) -> FloatArray:
    """Deviations float64 from `mean`, 0 where a value is missing."""
    return np.where(np.isfinite(part), part.astype(np.float64) - mean, 0.0)


class WindowSet(Dataset[Batch]):
    """Batches of windows that end at given rows: `set[rows]` gathers them from the view."""

    def __init__(self, features: Rows, classes: npt.NDArray[np.int8], window: int, shape: tuple[int, ...]) -> None:
        self.classes, self.window, self.shape = classes, window, shape
        self._windows = view(features, window)

    def __getitem__(self, rows: IntArray) -> Batch:
        taken = np.ascontiguousarray(self._windows[rows - (self.window - 1)]).reshape(len(rows), *self.shape)
        return Batch(torch.from_numpy(taken), torch.from_numpy(self.classes[rows].astype(np.int64)))


class _Order(Sampler[IntArray]):
    """The rows of each batch of the pass that comes next."""

    def __init__(self) -> None:
        self.batches: Sequence[IntArray] = ()

    def __iter__(self) -> Iterator[IntArray]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Loader:
    """Batches in the order that is asked for, gathered here or by worker processes that live as long as the loader.

    A context: its workers end with it.
    """

    def __init__(self, windows: WindowSet, settings: TrainerSettings) -> None:
        self._windows, self._settings, self._order = windows, settings, _Order()
        self._loader: Any = self._with_workers() if settings.loader_workers else None

    def _with_workers(self) -> Any:
        settings = self._settings
        return DataLoader(
            self._windows,
            sampler=self._order,
            batch_size=None,
            num_workers=settings.loader_workers,
            prefetch_factor=settings.prefetch or None,
            pin_memory=settings.pin_memory,
            persistent_workers=True,
            # A worker that is spawned would be sent a copy of every window; a forked one reads the table's pages.
            multiprocessing_context="fork",
            # The loader draws a seed for its workers: not from the numbers that dropout draws from.
            generator=torch.Generator(),
        )

    def batches(self, order: Sequence[IntArray]) -> Iterator[Batch]:
        """The windows that end at the rows of each entry of `order`."""
        if self._loader is None:
            for rows in order:
                batch = self._windows[rows]
                yield Batch(*(each.pin_memory() for each in batch)) if self._settings.pin_memory else batch
            return
        self._order.batches = order
        for batch in self._loader:
            yield Batch(*batch)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        # A loader that is dropped ends its workers, and waits for them.
        self._loader = None


def shared(features: Rows) -> Rows:
    """A copy of `features` in shared memory, which worker processes read without one of their own."""
    place: Any = torch.from_numpy(features).clone()
    moved: Rows = place.share_memory_().numpy()
    return moved

"""Feature rows as XGBoost's binned matrices: no copy of the floats, and the bins in memory or in files.

A `QuantileDMatrix` holds bin numbers instead of floats; a validation matrix takes its bins from the training matrix
(`ref`). Rows that are no plain slice of the table are handed over in chunks, so that they never exist twice. With
external memory the bins too are in files, in a folder that is gone afterwards, whatever happens. Letters: n rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tickserve.config import GbdtSettings
from training.examples import Examples, IntArray, Rows
from training.gbdt.objective import Objective

CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class Source:
    """Increasing table `rows` [n] of a table, `columns` of them (None: all), with what they are to teach."""

    examples: Examples
    rows: IntArray
    objective: Objective
    columns: IntArray | None = None

    def taken(self, start: int, stop: int) -> Rows:
        """Features of a part of the rows; a view where they are a slice of the table."""
        return take(self.examples.features, self.rows[start:stop], self.columns)

    def described(self, start: int, stop: int) -> dict[str, Any]:
        """Labels of a part of the rows, and their groups where they have any."""
        rows, group = self.rows[start:stop], self.objective.group
        described = {"label": self.objective.target(rows).astype(np.float32)}
        return described if group is None else described | {"qid": group(self.rows)[start:stop]}

    def is_slice(self) -> bool:
        """Whether the rows, with all columns, lie in the table as they are."""
        return self.columns is None and _consecutive(self.rows)

    def edges(self, size: int) -> list[int]:
        """Where chunks of about `size` rows begin and end; no group is cut in two."""
        cuts = list(range(0, len(self.rows), size))
        if self.objective.group is not None:
            starts = np.flatnonzero(np.diff(self.objective.group(self.rows), prepend=-1))
            cuts = sorted({int(starts[np.searchsorted(starts, cut, side="right") - 1]) for cut in cuts})
        return [*cuts, len(self.rows)]


def take(features: Rows, rows: IntArray, columns: IntArray | None = None) -> Rows:
    """Feature rows [n, F]; a view where `rows` follow each other and no columns are chosen."""
    chosen = features[rows[0] : rows[-1] + 1] if _consecutive(rows) else features[rows]
    return chosen if columns is None else chosen[:, columns]


def _consecutive(rows: IntArray) -> bool:
    return bool(len(rows)) and rows[-1] - rows[0] + 1 == len(rows)


@contextmanager
def matrices(settings: GbdtSettings) -> Iterator[Callable[[Source, Any], Any]]:
    """Makes a matrix of a source, with the bins of a reference matrix where one is given; frees all it made."""
    made: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="tickserve-gbdt-") as folder:

        def make(source: Source, reference: Any = None) -> Any:
            prefix = str(Path(folder) / str(len(made))) if settings.external_memory else None
            made.append(_matrix(source, reference, settings, prefix))
            return made[-1]

        try:
            yield make
        finally:
            for matrix in made:
                # A traceback may hold it longer, and its files have to go before their folder does.
                matrix.__del__()


def _matrix(source: Source, reference: Any, settings: GbdtSettings, prefix: str | None) -> Any:
    import xgboost

    options = {"missing": np.nan, "max_bin": settings.max_bin, "ref": reference, "nthread": settings.threads}
    if prefix is not None:
        chunks = _chunks(source, settings.external_memory_chunk_rows, prefix)
        return xgboost.ExtMemQuantileDMatrix(chunks, **options)
    if source.is_slice():
        n = len(source.rows)
        return xgboost.QuantileDMatrix(source.taken(0, n), **source.described(0, n), **options)
    return xgboost.QuantileDMatrix(_chunks(source, CHUNK_ROWS, None), **options)


def _chunks(source: Source, size: int, prefix: str | None) -> Any:
    """XGBoost's iterator over a source; it goes over it more than once."""
    import xgboost

    edges = source.edges(size)

    class Chunks(xgboost.DataIter):
        def __init__(self) -> None:
            self.at = 0
            super().__init__(cache_prefix=prefix)

        def next(self, input_data: Callable[..., None]) -> bool:
            if self.at + 1 >= len(edges):
                return False
            start, stop = edges[self.at], edges[self.at + 1]
            input_data(data=source.taken(start, stop), **source.described(start, stop))
            self.at += 1
            return True

        def reset(self) -> None:
            self.at = 0

    return Chunks()

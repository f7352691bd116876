"""A feature set's matrix as one file that is mapped into memory, so that a table larger than memory can be trained on.

Parquet has to be decoded whole before a row of it can be read; this file is written once from it, chunk by chunk, lies
beside the parts, and is used while its digest and the set's are the ones it was written with. Of a mapped table the
narrow columns alone (28 bytes a row) are in memory. Letters: N rows, F features.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from market.feature_store import AGAIN, ROW_COLUMNS, FeatureSet, FeatureTable
from tickserve.errors import ArtifactError
from tickserve.store import sha256_file, staged_directory, write_json_atomic

if TYPE_CHECKING:
    from tickserve.config import TrainerSettings

FORMAT: Final = 1
FOLDER: Final = ".matrix"
MATRIX, META = "features.npy", "matrix.json"
CHUNK_ROWS: Final = 65_536
MB: Final = 1024**2

Matrix = npt.NDArray[np.float32]


def load_table(feature_set: FeatureSet, settings: TrainerSettings) -> FeatureTable:
    """The table of a feature set: mapped where `trainer.memmap` or its size says so, else read into memory.

    Raises as `mapped_table` and `FeatureSet.load`.
    """
    size_mb = feature_set.rows * len(feature_set.meta["columns"]) * 4 / MB
    large = bool(settings.memmap_above_mb) and size_mb > settings.memmap_above_mb
    return mapped_table(feature_set) if settings.memmap or large else feature_set.load()


def mapped_table(feature_set: FeatureSet) -> FeatureTable:
    """The table with its features read-only in a mapped file; infinite values are NaN there, as training takes them.

    Raises ArtifactError when a part of the set cannot be read, ComponentError when the file cannot be written.
    """
    features = _open(feature_set)
    if features is None:
        _write(feature_set)
        features = _open(feature_set)
    if features is None:
        raise ArtifactError("not what was written", field=f"{FOLDER}/{MATRIX}", hint="is the disk sound?")
    narrow = _narrow(feature_set)
    return FeatureTable(
        features=features,
        stride=feature_set.meta["stride"],
        events_read=feature_set.meta["events_read"],
        quality=feature_set.meta["quality"],
        **narrow,
    )


def _shape(feature_set: FeatureSet) -> tuple[int, int]:
    return feature_set.rows, len(feature_set.meta["columns"])


def _open(feature_set: FeatureSet) -> Matrix | None:
    """The mapped matrix; None where there is none, or one of another set, or one whose bytes changed."""
    folder = feature_set.folder / FOLDER
    try:
        said = json.loads((folder / META).read_text("utf-8"))
        if said.get("format") != FORMAT or said.get("set") != feature_set.meta["digest"]:
            return None
        if said.get("sha256") != sha256_file(folder / MATRIX):
            return None
        features: Matrix = np.load(folder / MATRIX, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, AttributeError):
        return None
    return features if features.shape == _shape(feature_set) and features.dtype == np.float32 else None


def _write(feature_set: FeatureSet) -> None:
    with staged_directory(feature_set.folder / FOLDER, replace=True) as staging:
        path = staging / MATRIX
        matrix = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=_shape(feature_set))  # type: ignore[no-untyped-call]
        start = 0
        for name in feature_set.meta["parts"]:
            start = _copy_part(feature_set.folder / name, tuple(feature_set.meta["columns"]), matrix, start)
        matrix.flush()
        digest = sha256_file(path)
        said = {"format": FORMAT, "set": feature_set.meta["digest"], "sha256": digest, "rows": start}
        write_json_atomic(staging / META, said)


def _copy_part(path: Path, columns: tuple[str, ...], matrix: Matrix, start: int) -> int:
    """Copy one part into `matrix` from row `start`; the row after its last."""
    try:
        for batch in pq.ParquetFile(path).iter_batches(CHUNK_ROWS, columns=list(columns)):
            if tuple(batch.schema.names) != columns or start + len(batch) > len(matrix):
                raise ArtifactError("other columns or rows than features.json says", field=path.name)
            rows = np.stack([batch[name].to_numpy() for name in columns], axis=1)
            matrix[start : start + len(batch)] = np.where(np.isinf(rows), np.float32(np.nan), rows)
            start += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError("cannot be read", field=path.name, hint=AGAIN) from error
    return start


def _narrow(feature_set: FeatureSet) -> dict[str, Any]:
    """Times, sessions, mids and half spreads [N]."""
    parts = []
    for name in feature_set.meta["parts"]:
        try:
            parts.append(pq.ParquetFile(feature_set.folder / name).read(columns=list(ROW_COLUMNS)))
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError("cannot be read", field=Path(name).name, hint=AGAIN) from error
    return {name: np.concatenate([part[name].to_numpy() for part in parts]) for name in ROW_COLUMNS}

"""Parquet in: opened with typed errors, columns checked, and read in bounded batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tickserve.errors import CorruptFileError, EmptyDataError, SchemaError

Arrays = dict[str, npt.NDArray[np.generic]]


def open_parquet(path: Path) -> pq.ParquetFile:
    """The file, its footer read. Raises CorruptFileError for a truncated or foreign file, EmptyDataError if empty."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise CorruptFileError(f"{path.name}: broken Parquet: {_first_line(error)}") from error
    if not file.metadata.num_rows:
        raise EmptyDataError(f"{path.name}: no rows")
    return file


def record_batches(
    file: pq.ParquetFile, columns: tuple[str, ...], path: Path, rows: int, kinds: Mapping[str, str]
) -> Iterator[Arrays]:
    """The named columns, at most `rows` at a time: int64 where `kinds` says "integer", else float64 (null is NaN).

    Raises SchemaError for a column of another type and CorruptFileError for broken pages.
    """
    for column in columns:
        kind = file.schema_arrow.field(column).type
        integer = kinds.get(column) == "integer"
        if not (pa.types.is_integer(kind) or (not integer and pa.types.is_floating(kind))):
            expected = "an integer column" if integer else "a numeric column"
            raise SchemaError(f"{path.name}: column {column!r}", field=column, expected=expected, was=str(kind))
    try:
        for batch in file.iter_batches(batch_size=rows, columns=list(columns)):
            yield {column: _array(batch.column(column), column, path, kinds) for column in columns}
    except (pa.ArrowException, OSError) as error:
        raise CorruptFileError(f"{path.name}: broken Parquet: {_first_line(error)}") from error


def _array(values: pa.Array, column: str, path: Path, kinds: Mapping[str, str]) -> npt.NDArray[np.generic]:
    if kinds.get(column) == "integer":
        if values.null_count:
            raise SchemaError(
                f"{path.name}: column {column!r}",
                field=column,
                expected="a time in every row",
                was=f"{values.null_count} empty",
            )
        return np.asarray(values.cast(pa.int64()).to_numpy(zero_copy_only=False))
    return np.asarray(values.cast(pa.float64()).to_numpy(zero_copy_only=False))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

"""CSV text to typed columns, headerless or not, with errors that name the row, the column and what was found there."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from tickserve.errors import CorruptFileError, EmptyDataError, SchemaError

Column = type[pl.Int64] | type[pl.Float64] | type[pl.String]
_EXPECTED = {pl.Int64: "an integer", pl.Float64: "a number", pl.String: "text"}


def parse_csv(data: bytes, columns: Mapping[str, Column], name: str, first_row: int = 1) -> pl.DataFrame:
    """Rows of headerless CSV as a frame of exactly `columns`; CRLF and a missing last newline are fine.

    `first_row` is the number of the first line in the file, for messages. Raises SchemaError naming row and column
    for a missing or extra field or a value of the wrong type, EmptyDataError for no rows.
    """
    if not data.strip():
        raise EmptyDataError(f"{name}: no rows")
    try:
        frame = pl.read_csv(data, has_header=False, schema=dict(columns), quote_char=None)
    except pl.exceptions.PolarsError as error:
        raise _first_fault(data, columns, name, first_row) or SchemaError(f"{name}: {error}") from error
    required = [column for column, kind in columns.items() if kind is not pl.String]
    if any(frame[column].null_count() for column in required):
        fault = _first_fault(data, columns, name, first_row)
        if fault is not None:
            raise fault
    return frame


def _first_fault(data: bytes, columns: Mapping[str, Column], name: str, first_row: int) -> SchemaError | None:
    """The first wrong field, found slowly: only used once it is known that something is wrong."""
    for row, line in enumerate(data.decode("utf-8", "replace").splitlines(), first_row):
        fields = line.split(",")
        if len(fields) != len(columns):
            names = ", ".join(columns)
            return SchemaError(
                f"{name}: row {row}", expected=f"{len(columns)} fields ({names})", was=f"{len(fields)}: {line[:60]!r}"
            )
        for text, (column, kind) in zip(fields, columns.items(), strict=True):
            if not _parses(text, kind):
                return SchemaError(
                    f"{name}: row {row}, column {column!r}", field=column, expected=_EXPECTED[kind], was=repr(text[:40])
                )
    return None


def _parses(text: str, kind: Column) -> bool:
    try:
        _ = int(text) if kind is pl.Int64 else float(text) if kind is pl.Float64 else text
    except ValueError:
        return False
    return True


def parse_header(line: bytes, required: tuple[str, ...], name: str) -> list[str]:
    """Column names of a CSV header. Raises SchemaError for a missing, renamed or repeated column."""
    try:
        columns = [column.strip() for column in line.decode().strip().split(",")]
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{name}: the header is not UTF-8 text") from error
    check_columns(columns, required, name)
    return columns


def check_columns(columns: list[str], required: tuple[str, ...], name: str) -> None:
    """Raises SchemaError naming the first column that is missing or repeated."""
    expected, was = f"columns {', '.join(required)}", ", ".join(columns)[:200]
    for column in columns:
        if columns.count(column) > 1:
            raise SchemaError(f"{name}: repeated column {column!r}", field=column, expected=expected, was=was)
    for column in required:
        if column not in columns:
            raise SchemaError(f"{name}: missing column {column!r}", field=column, expected=expected, was=was)

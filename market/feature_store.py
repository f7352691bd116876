"""The feature set on disk: zstd Parquet partitioned by symbol and date, and `features.json` that describes it.

A set is written once, as a whole, and names the digest of each of its parts; what cannot be verified is not used.
Letters: N kept rows, F features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tickserve.errors import ArtifactError, DigestMismatchError
from tickserve.events import Kind
from tickserve.features.spec import FeatureSpec
from tickserve.store import sha256_file

META_NAME: Final = "features.json"
FORMAT: Final = 1
# Leading columns of every part, before the features.
ROW_COLUMNS: Final = ("ts_ns", "session", "mid", "half_spread")
# A part per UTC day for order books; per year for bars, whose days hold too few rows for a file of their own.
PARTITIONS: Final[dict[str, str]] = {"book": "D", "bars": "Y"}


@dataclass(frozen=True)
class FeatureTable:
    """Kept rows in time order.

    `ts_ns` int64 [N]; `features` float32 [N, F]; `mid` float64 [N] (bars: the close; NaN where there is none);
    `half_spread` float64 [N], relative to the mid (bars: NaN); `session` int32 [N], which counts sessions of the
    data from 0. Every `stride`-th event after warm-up of `events_read` was kept.
    """

    ts_ns: npt.NDArray[np.int64]
    features: npt.NDArray[np.float32]
    mid: npt.NDArray[np.float64]
    half_spread: npt.NDArray[np.float64]
    session: npt.NDArray[np.int32]
    stride: int
    events_read: int
    quality: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ts_ns)


@dataclass(frozen=True)
class FeatureSet:
    """A feature set in `folder`, described by `meta` (the content of features.json).

    `reused` is true where it was found rather than built.
    """

    folder: Path
    meta: dict[str, Any]
    reused: bool

    @property
    def symbol(self) -> str:
        """The source's symbol, safe as a file name."""
        return cast(str, self.meta["symbol"])

    @property
    def kind(self) -> Kind:
        """Rows of an order book, or bars."""
        return cast(Kind, self.meta["kind"])

    @property
    def simulated(self) -> bool:
        """Whether no market produced these data."""
        return cast(bool, self.meta["simulated"])

    @property
    def source_digests(self) -> dict[str, str]:
        """`sha256:...` of every source file, by its name."""
        return cast(dict[str, str], self.meta["source_digests"])

    @property
    def spec(self) -> FeatureSpec:
        """The spec the columns were computed with."""
        return FeatureSpec.from_json(self.meta["spec"])

    @property
    def rows(self) -> int:
        """Rows kept, N."""
        return cast(int, self.meta["rows"])

    def load(self) -> FeatureTable:
        """Read all parts. Raises ArtifactError when a part cannot be read or has other columns or rows."""
        columns = tuple(self.meta["columns"])
        table = FeatureTable(
            ts_ns=np.empty(self.rows, np.int64),
            features=np.empty((self.rows, len(columns)), np.float32),
            mid=np.empty(self.rows, np.float64),
            half_spread=np.empty(self.rows, np.float64),
            session=np.empty(self.rows, np.int32),
            stride=self.meta["stride"],
            events_read=self.meta["events_read"],
            quality=self.meta["quality"],
        )
        start = 0
        for name in self.meta["parts"]:
            start += _read_part(self.folder / name, columns, table, start)
        if start != self.rows:
            raise ArtifactError("wrong number of rows", field=META_NAME, expected=str(self.rows), was=str(start))
        return table


def open_feature_set(folder: Path, *, reused: bool = True) -> FeatureSet:
    """The feature set in `folder`, every part verified against its digest.

    Raises ArtifactError when features.json is missing or not one, or a part is missing, and DigestMismatchError when
    a part's bytes changed.
    """
    meta = _read_meta(folder)
    for name, part in meta["parts"].items():
        path = folder / name
        if ".." in Path(name).parts or not path.is_file():
            raise ArtifactError("a part is missing", field=name, hint="build the feature set again")
        if sha256_file(path) != part["sha256"]:
            raise DigestMismatchError("the bytes changed", field=name, hint="build the feature set again")
    return FeatureSet(folder, meta, reused)


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META_NAME
    try:
        meta = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError("not a feature set", field=META_NAME, hint="tickserve features build") from error
    needed = {"format", "parts", "columns", "rows", "spec", "stride", "events_read", "quality", "symbol", "kind"}
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or not needed <= set(meta):
        raise ArtifactError("another format", field=META_NAME, expected=f"format {FORMAT}", was=str(meta)[:40])
    return meta


def _read_part(path: Path, columns: tuple[str, ...], table: FeatureTable, start: int) -> int:
    """Copy one part into `table` from row `start`; returns its rows."""
    try:
        part = pq.ParquetFile(path).read()  # not read_table, which adds columns for the folders' names
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError("cannot be read", field=path.name, hint="build the feature set again") from error
    if tuple(part.column_names) != ROW_COLUMNS + columns or start + len(part) > len(table):
        raise ArtifactError("other columns or rows than features.json says", field=path.name)
    rows = slice(start, start + len(part))
    for name in ROW_COLUMNS:
        getattr(table, name)[rows] = part[name].to_numpy()
    for index, name in enumerate(columns):
        table.features[rows, index] = part[name].to_numpy()
    return len(part)


@dataclass(frozen=True)
class Rows:
    """Rows on their way to disk; `features` is [F, N], each column contiguous, as Parquet stores it."""

    ts_ns: npt.NDArray[np.int64]
    session: npt.NDArray[np.int32]
    mid: npt.NDArray[np.float64]
    half_spread: npt.NDArray[np.float64]
    features: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ts_ns)

    def take(self, which: npt.NDArray[np.intp] | slice) -> Rows:
        """Some of the rows."""
        return Rows(
            ts_ns=self.ts_ns[which],
            session=self.session[which],
            mid=self.mid[which],
            half_spread=self.half_spread[which],
            features=np.ascontiguousarray(self.features[:, which]),
        )


class PartWriter:
    """Writes rows in time order as `symbol=.../date=.../part-0.parquet` below `folder`, one open file at a time."""

    def __init__(self, folder: Path, symbol: str, kind: Kind, columns: tuple[str, ...]) -> None:
        types = dict(zip(ROW_COLUMNS, (pa.int64(), pa.int32(), pa.float64(), pa.float64()), strict=True))
        self._schema = pa.schema([*types.items(), *((name, pa.float32()) for name in columns)])
        self._folder, self._symbol, self._unit = folder, symbol, PARTITIONS[kind]
        self._writer: Any = None
        self._open = ""
        self._rows: dict[str, int] = {}

    def write(self, rows: Rows) -> None:
        """Append rows, each to the file of its date."""
        dates = rows.ts_ns.astype("datetime64[ns]").astype(f"datetime64[{self._unit}]")
        edges = np.flatnonzero(dates[1:] != dates[:-1]) + 1
        for start, stop in zip([0, *edges], [*edges, len(rows)], strict=True):
            if stop > start:
                self._write_part(str(dates[start]), rows.take(slice(start, stop)))

    def _write_part(self, date: str, rows: Rows) -> None:
        name = f"symbol={self._symbol}/date={date}/part-0.parquet"
        if name != self._open:
            self._close_part()
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._folder / name, self._schema, compression="zstd")
            self._open = name
        arrays = [getattr(rows, column) for column in ROW_COLUMNS] + list(rows.features)
        self._writer.write_table(pa.table([pa.array(array) for array in arrays], schema=self._schema))
        self._rows[name] = self._rows.get(name, 0) + len(rows)

    def _close_part(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> dict[str, dict[str, Any]]:
        """Finish; for every part its rows and the digest of its bytes."""
        self._close_part()
        return {name: {"rows": n, "sha256": sha256_file(self._folder / name)} for name, n in self._rows.items()}

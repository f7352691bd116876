"""The feature set on disk: zstd Parquet partitioned by symbol and date, and `features.json` that describes it.

A set is written once, as a whole, and names the digest of each of its parts and of its own description; what cannot be
verified is not used.
Letters: N kept rows, F features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tickserve.errors import ArtifactError, DigestMismatchError, UsageError
from tickserve.events import Kind
from tickserve.features.spec import FeatureSpec
from tickserve.store import canonical_json, sha256_bytes, sha256_file

META_NAME: Final = "features.json"
FORMAT: Final = 2
AGAIN: Final = "build the feature set again"
# What features.json must hold, exactly of these types.
META_TYPES: Final[dict[str, type]] = {
    "digest": str, "key": str, "code": str, "spec_digest": str, "source_digests": dict, "symbol": str, "venue": str,
    "kind": str, "levels": int, "simulated": bool, "files": list, "spec": dict, "columns": list, "stride": int,
    "events_read": int, "events_warm": int, "sessions": int, "rows": int, "parts": dict, "quality": dict,
    "max_rows": int, "ignored_files": int,
}  # fmt: skip
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

    `reused` is true where it was found rather than built. `took` is what building or finding it took (the figures of a
    `tickserve.meter.Stage`), where that was measured.
    """

    folder: Path
    meta: dict[str, Any]
    reused: bool
    took: dict[str, float | None] | None = None

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


def meta_digest(meta: Mapping[str, Any]) -> str:
    """`sha256:...` of a description without its own digest. Raises ValueError for what JSON cannot carry."""
    return sha256_bytes(canonical_json({name: value for name, value in meta.items() if name != "digest"}))


def open_feature_set(folder: Path, *, reused: bool = True) -> FeatureSet:
    """The feature set in `folder`: its description and every part verified against their digests.

    Raises ArtifactError when features.json is missing or not one, or a part is missing or cannot be read, and
    DigestMismatchError when the description or a part's bytes changed.
    """
    meta = _read_meta(folder)
    for name, part in meta["parts"].items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
            raise ArtifactError("a part is missing", field=name, hint=AGAIN)
        try:
            digest = sha256_file(path)
        except OSError as error:
            raise ArtifactError("a part cannot be read", field=name, hint=AGAIN) from error
        if digest != part["sha256"]:
            raise DigestMismatchError("the bytes changed", field=name, hint=AGAIN)
    return FeatureSet(folder, meta, reused)


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META_NAME
    try:
        meta = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError("not a feature set", field=META_NAME, hint="tickserve features build") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ArtifactError("another format", field=META_NAME, expected=f"format {FORMAT}", was=str(meta)[:40])
    _check_meta(meta)
    return meta


def _check_meta(meta: dict[str, Any]) -> None:
    """Types first, so that nothing below meets a surprise; then the digest; then what must agree."""
    for name, kind in META_TYPES.items():
        if type(meta.get(name)) is not kind:
            was = type(meta.get(name)).__name__
            raise ArtifactError("wrong type", field=f"{META_NAME}: {name}", expected=kind.__name__, was=was, hint=AGAIN)
    try:
        digest = meta_digest(meta)
    except (ValueError, RecursionError) as error:
        raise ArtifactError("not JSON that has a digest", field=META_NAME, hint=AGAIN) from error
    if digest != meta["digest"]:
        raise DigestMismatchError("the description changed", field=META_NAME, hint=AGAIN)
    _check_agreement(meta)


def _check_agreement(meta: dict[str, Any]) -> None:
    try:
        spec = FeatureSpec.from_json(meta["spec"])
        rows = sum(part["rows"] for part in meta["parts"].values())
    except (UsageError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError("a spec or a part that is none", field=META_NAME, hint=AGAIN) from error
    said = (meta["columns"], meta["spec_digest"], meta["kind"], meta["levels"], meta["rows"])
    if said != (list(spec.columns), spec.digest, spec.kind, spec.levels, rows):
        raise ArtifactError(
            "spec, columns and rows do not agree", field=META_NAME, expected=f"{spec.digest}, {rows} rows", hint=AGAIN
        )


def _read_part(path: Path, columns: tuple[str, ...], table: FeatureTable, start: int) -> int:
    """Copy one part into `table` from row `start`; returns its rows."""
    try:
        part = pq.ParquetFile(path).read()  # not read_table, which adds columns for the folders' names
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError("cannot be read", field=path.name, hint=AGAIN) from error
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

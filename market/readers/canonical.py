"""Our own events as one Parquet file: what `data convert` and `data simulate` write, read back as the same events.

The file's metadata say what it is (symbol, venue, kind, levels) and whether a market or a simulator produced it; the
mark travels with the file.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from market.readers.parquet import open_parquet, record_batches
from market.readers.source import Source
from market.readers.tables import check_columns
from tickserve.errors import SchemaError
from tickserve.events import Events, columns_of
from tickserve.store import STAGING_PREFIX, unwritable

METADATA_KEY = b"tickserve.events"
FORMAT = 1


def write_events(path: Path, source: Source, *, rows: int = 131_072) -> int:
    """Stream `source` into `path` (zstd Parquet), atomically; the number of events written.

    Raises what the source raises, and ComponentError when the folder cannot be written; nothing is left then.
    """
    schema = _schema(source)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=STAGING_PREFIX)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            written = 0
            with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
                for events in source.chunks(rows):
                    writer.write_batch(_batch(events, schema))
                    written += len(events)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return written


def _schema(source: Source) -> pa.Schema:
    meta = {
        "format": FORMAT, "symbol": source.symbol, "venue": source.venue, "kind": source.kind,
        "levels": source.levels, "simulated": source.simulated, "origin": source.digests(),
    }  # fmt: skip
    columns = columns_of(source.kind, source.levels)
    fields = [pa.field("ts_ns", pa.int64(), nullable=False), *(pa.field(name, pa.float64()) for name in columns)]
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(meta, sort_keys=True).encode()})


def _batch(events: Events, schema: pa.Schema) -> pa.RecordBatch:
    columns = [pa.array(events.ts_ns)]
    # from_pandas=False keeps NaN as NaN (an absent level), not null.
    columns += [pa.array(np.ascontiguousarray(column), from_pandas=False) for column in events.values.T]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def read_meta(path: Path) -> dict[str, Any] | None:
    """What the file says of itself, or None for Parquet that is not ours.

    Raises CorruptFileError or EmptyDataError for a broken or empty file, SchemaError for metadata of another format.
    """
    raw = (open_parquet(path).schema_arrow.metadata or {}).get(METADATA_KEY)
    if raw is None:
        return None
    try:
        meta = json.loads(raw)
        known = meta["format"] == FORMAT and meta["kind"] in ("book", "bars") and isinstance(meta["simulated"], bool)
        known = known and int(meta["levels"]) in range(meta["kind"] == "book", 1_000)
        known = known and all(isinstance(meta[name], str) for name in ("symbol", "venue"))
    except (ValueError, KeyError, TypeError) as error:
        raise SchemaError(f"{path.name}: unreadable metadata", field=METADATA_KEY.decode()) from error
    if not known:
        raise SchemaError(path.name, field=METADATA_KEY.decode(), expected=f"format {FORMAT}", was=str(meta)[:200])
    return dict(meta)


class EventFileSource(Source):
    """A file of canonical events, with the symbol, venue and simulated mark it was written with."""

    def __init__(self, path: Path) -> None:
        meta = read_meta(path)
        if meta is None:
            raise SchemaError(path.name, field=METADATA_KEY.decode(), expected="a file of canonical events")
        super().__init__(
            symbol=meta["symbol"], venue=meta["venue"], kind=meta["kind"], levels=int(meta["levels"]), files=(path,),
            simulated=meta["simulated"],
        )  # fmt: skip

    def _read(self, rows: int) -> Iterator[Events]:
        path, columns = self.files[0], ("ts_ns", *columns_of(self.kind, self.levels))
        file = open_parquet(path)
        check_columns(file.schema_arrow.names, columns, path.name)
        for batch in record_batches(file, columns, path, rows, {"ts_ns": "integer"}):
            values = np.stack([batch[name] for name in columns[1:]], axis=1).astype(np.float64, copy=False)
            self.quality.rows_read += len(values)
            yield Events(self.kind, self.levels, batch["ts_ns"].astype(np.int64, copy=False), values)

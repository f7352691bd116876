"""Canonical event files: what is written is read back bit for bit, marks included, and nothing is left half-written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from market.readers import Source, open_source
from market.readers.canonical import METADATA_KEY, write_events
from tickserve.errors import ComponentError, CorruptFileError, DataError, SchemaError
from tickserve.events import Events


class ListSource(Source):
    """Chunks given by a test."""

    def __init__(self, *chunks: Events, simulated: bool = True) -> None:
        super().__init__(symbol="Made Up", venue="test", kind="book", levels=chunks[0].levels, simulated=simulated)
        self.given = chunks

    def _read(self, rows: int) -> Iterator[Events]:
        yield from self.given


def book(ts_ns: list[int], bid_2: float = 98.0) -> Events:
    values = np.tile([0.0, 0, 0, 0, 99, 1, 101, 2, bid_2, 3, 102, 4], (len(ts_ns), 1))
    return Events("book", 2, np.array(ts_ns, np.int64), values)


def everything(source: Source) -> Events:
    chunks = list(source.chunks(1_000))
    ts_ns = np.concatenate([chunk.ts_ns for chunk in chunks])
    return Events(source.kind, source.levels, ts_ns, np.concatenate([chunk.values for chunk in chunks]))


def test_events_come_back_with_their_marks(tmp_path: Path) -> None:
    path = tmp_path / "new" / "events.parquet"
    assert write_events(path, ListSource(book([1, 2]), book([2, 3], bid_2=np.nan))) == 4
    source = open_source([path])
    assert (source.symbol, source.venue, source.kind, source.levels) == ("made-up", "test", "book", 2)
    assert source.simulated
    events = everything(source)
    assert events.ts_ns.tolist() == [1, 2, 2, 3]
    assert np.array_equal(
        events.values, np.concatenate([book([1, 2]).values, book([2, 3], np.nan).values]), equal_nan=True
    )
    assert [file.name for file in path.parent.iterdir()] == ["events.parquet"]


def test_recorded_events_survive_the_round_trip(market_data: Path, tmp_path: Path) -> None:
    recorded = open_source([market_data / "binance_l2_stream" / "usdm_btcusdt_20230404.us.jsonl.gz"], levels=3)
    write_events(tmp_path / "a.parquet", recorded)
    again = open_source([tmp_path / "a.parquet"])
    assert not again.simulated
    expected, events = everything(recorded), everything(again)
    assert np.array_equal(events.ts_ns, expected.ts_ns)
    assert events.values.tobytes() == expected.values.tobytes()
    assert again.quality.trades == recorded.quality.trades


def test_one_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    rng = np.random.default_rng(1)
    write_events(path, ListSource(Events("book", 2, np.arange(500), rng.uniform(1, 2, (500, 12)))))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0x10
    path.write_bytes(bytes(damaged))
    with pytest.raises(CorruptFileError, match="broken Parquet"):
        everything(open_source([path]))


def test_a_source_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    write_events(path, ListSource(book([1])))
    before = path.read_bytes()
    with pytest.raises(DataError, match="not in time order"):
        write_events(path, ListSource(book([5, 6]), book([4])))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["events.parquet"]


def test_an_unwritable_folder_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ComponentError, match="cannot write"):
        write_events(tmp_path / "file" / "events.parquet", ListSource(book([1])))


def test_event_files_with_other_columns_or_marks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    write_events(path, ListSource(book([1])))
    table = pq.read_table(path)
    renamed = table.rename_columns(["ts_ns", *(f"x_{name}" for name in table.column_names[1:])])
    pq.write_table(renamed.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(SchemaError, match=r"missing column 'event'"):
        everything(open_source([path]))
    for mark in (b"{", b'{"format":2,"kind":"book","simulated":false,"levels":2,"symbol":"a","venue":"b"}', b"[]"):
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: mark}), path)
        with pytest.raises(SchemaError, match=r"tickserve\.events"):
            open_source([path])

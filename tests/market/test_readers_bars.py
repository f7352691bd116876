"""Bars: the catalogue's counts, bar ends, time zones, quirks counted by rule, and wrong columns named."""

from __future__ import annotations

import gzip
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from market.readers import Source, open_source
from market.readers.bars import bar_length_ns
from tickserve.errors import CorruptFileError, DataError, EmptyDataError, InsufficientDataError, SchemaError
from tickserve.events import Events

MINUTE_NS = 60 * 10**9
OPEN_MS = 1_600_000_020_000
USDJPY = {"gaps": 38, "no_volume": 28_761}


def everything(source: Source, rows: int = 131_072) -> Events:
    chunks = list(source.chunks(rows))
    assert all(len(chunk) <= rows for chunk in chunks)
    ts_ns = np.concatenate([chunk.ts_ns for chunk in chunks])
    return Events("bars", 0, ts_ns, np.concatenate([chunk.values for chunk in chunks]))


def iso_ns(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 10**9


@pytest.mark.parametrize(
    ("name", "rows", "quirks", "first", "last"),
    [
        ("bitfinex/LTCUSD_1m_201804_201812.parquet", 299_407, {"gaps": 54_925}, "2018-04-01T00:01", "2019-01-01T00:00"),
        ("bitfinex/BTCUSD_1m_201804_201812.parquet", 391_066, {"gaps": 3_971}, "2018-04-01T00:01", "2019-01-01T00:00"),
        ("nautilus/btc-perp-20211231-20220201_1m.csv.gz", 45_031, {}, "2021-12-31T23:02", "2022-02-01T05:32"),
        ("nautilus/usdjpy-m1-bid-2013.csv.gz", 28_761, USDJPY, "2013-02-01T00:01", "2013-03-01T00:01"),
        # 09:00 New York in January is 14:00 UTC, and the bar ends an hour later.
        ("bars_1h/lean_us/aig.zip", 40_811, {"gaps": 5_850, "jumps": 9}, "1998-01-02T15:00", "2021-03-31T20:00"),
        ("bars_1d/lean_us/uso.zip", 3_910, {"gaps": 876, "jumps": 4}, "1998-01-03T05:00", "2021-04-01T04:00"),
    ],
)  # fmt: skip
def test_bars_match_the_catalogue(
    market_data: Path, name: str, rows: int, quirks: dict[str, int], first: str, last: str
) -> None:
    source = open_source([market_data / (name if name.startswith("bars") else f"bars_1m/{name}")])
    events = everything(source, rows=50_000)
    assert source.quality.rows_read == len(events) == rows
    assert source.quality.counters == quirks
    assert (events.ts_ns[0], events.ts_ns[-1]) == (iso_ns(first), iso_ns(last))
    assert np.all(events.values[:, 1] >= events.values[:, [0, 3]].max(axis=1))
    assert np.all(events.values[:, 2] <= events.values[:, [0, 3]].min(axis=1))


def test_values_are_the_file_s_own_by_name(market_data: Path) -> None:
    """The Parquet has close before high and low; LEAN prices are hundredths of a cent."""
    path = market_data / "bars_1m" / "bitfinex" / "XRPUSD_1m_201804_201812.parquet"
    frame = pd.read_parquet(path)
    assert list(frame.columns)[1:4] == ["open", "close", "high"]
    events = everything(open_source([path]))
    assert np.array_equal(events.values, frame[["open", "high", "low", "close", "volume"]].to_numpy())
    assert np.array_equal(events.ts_ns, frame["timestamp_ms"].to_numpy() * 1_000_000 + MINUTE_NS)
    daily = everything(open_source([market_data / "bars_1d" / "lean_us" / "goog.zip"]))
    assert daily.values[0].tolist() == [135.91, 140.93, 94.54, 100.37, 23_200_275]


def test_the_unit_of_a_csv_s_volume_is_noted(market_data: Path) -> None:
    for name, noted in (("btc-perp-20211231-20220201_1m", True), ("usdjpy-m1-bid-2013", False)):
        source = open_source([market_data / "bars_1m/nautilus" / f"{name}.csv.gz"])
        everything(source)
        assert any("quote currency" in note for note in source.quality.notes) is noted


def bars(count: int = 6) -> dict[str, list[float]]:
    """Quiet one-minute bars, in the recorded column order."""
    price = [100.0 + index for index in range(count)]
    return {
        "timestamp_ms": [OPEN_MS + index * 60_000 for index in range(count)],
        "open": [*price], "close": [*price], "high": [*price], "low": [*price], "volume": [1.0] * count,
    }  # fmt: skip


def parquet(path: Path, table: dict[str, list[float]]) -> Path:
    pq.write_table(pa.table(table), path)
    return path


def csv_gz(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()))
    return path


def test_quirks_are_counted_and_nothing_is_filled(tmp_path: Path) -> None:
    table = bars(8)
    table["timestamp_ms"][2] = table["timestamp_ms"][1]  # duplicate, so the next step is two minutes: a gap
    table["volume"][3] = 0.0
    table["high"][4] = 1.0
    table["close"][5] = float("nan")  # skipped: another gap
    table["open"][7] = table["close"][7] = table["high"][7] = table["low"][7] = 300.0
    source = open_source([parquet(tmp_path / "ABC_1m.parquet", table)])
    events = everything(source, rows=2)
    assert source.quality.counters == {
        "duplicate_times": 1, "gaps": 2, "zero_volume": 1, "high_low_violations": 1, "missing_values": 1, "jumps": 1,
    }  # fmt: skip
    minutes = (events.ts_ns // 10**6 - OPEN_MS) // 60_000
    assert minutes.tolist() == [1, 2, 4, 5, 7, 8]
    assert events.values[1, 0] == 101.0  # the first of the two stays


def test_negative_prices_and_extra_columns(tmp_path: Path) -> None:
    table = bars() | {"trades": [1.0] * 6}
    table["low"][2] = -1.0
    source = open_source([parquet(tmp_path / "ABC_1m.parquet", table)])
    assert len(everything(source)) == 5
    assert source.quality.counters == {"extra_columns": 1, "non_positive_price": 1, "gaps": 1}


def test_unsorted_bars_are_refused(tmp_path: Path) -> None:
    table = bars()
    table["timestamp_ms"].reverse()
    with pytest.raises(DataError, match=r"60 s before the bar in front of it.*time order"):
        everything(open_source([parquet(tmp_path / "ABC_1m.parquet", table)]))


def test_overlapping_files_are_refused_and_following_ones_joined(tmp_path: Path) -> None:
    later = bars() | {"timestamp_ms": [OPEN_MS + (index + 6) * 60_000 for index in range(6)]}
    first = parquet(tmp_path / "ABC_2.parquet", bars())
    second = parquet(tmp_path / "ABC_1.parquet", later)
    assert len(everything(open_source([second, first]))) == 12
    parquet(second, bars())
    with pytest.raises(DataError, match="files that do not overlap"):
        everything(open_source([second, first]))


def test_one_bar_has_no_length() -> None:
    with pytest.raises(InsufficientDataError, match="at least two bars"):
        bar_length_ns(np.array([-1]), "x")
    assert bar_length_ns(np.array([-1, 60, 120, 60]), "x") == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"close": None}, r"missing column 'close': expected columns timestamp_ms, open, high, low, close, volume"),
        ({"close": None, "Close": [1.0] * 6}, r"missing column 'close'.*Close"),
        ({"high": ["x"] * 6}, r"column 'high': expected a numeric column, was string"),
        ({"timestamp_ms": [1.5] * 6}, r"column 'timestamp_ms': expected an integer column, was double"),
        ({"timestamp_ms": [1, None, 2, 3, 4, 5]}, r"column 'timestamp_ms': expected a time in every row, was 1 empty"),
    ],
)
def test_wrong_parquet_columns_are_named(tmp_path: Path, change: dict[str, list[object] | None], message: str) -> None:
    table = {name: values for name, values in (bars() | change).items() if values is not None}
    with pytest.raises(SchemaError, match=message):
        everything(open_source([parquet(tmp_path / "ABC_1m.parquet", table)]))


def test_a_repeated_parquet_column_is_named(tmp_path: Path) -> None:
    table = bars()
    arrays = [pa.array(values) for values in table.values()]
    repeated = pa.Table.from_arrays([*arrays, arrays[1]], names=[*table, "open"])
    pq.write_table(repeated, tmp_path / "ABC_1m.parquet")
    with pytest.raises(SchemaError, match=r"repeated column 'open'"):
        open_source([tmp_path / "ABC_1m.parquet"])


def test_truncated_and_damaged_parquet_is_refused(market_data: Path, tmp_path: Path) -> None:
    data = (market_data / "bars_1m" / "bitfinex" / "LTCUSD_1m_201804_201812.parquet").read_bytes()
    path = tmp_path / "LTCUSD_1m.parquet"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptFileError, match="broken Parquet"):
        open_source([path])
    damaged = bytearray(data)
    damaged[1_000:3_000] = bytes(2_000)
    path.write_bytes(bytes(damaged))
    with pytest.raises(DataError):
        everything(open_source([path]))
    parquet(path, {name: [] for name in bars()})
    with pytest.raises(EmptyDataError, match="no rows"):
        open_source([path])


HEADER = "timestamp,open,high,low,close,volume"
ROWS = ["2021-12-31 23:01:00.000000,1,2,1,2,10", "2021-12-31 23:02:00,2,2,2,2,10", "2021-12-31 23:03:00,2,3,2,3,1e3"]


def test_windows_csv_reads_like_any_other(tmp_path: Path) -> None:
    plain = everything(open_source([csv_gz(tmp_path / "a.csv.gz", "\n".join([HEADER, *ROWS]))]))
    other = tmp_path / "b.csv"
    other.write_bytes(("\ufeff" + "\r\n".join([HEADER, *ROWS]) + "\r\n").encode())
    windows = everything(open_source([other]))
    assert np.array_equal(plain.values, windows.values)
    assert plain.ts_ns.tolist() == windows.ts_ns.tolist()
    assert plain.values[2].tolist() == [2, 3, 2, 3, 1_000]
    assert plain.ts_ns[0] == iso_ns("2021-12-31T23:02")


def test_zones_are_honoured_and_never_mixed(tmp_path: Path) -> None:
    zoned = [
        row.replace(",", suffix + ",", 1) for row, suffix in zip(ROWS, ["+02:00", "+02:00", "+02:00"], strict=True)
    ]
    events = everything(open_source([csv_gz(tmp_path / "a.csv.gz", "\n".join([HEADER, *zoned]))]))
    assert events.ts_ns[0] == iso_ns("2021-12-31T21:02")
    text = "\n".join([HEADER, *(row.replace(" ", "T").replace(",", "Z,", 1) for row in ROWS)])
    assert everything(open_source([csv_gz(tmp_path / "b.csv.gz", text)])).ts_ns[0] == iso_ns("2021-12-31T23:02")
    source = open_source([csv_gz(tmp_path / "c.csv.gz", "\n".join([HEADER, zoned[0], *ROWS[1:]]))])
    with pytest.raises(SchemaError, match="mixed zones"):
        everything(source)


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        ([HEADER], EmptyDataError, "a header and no rows"),
        (["timestamp,open,high,low,Close", *ROWS], SchemaError, r"missing column 'close'.*was .*Close"),
        (["timestamp,open,open,high,low,close", *ROWS], SchemaError, r"repeated column 'open'"),
        ([HEADER, ROWS[0], "2021-12-31 23:02:00,2,2,n/a,2,10"], SchemaError, "column 'low': .*number, was 'n/a'"),
        ([HEADER, ROWS[0], "2021-12-31 23:02:00,2,2"], SchemaError, "row 3: expected 6 fields .*, was 3"),
        ([HEADER, ROWS[0], "yesterday,2,2,2,2,2"], SchemaError, "timestamp: .*was 'yesterday'"),
    ],
)  # fmt: skip
def test_wrong_csv_is_named(tmp_path: Path, lines: list[str], error: type[DataError], message: str) -> None:
    with pytest.raises(error, match=message):
        everything(open_source([csv_gz(tmp_path / "a.csv.gz", "\n".join(lines) + "\n")]))


def test_a_truncated_gzip_is_never_a_shorter_file(market_data: Path, tmp_path: Path) -> None:
    data = (market_data / "bars_1m" / "nautilus" / "btc-perp-20211231-20220201_1m.csv.gz").read_bytes()
    path = tmp_path / "btc-perp-1m.csv.gz"
    for content in (data[: len(data) // 2], data[:-4], data[:-8] + b"\0" * 8):
        path.write_bytes(content)
        source = open_source([path])
        with pytest.raises(CorruptFileError, match=r"truncated|CRC"):
            everything(source)
        assert not source.quality.complete


def test_lean_times_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "xyz.zip"
    for row, message in (("20200308 02:30,1,1,1,1,1", "exists in New York"), ("20201301 09:00,1,1,1,1,1", "YYYYMMDD")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("xyz.csv", "20200307 09:00,1,1,1,1,1\n" + row)
        with pytest.raises(SchemaError, match=message):
            everything(open_source([path]))

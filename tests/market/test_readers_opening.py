"""Opening: what a file is, and every file that is not what it should be, refused with a typed error and its reason."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from market.readers import open_source
from market.readers.source import safe_name
from tickserve.errors import CorruptFileError, DataError, EmptyDataError, SchemaError, TickserveError, UsageError

BINANCE_LINE = b'1700000000000000000 {"stream":"btcusdt@trade","data":{"t":1,"p":"1","q":"1","m":true}}\n'


@pytest.mark.parametrize(
    ("path", "symbol", "venue", "kind", "levels"),
    [
        ("binance_l2_stream/cm_btcusd_perp_20240808.jsonl.gz", "btcusd_perp", "binance-cm", "book", 7),
        ("us_equity_tick/aig", "aig", "us-equity", "book", 1),
        ("fx_tick/fxcm_eurusd", "eurusd", "fxcm", "book", 1),
        ("bars_1m/bitfinex/BTCUSD_1m_201804_201812.parquet", "btcusd", "bitfinex", "bars", 0),
        ("bars_1m/nautilus/btc-perp-20211231-20220201_1m.csv.gz", "btc-perp", "unknown", "bars", 0),
        ("bars_1m/nautilus/usdjpy-m1-ask-2013.csv.gz", "usdjpy-ask", "unknown", "bars", 0),
        ("bars_1d/lean_us/googl.zip", "googl", "us-equity", "bars", 0),
    ],
)
def test_every_known_format_is_recognised(
    market_data: Path, path: str, symbol: str, venue: str, kind: str, levels: int
) -> None:
    source = open_source([market_data / path], levels=7)
    assert (source.symbol, source.venue, source.kind, source.levels) == (symbol, venue, kind, levels)
    assert not source.simulated


def test_the_content_decides_not_the_name(market_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "renamed"
    shutil.copy(market_data / "binance_l2_stream" / "spot_ethusdt_20240808.jsonl.gz", path)
    assert open_source([path]).symbol == "ethusdt"


def test_venues_that_share_a_symbol_are_told_apart(market_data: Path) -> None:
    folder = market_data / "binance_l2_stream"
    with pytest.raises(UsageError, match=r"binance-spot/btcusdt.*binance-usdm/btcusdt.*--symbol"):
        open_source([folder], symbol="btcusdt")
    assert open_source([folder], symbol="binance-spot/btcusdt").files == (folder / "spot_btcusdt_20240808.jsonl.gz",)


def test_digests_are_by_name_and_of_the_bytes(market_data: Path) -> None:
    path = market_data / "bars_1d" / "lean_us" / "wm.zip"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_source([path, path]).digests() == {"wm.zip": f"sha256:{digest}"}


def test_genuinely_broken_files(market_data: Path) -> None:
    with pytest.raises(CorruptFileError, match=r"bitfinex_L3_feed.*CRC"):
        open_source([market_data / "corrupt" / "bitfinex_L3_feed.log.gz"])
    with pytest.raises(CorruptFileError, match="Git LFS pointer"):
        open_source([market_data / "corrupt" / "quotes_0005.parquet"])


@pytest.mark.parametrize("path", ["venue_ws_logs/OKX.0.log.gz", "bars_1d/stocknet_daily_raw.zip", "README.md",
                                  "tardis_samples/binance-futures_trades_BTCUSDT_20200222.csv.gz"])  # fmt: skip
def test_formats_no_reader_knows_are_refused(market_data: Path, path: str) -> None:
    with pytest.raises(SchemaError, match="expected"):
        open_source([market_data / path])


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.jsonl.gz", b"", EmptyDataError, "0 bytes"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), EmptyDataError, "no rows"),
        ("a.jsonl.gz", gzip.compress(b"\n", mtime=0), EmptyDataError, "no rows"),
        ("a.jsonl.gz", BINANCE_LINE, CorruptFileError, r"wrong magic: expected .*x1f.* for \.gz, was"),
        ("a.zip", gzip.compress(BINANCE_LINE, mtime=0), CorruptFileError, r"wrong magic.*for \.zip"),
        ("a.parquet", b"PAR1", CorruptFileError, "broken Parquet"),
        ("a.parquet", b"\0" * 100, CorruptFileError, r"wrong magic.*PAR1"),
        (
            "a.gz",
            gzip.compress(b"hello\nworld\n", mtime=0),
            SchemaError,
            "unknown format: expected Binance .*, was 'hello",
        ),
        ("a.gz", gzip.compress(b"hello\n" * 9_000, mtime=0)[:-9], CorruptFileError, "truncated"),
        ("a.gz", b"\x1f\x8b\x08\x00" + b"\xff" * 60, CorruptFileError, "broken"),
        ("a.jsonl.gz", gzip.compress(b'17 {"lastUpdateId":1}\n', mtime=0), SchemaError, "stream"),
        ("a.csv", b"\xff\xfe\x00garbage,\x80\n", SchemaError, "unknown format"),
    ],
)
def test_broken_files_are_refused(
    tmp_path: Path, name: str, content: bytes, error: type[TickserveError], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        open_source([tmp_path / name])
    assert raised.value.exit_code == 3
    assert str(tmp_path) not in str(raised.value)


def test_zip_files_with_none_or_several_members(tmp_path: Path) -> None:
    path = tmp_path / "20131007_quote.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", "1,2,3\n")
        archive.writestr("../b.csv", "1,2,3\n")
    with pytest.raises(SchemaError, match="a zip with one CSV file, was 2 files"):
        open_source([path])
    with zipfile.ZipFile(path, "w"):
        pass
    with pytest.raises(CorruptFileError, match="wrong magic"):
        open_source([path])


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.gz.*No such file") as raised:
        open_source([tmp_path / "nowhere.gz"])
    assert raised.value.exit_code == 2
    with pytest.raises(UsageError, match="cannot find"):
        open_source([Path("a\0b")])
    with pytest.raises(UsageError, match="at least one file or folder"):
        open_source([])
    with pytest.raises(UsageError, match=r"levels.*expected 1 to"):
        open_source([tmp_path], levels=0)


@pytest.mark.timeout(10)
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl.gz")
    for path in (tmp_path / "a.jsonl.gz", tmp_path):
        with pytest.raises(DataError, match="not a plain file"):
            open_source([path])
    with pytest.raises(DataError, match="not a plain file"):
        open_source([Path("/dev/zero")])


def test_a_folder_counts_what_it_leaves_out(market_data: Path, tmp_path: Path) -> None:
    with pytest.raises(EmptyDataError, match="no market data in folder"):
        open_source([tmp_path])
    shutil.copy(market_data / "bars_1d" / "lean_us" / "wm.zip", tmp_path)
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / ".hidden.zip").write_bytes(b"")
    source = open_source([tmp_path])
    for _ in range(2):
        assert sum(len(chunk) for chunk in source.chunks(1_000)) == 5_399
    assert source.quality.counters["ignored_files"] == 1


def test_files_of_one_name_would_share_a_digest(market_data: Path, tmp_path: Path) -> None:
    shutil.copy(market_data / "bars_1d" / "lean_us" / "wm.zip", tmp_path)
    with pytest.raises(UsageError, match=r"same name.*wm\.zip"):
        open_source([tmp_path, market_data / "bars_1d" / "lean_us" / "wm.zip"])


def test_chunk_size_is_checked(market_data: Path) -> None:
    source = open_source([market_data / "bars_1d" / "lean_us" / "wm.zip"])
    with pytest.raises(UsageError, match=r"rows.*at least 1, was 0"):
        next(source.chunks(0))


@pytest.mark.parametrize(
    ("text", "safe"), [("BTC/USD", "btc-usd"), ("../x", "x"), ("", "unknown"), ("..", "unknown"), ("Ä b", "b")]
)
def test_names_are_safe_for_folders(text: str, safe: str) -> None:
    assert safe_name(text) == safe

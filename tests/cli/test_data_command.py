"""Looking at data, and refusing what is broken, through the command."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run

BINANCE = "binance_l2_stream/usdm_btcusdt_20230404.us.jsonl.gz"


def test_inspect_counts_what_the_catalogue_says(tickserve: Run, market_data: Path) -> None:
    done = tickserve("data", "inspect", market_data / BINANCE, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["symbol"] == "btcusdt"
    assert report["simulated"] is False
    assert report["quality"]["rows_read"] == 13_384
    assert report["quality"]["complete"] is True


def test_inspect_shows_a_person_the_same(tickserve: Run, market_data: Path) -> None:
    done = tickserve("data", "inspect", market_data / BINANCE)
    assert done.returncode == 0, done.stderr
    assert "13,384" in done.stdout


def test_broken_files_exit_3_with_one_line(tickserve: Run, market_data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.parquet").write_bytes(b"")
    for path in (
        market_data / "corrupt" / "quotes_0005.parquet",
        market_data / "corrupt" / "bitfinex_L3_feed.log.gz",
        tmp_path / "empty.parquet",
    ):
        done = tickserve("data", "inspect", path)
        assert done.returncode == 3, (path.name, done.stderr)
        assert "Traceback" not in done.stderr
        assert path.name in done.stderr


def test_a_missing_path_exits_2(tickserve: Run, tmp_path: Path) -> None:
    done = tickserve("data", "inspect", tmp_path / "none.parquet")
    assert done.returncode == 2
    assert "none.parquet" in done.stderr


def test_simulated_data_stays_labelled_after_a_round_trip(tickserve: Run, tmp_path: Path) -> None:
    written = tickserve("data", "simulate", "--out", "sim.parquet", "--events", "2000")
    assert written.returncode == 0, written.stderr
    done = tickserve("data", "inspect", "sim.parquet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SIMULATED")


def test_an_unwritable_output_exits_4(tickserve: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    done = tickserve("data", "simulate", "--out", "file/sim.parquet", "--events", "1000")
    assert done.returncode == 4
    assert "cannot write" in done.stderr


def test_convert_never_overwrites_unasked(tickserve: Run, market_data: Path, tmp_path: Path) -> None:
    source = tmp_path / "spy.zip"
    source.write_bytes((market_data / "bars_1d" / "lean_us" / "spy.zip").read_bytes())
    before = source.read_bytes()
    for arguments in (("--out", "spy.zip"), ("--out", "spy.zip", "--force")):
        done = tickserve("data", "convert", "spy.zip", *arguments)
        assert done.returncode == 2, done.stderr
        assert "--out" in done.stderr
    assert source.read_bytes() == before
    assert tickserve("data", "convert", "spy.zip", "--out", "spy.parquet").returncode == 0
    assert tickserve("data", "convert", "spy.zip", "--out", "spy.parquet").returncode == 2
    assert tickserve("data", "convert", "spy.zip", "--out", "spy.parquet", "--force").returncode == 0

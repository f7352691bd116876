"""`tickserve universe` as a user runs it: what it refuses, and the exit code when every symbol's data are bad."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run


def test_nothing_but_bad_data_exits_3_and_names_each(tickserve: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("one", "two"):
        (data / f"{name}.parquet").write_bytes(b"PAR1 and no more")
    done = tickserve("universe", "train", "--data", data, "--json")
    assert done.returncode == 3, done.stderr
    result = json.loads(done.stdout)
    assert [(each["name"], each["error"]["type"]) for each in result["symbols"]] == [
        ("one", "CorruptFileError"),
        ("two", "CorruptFileError"),
    ]
    assert result["pooled"] == []


def test_what_cannot_take_effect_is_refused(tickserve: Run, tmp_path: Path) -> None:
    none = tickserve("universe", "train")
    assert (none.returncode, "--data" in none.stderr) == (2, True)
    address = tickserve("universe", "train", "--data", tmp_path, TICKSERVE_UNIVERSE__RAY_ADDRESS="host:6379")
    assert (address.returncode, "universe.engine: expected ray" in address.stderr) == (2, True)
    resume = tickserve("universe", "train", "--data", tmp_path, "--resume")
    assert resume.returncode in (2, 3)
    both = tickserve("features", "build", "--all-symbols", "--symbol", "x", "--data", tmp_path)
    assert (both.returncode, "--symbol, --all-symbols" in both.stderr) == (2, True)

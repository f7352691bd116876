"""A file larger than memory: features and copies of it are streamed, and what they take does not grow with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from market.readers import canonical, open_source
from tickserve.events import Events

BOOK = "binance_l2_stream/usdm_btcusdt_20240808.jsonl.gz"
LEVELS, COPIES = 5, 24
# Both run once on the short file first: libraries, kernels and buffers are then there, and only rows are counted.
CHILD = """
import json, sys
from pathlib import Path
from market.build import build_features
from market.readers import canonical, open_source
from tickserve.config import FeatureSettings
from tickserve.features.spec import default_book_spec

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if key in line)

def work(path, out):
    if sys.argv[4] == "load":
        return sum(len(part) for part in list(open_source([path]).chunks(65_536)))
    canonical.write_events(out / "copy.parquet", open_source([path]), rows=65_536)
    settings = FeatureSettings(store=str(out), chunk_rows=65_536, max_rows=20_000)
    return build_features(open_source([path]), default_book_spec(5), settings).meta["events_read"]

short, long, out = map(Path, sys.argv[1:4])
work(short, out / "short")
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
events = work(long, out / "long")
print(json.dumps({"events": events, "grown": resident("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def files(market_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recorded book as canonical events, and the same one many times over, one recording after the other."""
    folder = tmp_path_factory.mktemp("events")
    short, long = folder / "short.parquet", folder / "long.parquet"
    canonical.write_events(short, open_source([market_data / BOOK], levels=LEVELS))
    source = open_source([short])
    events = next(source.chunks(1 << 20))
    span = int(events.ts_ns[-1] - events.ts_ns[0]) + 1_000_000_000
    schema = pq.read_schema(short)
    with pq.ParquetWriter(long, schema, compression="zstd", write_page_checksum=True) as writer:
        for copy in range(COPIES):
            again = Events(events.kind, events.levels, events.ts_ns + np.int64(copy * span), events.values)
            writer.write_batch(canonical._batch(again, schema))
    return short, long


def measured(files: tuple[Path, Path], out: Path, root: Path, how: str) -> dict[str, int]:
    """What the child says of the long file: its events, and how many bytes were resident for it at most."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, files), str(out), how],
        cwd=root, capture_output=True, text=True, check=True, timeout=200,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


@pytest.mark.system
def test_a_file_larger_than_memory_is_streamed(files: tuple[Path, Path], tmp_path: Path, root: Path) -> None:
    events = pq.read_metadata(files[1]).num_rows
    unpacked = events * 8 * (1 + 4 * LEVELS)
    streamed = measured(files, tmp_path / "stream", root, "stream")
    assert streamed["events"] == events
    assert streamed["grown"] < 0.5 * unpacked, f"{streamed['grown']:,} of {unpacked:,} bytes"
    loaded = measured(files, tmp_path / "load", root, "load")
    assert loaded["grown"] > 0.75 * unpacked  # the measure sees what is held at once

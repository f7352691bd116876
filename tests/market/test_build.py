"""Feature sets: what is kept, what is written, when one is reused, and when it must not be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from market import build, labels
from market.build import FeatureSet, FeatureTable, build_features, open_feature_set
from market.feature_store import meta_digest
from market.readers import open_source
from market.readers.source import Source, split
from market.simulator import SimulatedSource
from tickserve.config import FeatureSettings
from tickserve.errors import ArtifactError, ComponentError, DigestMismatchError, InsufficientDataError
from tickserve.events import Events
from tickserve.features.engine import FeatureEngine
from tickserve.features.spec import default_book_spec, default_spec

SPEC = default_book_spec(3)
EVENTS = 6_000


def source(seed: int = 5, events: int = EVENTS) -> SimulatedSource:
    return SimulatedSource(seed=seed, events=events, levels=3)


def settings(store: Path, **changes: Any) -> FeatureSettings:
    return FeatureSettings(store=str(store), **{"max_rows": 0, "chunk_rows": 1_024, **changes})


def all_events() -> Events:
    return next(source().chunks(EVENTS))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("*")}


@pytest.fixture
def built(tmp_path: Path) -> FeatureSet:
    return build_features(source(), SPEC, settings(tmp_path))


def test_all_rows_past_warm_up_equal_the_engines(built: FeatureSet) -> None:
    events, table = all_events(), built.load()
    features = FeatureEngine(SPEC).batch(events)
    warm = slice(SPEC.warmup_events, None)
    assert table.features.flags.c_contiguous
    assert table.features.dtype == np.float32
    assert table.features.tobytes() == np.ascontiguousarray(features[warm]).tobytes()
    np.testing.assert_array_equal(table.ts_ns, events.ts_ns[warm])
    bid, ask = events.values[warm, 4], events.values[warm, 6]
    np.testing.assert_array_equal(table.mid, 0.5 * (bid + ask))
    np.testing.assert_allclose(table.half_spread, 0.5 * (ask - bid) / table.mid)
    assert (table.stride, table.events_read, set(table.session)) == (1, EVENTS, {0})
    assert (built.symbol, built.kind, built.simulated, built.reused) == ("simulated", "book", True, False)
    assert built.spec == SPEC
    assert table.quality["events"] == EVENTS
    assert table.quality["complete"]


def test_meta_says_what_it_is(built: FeatureSet) -> None:
    meta = json.loads((built.folder / "features.json").read_text())
    assert meta == built.meta
    assert meta["spec_digest"] == SPEC.digest
    assert meta["columns"] == list(SPEC.columns)
    assert meta["source_digests"] == source().digests()
    assert meta["code"] == build.code_version()
    assert meta["simulated"] is True
    (name,) = meta["parts"]
    assert name.startswith("symbol=simulated/date=20")
    assert pq.ParquetFile(built.folder / name).metadata.row_group(0).column(4).compression == "ZSTD"


@pytest.mark.parametrize(
    ("max_rows", "stride"), [(EVENTS, 1), (EVENTS - 200, 1), (EVENTS - 201, 2), (700, 16), (1, 8192)]
)
@pytest.mark.parametrize("chunk_rows", [1_024, 131_072])
def test_thinning_keeps_every_stride_th_warm_event(
    built: FeatureSet, tmp_path: Path, max_rows: int, stride: int, chunk_rows: int
) -> None:
    thinned = build_features(source(), SPEC, settings(tmp_path, max_rows=max_rows, chunk_rows=chunk_rows))
    every, table = built.load(), thinned.load()
    assert (table.stride, thinned.meta["events_warm"]) == (stride, EVENTS - SPEC.warmup_events)
    assert len(table) <= max_rows
    np.testing.assert_array_equal(table.ts_ns, every.ts_ns[::stride])
    assert table.features.tobytes() == np.ascontiguousarray(every.features[::stride]).tobytes()


def test_chunk_size_changes_nothing(built: FeatureSet, tmp_path: Path) -> None:
    again = build_features(source(), SPEC, settings(tmp_path / "other", chunk_rows=4_097))
    assert again.load().features.tobytes() == built.load().features.tobytes()
    assert again.folder.name == built.folder.name


class _NotRead(SimulatedSource):
    def chunks(self, rows: int = 131_072) -> Any:
        raise AssertionError("the cache was there")


def test_nothing_changed_means_no_work(built: FeatureSet, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    again = build_features(_NotRead(seed=5, events=EVENTS, levels=3), SPEC, settings(tmp_path, chunk_rows=2_048))
    assert again.reused
    assert again.meta == built.meta
    assert snapshot(tmp_path) == before


def test_what_decides_makes_another_set(built: FeatureSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = type(SPEC)(SPEC.name, "book", 3, SPEC.features[:-1], SPEC.session_gap_ns, SPEC.warmup_events)
    folders = {built.folder, build_features(source(), other, settings(tmp_path)).folder}
    folders.add(build_features(source(seed=6), SPEC, settings(tmp_path)).folder)
    folders.add(build_features(source(), SPEC, settings(tmp_path, max_rows=100)).folder)
    beside = source()
    beside.ignored_files = 1
    folders.add(build_features(beside, SPEC, settings(tmp_path)).folder)
    monkeypatch.setattr(build, "code_version", lambda: "sha256:other")
    folders.add(build_features(source(), SPEC, settings(tmp_path)).folder)
    assert len(folders) == 6


def test_code_version_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    versions = {build.code_version()}
    for pattern in build._CODE:
        for path in root.glob(pattern):
            copy = tmp_path / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "version", lambda name: "other" if name == "numba" else "1")
    versions.add(build.code_version())
    assert len(versions) == 2
    monkeypatch.undo()
    monkeypatch.setattr(build, "_ROOT", tmp_path)
    assert build.code_version() in versions
    names = ("tickserve/features/windows.py", "market/readers/binance.py", "market/build.py", "tickserve/events.py")
    for name in names:
        with (tmp_path / name).open("a") as file:
            file.write("# edited\n")
        versions.add(build.code_version())
    assert len(versions) == len(names) + 2


def _truncate(folder: Path) -> None:
    part = next(folder.rglob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-10])


def _flip(folder: Path) -> None:
    part = next(folder.rglob("*.parquet"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)


def _remove_part(folder: Path) -> None:
    next(folder.rglob("*.parquet")).unlink()


def _remove_meta(folder: Path) -> None:
    (folder / "features.json").unlink()


def _cut_meta(folder: Path) -> None:
    path = folder / "features.json"
    path.write_text(path.read_text()[:100])


def _other_key(folder: Path) -> None:
    path = folder / "features.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"key": "sha256:other"}))


DAMAGE = [_truncate, _flip, _remove_part, _remove_meta, _cut_meta, _other_key]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_rebuilt(built: FeatureSet, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    good = built.load().features.tobytes()
    damage(built.folder)
    again = build_features(source(), SPEC, settings(tmp_path))
    assert not again.reused
    assert again.folder == built.folder
    assert again.load().features.tobytes() == good
    assert build_features(source(), SPEC, settings(tmp_path)).reused


@pytest.mark.parametrize("damage", DAMAGE[:5])
def test_a_damaged_set_does_not_open(built: FeatureSet, damage: Callable[[Path], None]) -> None:
    assert open_feature_set(built.folder).meta == built.meta
    damage(built.folder)
    with pytest.raises((ArtifactError, DigestMismatchError)):
        open_feature_set(built.folder)


def test_a_part_outside_the_folder_is_refused(built: FeatureSet) -> None:
    path = built.folder / "features.json"
    meta = built.meta | {"parts": {"../../etc/passwd": {"rows": 1, "sha256": "sha256:0"}}}
    meta["rows"] = 1
    path.write_text(json.dumps(meta | {"digest": meta_digest(meta)}))
    with pytest.raises(ArtifactError, match="missing"):
        open_feature_set(built.folder)


EDITS: dict[str, Any] = {
    "stride": 64, "simulated": False, "quality": {}, "spec": {}, "rows": 5, "columns": ["x"] * 40, "parts": {},
    "events_read": 7, "source_digests": {}, "symbol": "other", "kind": "bars", "levels": 9, "sessions": 3,
    "spec_digest": "sha256:0", "code": "sha256:0", "digest": "sha256:0", "extra": 1,
}  # fmt: skip
# Of another type; those that carry a right digest must be refused all the same.
RETYPED: dict[str, Any] = {
    "stride": "1", "simulated": 1, "quality": [], "spec": [], "rows": 5800.0, "columns": "x", "parts": [],
    "digest": None, "levels": True, "format": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_description_is_never_trusted(built: FeatureSet, tmp_path: Path, name: str) -> None:
    path = built.folder / "features.json"
    path.write_text(json.dumps(built.meta | {name: EDITS[name]}))
    with pytest.raises(ArtifactError):
        open_feature_set(built.folder)
    again = build_features(source(), SPEC, settings(tmp_path))
    assert not again.reused
    assert again.meta == built.meta


@pytest.mark.parametrize("name", RETYPED)
def test_a_description_of_other_types_is_never_trusted(built: FeatureSet, tmp_path: Path, name: str) -> None:
    meta = built.meta | {name: RETYPED[name]}
    if name != "digest":
        meta["digest"] = meta_digest(meta)
    (built.folder / "features.json").write_text(json.dumps(meta))
    with pytest.raises(ArtifactError, match=r"wrong type|another format"):
        open_feature_set(built.folder)
    assert not build_features(source(), SPEC, settings(tmp_path)).reused


@pytest.mark.parametrize(
    "change", [{"rows": 5}, {"columns": ["x"]}, {"parts": {"a": 1}}, {"parts": {"a": {}}}, {"spec": {"name": []}}]
)
def test_a_description_that_contradicts_itself_is_refused(built: FeatureSet, change: dict[str, Any]) -> None:
    meta = built.meta | change
    (built.folder / "features.json").write_text(json.dumps(meta | {"digest": meta_digest(meta)}))
    with pytest.raises(ArtifactError, match=r"do not agree|that is none"):
        open_feature_set(built.folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"format": NaN}', "[" * 100_000])
def test_what_is_no_description_is_refused(built: FeatureSet, text: str) -> None:
    (built.folder / "features.json").write_text(text)
    with pytest.raises(ArtifactError):
        open_feature_set(built.folder)


def test_too_short_data_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InsufficientDataError, match="more than 200 in one session, was 200 in 1"):
        build_features(source(events=200), SPEC, settings(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert build_features(source(events=201), SPEC, settings(tmp_path)).rows == 1


class _Breaks(SimulatedSource):
    def chunks(self, rows: int = 131_072) -> Any:
        yield next(super().chunks(rows))
        raise InsufficientDataError("the feed broke")


@pytest.mark.parametrize("max_rows", [0, 100])
def test_a_source_that_fails_leaves_nothing(tmp_path: Path, max_rows: int) -> None:
    with pytest.raises(InsufficientDataError, match="the feed broke"):
        build_features(_Breaks(seed=5, events=EVENTS, levels=3), SPEC, settings(tmp_path, max_rows=max_rows))
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_a_file_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(ComponentError, match="writable"):
        build_features(source(), SPEC, settings(tmp_path / "store"))


def test_progress_counts_events(tmp_path: Path) -> None:
    seen: list[int] = []
    build_features(source(), SPEC, settings(tmp_path), progress=seen.append)
    assert seen == [*range(1_024, EVENTS, 1_024), EVENTS]


def test_sessions_are_counted_and_warm_up_anew(market_data: Path, tmp_path: Path) -> None:
    """Two FX days lie across a weekend: two sessions, two warm-ups, a part per UTC day."""
    files = [market_data / f"fx_tick/fxcm_eurusd/{day}_quote.zip" for day in ("20140502", "20140504")]
    reader = open_source(files)
    spec = default_spec("book", reader.levels)
    built = build_features(reader, spec, FeatureSettings(store=str(tmp_path), max_rows=0))
    table = built.load()
    assert built.meta["sessions"] == len(set(table.session)) == 2
    assert len(table) == table.events_read - 2 * spec.warmup_events
    opens = int(np.flatnonzero(np.diff(table.session))[0])
    assert table.ts_ns[opens + 1] - table.ts_ns[opens] > spec.session_gap_ns
    assert len(built.meta["parts"]) >= 2
    assert np.all(np.diff(table.ts_ns) >= 0)


class _Bars(Source):
    """A quiet minute series whose price is divided by ten at row 300."""

    def __init__(self) -> None:
        super().__init__(symbol="split", venue="test", kind="bars", levels=0)
        close = 100.0 + np.sin(np.arange(600.0))
        close[300:] /= 10
        self.close = close

    def digests(self) -> dict[str, str]:
        return {"bars": "sha256:0"}

    def _read(self, rows: int) -> Iterator[Events]:
        values = np.repeat(self.close[:, None], 5, axis=1)
        self.quality.rows_read = len(values)
        yield from split(Events("bars", 0, np.arange(600, dtype=np.int64) * 60 * 10**9, values), rows)


@pytest.mark.parametrize("chunk_rows", [299, 300, 301, 7, 600])
def test_a_jump_of_bars_starts_a_session_and_a_warm_up(tmp_path: Path, chunk_rows: int) -> None:
    spec = default_spec("bars", 0)
    bars = _Bars()
    built = build_features(
        bars, spec, FeatureSettings.model_construct(store=str(tmp_path), max_rows=0, chunk_rows=chunk_rows)
    )
    table, warm = built.load(), spec.warmup_events
    kept = [*range(warm, 300), *range(300 + warm, 600)]
    assert (table.ts_ns // (60 * 10**9)).tolist() == kept
    assert table.session.tolist() == [0] * (300 - warm) + [1] * (300 - warm)
    every = FeatureEngine(spec).batch(next(bars.chunks(600)))
    assert table.features.tobytes() == np.ascontiguousarray(every[kept]).tobytes()  # the engine itself is not reset
    ret, _ = labels.forward_returns_rows(table.mid, 5, session=table.session)
    assert np.nanmax(np.abs(ret)) < 0.1
    windowed = [spec.columns.index(name) for name in ("bar_return_60", "drawdown_60", "volume_zscore_60")]
    assert np.abs(table.features[:, windowed[:2]]).max() < 0.1


def test_bars_have_a_close_and_no_spread(market_data: Path, tmp_path: Path) -> None:
    reader = open_source([market_data / "bars_1d/lean_us/ibm.zip"])
    built = build_features(reader, default_spec("bars", 0), FeatureSettings(store=str(tmp_path)))
    table: FeatureTable = built.load()
    assert np.isnan(table.half_spread).all()
    assert (table.mid > 0).all()
    assert 20 <= len(built.meta["parts"]) <= 30
    assert not built.simulated
    assert built.source_digests == reader.digests()

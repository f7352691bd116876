"""Market events to a feature set: stream, compute every event, keep every k-th, write once, reuse when nothing changed.

Letters: N events of a chunk, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from market.feature_store import (
    FORMAT,
    META_NAME,
    FeatureSet,
    FeatureTable,
    PartWriter,
    Rows,
    meta_digest,
    open_feature_set,
)
from market.readers.source import Source
from market.sessions import SessionCounter
from tickserve.config import FeatureSettings
from tickserve.errors import ArtifactError, InsufficientDataError
from tickserve.events import CLOSE, Events
from tickserve.features.spec import FeatureSpec
from tickserve.store import canonical_json, sha256_bytes, staged_directory, write_json_atomic

__all__ = ["FeatureSet", "FeatureTable", "build_features", "code_version", "open_feature_set"]

Progress = Callable[[int], None]
_ROOT: Final = Path(__file__).resolve().parent.parent
# What decides the numbers of a feature set, relative to the checkout.
_CODE: Final = (
    "tickserve/features/*.py",
    "tickserve/events.py",
    "market/readers/*.py",
    "market/jumps.py",
    "market/quality.py",
    "market/sessions.py",
    "market/build.py",
    "market/feature_store.py",
)
# Compilers and parsers whose next version may give other bits.
_LIBRARIES: Final = ("llvmlite", "numba", "numpy", "polars", "pyarrow")
STRIDE_RULE: Final = (
    "every event is computed; of those past warm-up every k-th is kept, k the smallest power of two that leaves at "
    "most max_rows (0 keeps all)"
)


def build_features(
    source: Source, spec: FeatureSpec, settings: FeatureSettings, progress: Progress | None = None
) -> FeatureSet:
    """The feature set of `source` under `spec`: from `settings.store` where nothing changed, else built.

    What decides is the spec's digest, the digests of the source files and the number of files ignored beside them, the
    code version, the symbol, the venue and `max_rows`.
    A cached set that cannot be verified is built anew. `progress` takes the number of events done.
    Raises InsufficientDataError when no row is past warm-up, DataError from the source, ComponentError when the store
    cannot be written.
    """
    identity = {
        "spec_digest": spec.digest,
        "source_digests": source.digests(),
        "code": code_version(),
        "max_rows": settings.max_rows,
        "symbol": source.symbol,
        "venue": source.venue,
        "ignored_files": source.ignored_files,
    }
    key = sha256_bytes(canonical_json(identity))
    folder = Path(settings.store) / f"{source.symbol}-{spec.name}-{key.removeprefix('sha256:')[:16]}"
    found = _reusable(folder, key)
    if found is not None:
        return found
    with staged_directory(folder, replace=True) as staging:
        meta = _build(source, spec, settings, progress, staging)
        meta = {"format": FORMAT, "key": key, **identity, **meta}
        meta["digest"] = meta_digest(meta)
        write_json_atomic(staging / META_NAME, meta)
    return FeatureSet(folder, meta, reused=False)


def code_version() -> str:
    """`sha256:...` over the source files and the versions of the libraries that decide a feature set's numbers."""
    digest = hashlib.sha256(canonical_json({name: version(name) for name in _LIBRARIES}))
    for pattern in _CODE:
        for path in sorted(_ROOT.glob(pattern)):
            digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return "sha256:" + digest.hexdigest()


def _reusable(folder: Path, key: str) -> FeatureSet | None:
    try:
        found = open_feature_set(folder)
    except ArtifactError:
        return None
    return found if found.meta.get("key") == key else None


def _build(
    source: Source, spec: FeatureSpec, settings: FeatureSettings, progress: Progress | None, folder: Path
) -> dict[str, Any]:
    """Write the parts into `folder`; returns what features.json says about them."""
    writer = PartWriter(folder, source.symbol, spec.kind, spec.columns)
    keeper = _Keeper(settings.max_rows, writer)
    events_read, sessions = 0, 0
    for rows, warm in _computed(source, spec, settings.chunk_rows):
        keeper.add(rows, warm)
        events_read += len(rows)
        sessions = int(rows.session[-1]) + 1
        if progress:
            progress(events_read)
    keeper.finish()
    parts = writer.close()
    if not parts:
        raise InsufficientDataError(
            "no event is past the warm-up of its session",
            field="events",
            expected=f"more than {spec.warmup_events} in one session",
            was=f"{events_read} in {sessions}",
        )
    return {
        "kind": spec.kind,
        "levels": spec.levels,
        "simulated": source.simulated,
        "files": [path.name for path in source.files],
        "spec": spec.to_json(),
        "columns": list(spec.columns),
        "stride": keeper.stride,
        "stride_rule": STRIDE_RULE,
        "events_read": events_read,
        "events_warm": keeper.warm_events,
        "sessions": sessions,
        "rows": sum(part["rows"] for part in parts.values()),
        "parts": parts,
        "quality": source.quality.to_json(),
    }


def _computed(source: Source, spec: FeatureSpec, chunk_rows: int) -> Iterator[tuple[Rows, npt.NDArray[np.intp]]]:
    """Per chunk: all its rows, and which of them are warm."""
    from tickserve.features.engine import FeatureEngine  # numba: only when there is something to compute

    engine, sessions = FeatureEngine(spec), SessionCounter(spec.kind)
    for events in source.chunks(chunk_rows):
        features, index = engine.batch_with_index(events)
        mid, half_spread = _mid_and_half_spread(events)
        session, place = sessions.advance(index, mid)
        yield Rows(events.ts_ns, session, mid, half_spread, features.T), np.flatnonzero(place >= spec.warmup_events)


def _mid_and_half_spread(events: Events) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mid and relative half spread float64 [N]: NaN without two positive prices; bars give the close and NaN."""
    values = events.values
    if events.kind == "bars":
        close = values[:, CLOSE]
        return np.where(np.isfinite(close) & (close > 0), close, np.nan), np.full(len(close), np.nan)
    bid, ask = values[:, 4], values[:, 6]
    good = np.isfinite(bid) & np.isfinite(ask) & (bid > 0) & (ask > 0)
    mid = np.where(good, 0.5 * (bid + ask), np.nan)
    return mid, 0.5 * (np.where(good, ask, np.nan) - bid) / mid


class _Keeper:
    """Keeps every `stride`-th warm row: all of them straight to disk, or at most `max_rows` in memory.

    The stride starts at 1 and doubles whenever more are kept, which drops every other kept row; so one pass gives the
    rows that the final stride alone would have kept.
    """

    def __init__(self, max_rows: int, writer: PartWriter) -> None:
        self.stride, self.warm_events = 1, 0
        self._max_rows, self._writer = max_rows, writer
        self._kept: list[tuple[npt.NDArray[np.int64], Rows]] = []
        self._count = 0

    def add(self, rows: Rows, warm: npt.NDArray[np.intp]) -> None:
        """Take a chunk, of which the rows at `warm` are past warm-up."""
        ordinals = self.warm_events + np.arange(len(warm), dtype=np.int64)
        self.warm_events += len(warm)
        chosen = ordinals % self.stride == 0
        kept = rows.take(warm[chosen])
        if not self._max_rows:
            self._writer.write(kept)
            return
        self._kept.append((ordinals[chosen], kept))
        self._count += len(kept)
        while self._count > self._max_rows:
            self._thin()

    def _thin(self) -> None:
        self.stride *= 2
        for place, (ordinals, rows) in enumerate(self._kept):
            chosen = ordinals % self.stride == 0
            self._kept[place] = (ordinals[chosen], rows.take(np.flatnonzero(chosen)))
        self._count = sum(len(rows) for _, rows in self._kept)

    def finish(self) -> None:
        """Write what is held."""
        for _, rows in self._kept:
            self._writer.write(rows)

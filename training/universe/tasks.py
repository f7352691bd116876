"""The calls of a universe run: what a process is asked to do, and what it answers. Both sides are plain values.

An error never leaves the process that met it as an exception: it is answered as JSON, so that every engine treats it
alike and it can be kept.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from market.build import code_version
from market.feature_store import FeatureSet, open_feature_set
from market.readers.grouping import Group
from tickserve import __version__, pipeline
from tickserve.config import Config
from tickserve.errors import TickserveError
from tickserve.store import canonical_json, sha256_bytes
from training.bundles import TrainedBundle
from training.train import meta_of, train_table
from training.universe.pooled import PooledMetrics, pooled_meta, pooled_table

Say = Callable[[str], None]
# What runs a model or a machine, but does not decide what is learned.
OPERATIONAL = frozenset(
    {"profile", "runtime", "tensorrt", "repository", "serve", "swap", "client", "batching", "loadtest", "journal"}
    | {"limits", "tune", "universe", "features"}
)


@dataclass(frozen=True)
class Call:
    """A function of this module and its arguments, to be run somewhere; `subject` is the symbol it is about."""

    subject: str
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Answer:
    """What a call came to: a `value`, or an `error` as JSON (`told`)."""

    seconds: float
    value: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None


def answer(call: Call, say: Say) -> Answer:
    """Run a call; whatever it raises is answered. Garbage is collected here, between symbols, and nowhere else."""
    started = time.perf_counter()
    try:
        value = call.function(*call.arguments, say)
    except Exception as error:  # one symbol's failure, foreseen or not, is never another's
        return Answer(time.perf_counter() - started, error=told(error))
    finally:
        gc.collect()
    return Answer(time.perf_counter() - started, value)


def told(error: BaseException) -> dict[str, Any]:
    """An error as JSON: its type, message and exit code, and for one that nobody foresaw where it was met."""
    found: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, TickserveError):
        named = {name: getattr(error, name) for name in ("field", "expected", "was", "hint")}
        return found | {name: value for name, value in named.items() if value} | {"exit_code": error.exit_code}
    where = traceback.extract_tb(error.__traceback__)
    met = f"{Path(where[-1].filename).name}:{where[-1].lineno}" if where else ""
    return found | {"exit_code": 1, "unexpected": True, "met": met}


def prepare(group: Group, config: Config, say: Say) -> dict[str, Any]:
    """Build a symbol's features, or find them in the cache; what training has to know of them.

    Raises the errors of `Group.open` and `build_features`, and LimitExceededError.
    """
    built = pipeline.build_features(group.open(config.features.levels), config, say=_named(say, group.name))
    say(f"{group.name}: {built.rows:,} rows, {'reused from the cache' if built.reused else 'built'}")
    return {"folder": str(built.folder), "reused": built.reused} | _described(built) | {"code": code_version()}


def _described(built: FeatureSet) -> dict[str, Any]:
    kept = ("key", "digest", "spec_digest", "source_digests", "kind", "rows", "stride", "events_read", "venue")
    return {name: built.meta[name] for name in kept} | {"spec": built.spec.name, "columns": len(built.meta["columns"])}


def learning_key(config: Config, features: Mapping[str, Any]) -> str:
    """`sha256:...` of what decides a symbol's models: the feature set, everything training reads, and the version."""
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in OPERATIONAL}
    return sha256_bytes(canonical_json({"features": dict(features), "settings": settings, "version": __version__}))


def train_one(name: str, folder: Path, config: Config, out: Path, say: Say) -> dict[str, Any]:
    """Train a symbol's own models from its feature set and write their bundles below `out`.

    Raises the errors of `train` and ArtifactError for a feature set that changed.
    """
    built = open_feature_set(folder)
    meta = replace(meta_of(built), symbol=name)
    table = built.load()
    bundles = train_table(table, meta, config, out, config.families, progress=_named(say, name))
    return {"bundles": [reported(bundle) for bundle in bundles], "span": _span(table.ts_ns)}


def train_pooled(name: str, folders: Mapping[str, Path], config: Config, out: Path, say: Say) -> dict[str, Any]:
    """Train one model of every family on the rows of all symbols in `folders`, by symbol.

    Raises UsageError where the symbols' rows are not alike, and the errors of `train`.
    """
    sets = {symbol: open_feature_set(folder) for symbol, folder in folders.items()}
    meta = pooled_meta(name, sets)
    table, parts = pooled_table(sets)
    bundles = train_table(
        table,
        meta,
        config,
        out,
        config.families,
        progress=_named(say, name),
        parts=tuple(parts.values()),
        also=PooledMetrics(parts),
    )
    return {"bundles": [reported(bundle) for bundle in bundles], "span": _span(table.ts_ns), "symbols": list(parts)}


def _named(say: Say, name: str) -> Say:
    return lambda text: say(f"{name}: {text}")


def _span(ts_ns: np.ndarray[Any, np.dtype[np.int64]]) -> list[str]:
    return [str(time.astype("datetime64[ns]").astype("datetime64[s]")) for time in (ts_ns.min(), ts_ns.max())]


def reported(bundle: TrainedBundle) -> dict[str, Any]:
    """A bundle's name, digests and report."""
    named = {"name": bundle.path.name, "digest": bundle.manifest.digest(), "files": dict(bundle.manifest.files)}
    return named | bundle.report


def with_threads(config: Config, threads: int) -> Config:
    """The configuration with no family taking more than `threads`."""
    taken = {name: getattr(config, name) for name in config.families}
    lowered = {
        name: section.model_copy(update={"threads": min(section.threads, threads)}) for name, section in taken.items()
    }
    return config.model_copy(update=lowered)

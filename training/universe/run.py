"""A universe run from paths to results: every symbol's features and models, then the pooled ones."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from market.readers.grouping import Group, group_sources
from tickserve.config import Config
from tickserve.errors import UsageError
from tickserve.meter import Meter
from tickserve.stages import load_core
from tickserve.store import canonical_json, sha256_bytes
from training.universe.engine import Engine, Lane, Say, threads_of
from training.universe.local import LocalEngine
from training.universe.results import FAILED, TRAINED, Record, RunFolder, exit_code
from training.universe.schedule import PROCESS_MB, Item, Log, Schedule, training_mb
from training.universe.tasks import Answer, Call, learning_key, prepare, train_one, train_pooled, with_threads


@dataclass
class Universe:
    """One run: what it works on and what it has found, by symbol."""

    config: Config
    folder: RunFolder
    say: Say
    records: dict[str, Record]
    trained: int = 0

    def prepared(self, call: Call, answered: Answer) -> Item | None:
        """Features are there: the training that follows, or None where an earlier run did it."""
        features, name = answered.value, call.subject
        key = learning_key(self.config, {"key": features["key"], "name": name})
        done = self.folder.done(name, key)
        if done is not None:
            self.records[name] = done | {"features": features}
            self.say(f"{name}: done before, with the same digests")
            return None
        self.records[name] |= {"key": key, "features": features | {"seconds": round(answered.seconds, 3)}}
        arguments = (name, Path(features["folder"]), self.config, self.folder.bundles)
        return Item(Call(name, train_one, arguments), training_mb(features["rows"], features["columns"]))

    def ended(self, lane: Lane, call: Call, answered: Answer) -> None:
        """A call of a symbol ended: keep what came of it."""
        record = self.records[call.subject]
        if answered.error is not None:
            stage = "features" if lane == "prepare" else "training"
            record |= {"status": FAILED, "stage": stage, "error": answered.error}
            self.say(f"{call.subject}: {stage} failed: {answered.error['message']}")
        elif lane == "train":
            record |= {"status": TRAINED, "seconds": round(answered.seconds, 3)} | answered.value
        else:
            return
        self.folder.write(call.subject, record)


def train_universe(paths: Sequence[Path], config: Config, say: Say, *, run: str | None, resume: bool) -> Record:
    """Train the models of every symbol in `paths`, and the pooled ones; the result is also `<folder>/<id>.json`.

    A symbol that fails is a record with its error; the others go on. Raises UsageError for paths or a run that are not
    there, ComponentError where the folder cannot be written or no cluster answers, MissingExtraError without Ray.
    """
    groups = group_sources(paths)
    _refuse_taken_name(groups, config)
    folder = RunFolder.choose(Path(config.universe.folder), run, resume)
    started = time.perf_counter()
    with folder.held(), _engine(config, say, 1) as engine:
        threads = threads_of(config)
        found = Universe(
            with_threads(config, threads), folder, say, {group.name: {"name": group.name} for group in groups}
        )
        schedule = _schedule(found, engine, config)
        schedule.run(prepare=[_preparing(group, config) for group in groups])
        alone = time.perf_counter() - started
        pooled = _pooled(found, engine, config, schedule.log) if config.universe.pooled else []
    records = [found.records[group.name] for group in groups]
    result = {
        "id": folder.id,
        "folder": str(folder.folder),
        "engine": config.universe.engine,
        "workers": config.universe.workers,
        "threads": threads,
        "ahead": config.universe.ahead,
        "seconds": round(time.perf_counter() - started, 3),
        "symbols_seconds": round(alone, 3),
        **_memory(schedule.log, config),
        "symbols": records,
        "pooled": pooled,
        "exit_code": exit_code(records) or int(any(record["status"] == FAILED for record in pooled)),
    }
    folder.write_whole(result)
    return result


def build_universe(paths: Sequence[Path], config: Config, say: Say) -> Record:
    """Build the features of every symbol in `paths`, `universe.workers` at a time, and nothing else.

    The feature sets are those of `build_features` for each symbol alone. Raises as `train_universe`.
    """
    groups, started = group_sources(paths), time.perf_counter()
    records: dict[str, Record] = {group.name: {"name": group.name} for group in groups}

    def ended(_: Lane, call: Call, answered: Answer) -> None:
        failure = {"status": FAILED, "stage": "features", "error": answered.error}
        done = {"status": "built", "seconds": round(answered.seconds, 3)} | answered.value
        records[call.subject] |= failure if answered.error is not None else done

    with _engine(config, say, config.universe.workers) as engine:
        limit = _limit_mb(config)
        schedule = Schedule(engine, ahead=len(groups), limit_mb=limit, prepared=lambda *_: None, ended=ended)
        schedule.run(prepare=[_preparing(group, config) for group in groups])
    found = list(records.values())
    return {
        "engine": config.universe.engine,
        "workers": config.universe.workers,
        "seconds": round(time.perf_counter() - started, 3),
        **_memory(schedule.log, config),
        "symbols": found,
        "exit_code": exit_code(found),
    }


def _refuse_taken_name(groups: Sequence[Group], config: Config) -> None:
    if config.universe.pooled and config.universe.name in {group.name for group in groups}:
        raise UsageError("a symbol has this name", field="universe.name", was=config.universe.name)


def _preparing(group: Group, config: Config) -> Item:
    return Item(Call(group.name, prepare, (group, config)), PROCESS_MB)


def _limit_mb(config: Config) -> float:
    return float(config.universe.memory_mb or config.limits.memory_mb)


def _memory(log: Log, config: Config) -> Record:
    return {
        "memory_limit_mb": _limit_mb(config),
        "peak_memory_mb": log.peak_memory_mb or None,
        "waited_for_memory": sorted(log.waited_for_memory),
        "ended_for_memory": log.ended_for_memory,
    }


def _schedule(found: Universe, engine: Engine, config: Config) -> Schedule:
    return Schedule(
        engine, ahead=config.universe.ahead, limit_mb=_limit_mb(config), prepared=found.prepared, ended=found.ended
    )


@contextmanager
def _engine(config: Config, say: Say, preparing: int) -> Iterator[Engine]:
    """The configured engine, ended with the block."""
    settings, threads = config.universe, threads_of(config)
    with Meter() as meter:
        if settings.engine == "ray":
            module = load_core("training.universe.on_ray")
            engine = cast(Engine, module.RayEngine(settings.ray_address, settings.workers, threads, say))
        else:
            lanes: dict[Lane, int] = {"prepare": preparing, "train": settings.workers}
            engine = LocalEngine(lanes, threads, meter, say)
        try:
            yield engine
        finally:
            engine.close()


def _pooled(found: Universe, engine: Engine, config: Config, log: Log) -> list[Record]:
    """The pooled models: one for each feature spec that at least two symbols share and were trained with."""
    records: list[Record] = []
    for members in _alike(found.records):
        name = f"pooled/{config.universe.name}-{members[0]['features']['spec']}"
        record = {"name": name.partition("/")[2], "symbols": [member["name"] for member in members]}
        records.append(_one_pooled(found, engine, config, name, record, members, log))
    return records


def _alike(records: Mapping[str, Record]) -> list[list[Record]]:
    usable = [record for record in records.values() if record["status"] != FAILED]
    specs = sorted({record["features"]["spec_digest"] for record in usable})
    groups = [[record for record in usable if record["features"]["spec_digest"] == spec] for spec in specs]
    return [group for group in groups if len(group) > 1]


def _one_pooled(
    found: Universe,
    engine: Engine,
    config: Config,
    name: str,
    record: Record,
    members: Sequence[Record],
    log: Log,
) -> Record:
    key = sha256_bytes(canonical_json([config.universe.name, *(member["key"] for member in members)]))
    done = found.folder.done(name, key)
    if done is not None:
        found.say(f"{record['name']}: done before, with the same digests")
        return done
    folders = {member["name"]: Path(member["features"]["folder"]) for member in members}
    arguments = (config.universe.name, folders, found.config, found.folder.bundles)
    rows = sum(member["features"]["rows"] for member in members)
    need = training_mb(rows, members[0]["features"]["columns"])
    ends: list[Answer] = []
    schedule = Schedule(
        engine,
        ahead=0,
        limit_mb=_limit_mb(config),
        prepared=lambda *_: None,
        ended=lambda _, __, answered: ends.append(answered),
    )
    schedule.run(train=[Item(Call(record["name"], train_pooled, arguments), need)])
    log.peak_memory_mb = max(log.peak_memory_mb, schedule.log.peak_memory_mb)
    (answered,) = ends
    record |= {"key": key, "rows": rows, "seconds": round(answered.seconds, 3)}
    if answered.error is not None:
        record |= {"status": FAILED, "stage": "training", "error": answered.error}
        found.say(f"{record['name']}: training failed: {answered.error['message']}")
    else:
        record |= {"status": TRAINED} | answered.value
    found.folder.write(name, record)
    return record

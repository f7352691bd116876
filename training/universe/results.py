"""The files of a run: one for each symbol as soon as it is done, one for the whole; and what of them may be kept.

runs/universe/<id>/<symbol>.json         features, bundles with their reports, or the error
runs/universe/<id>/pooled/<name>.json    the same of a pooled model
runs/universe/<id>/bundles/<model>/      the bundles
runs/universe/<id>.json                  the whole run
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tickserve.errors import ArtifactError, ComponentError, UsageError
from tickserve.manifest import load_bundle
from tickserve.store import check_writable, write_json_atomic

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
TRAINED, REUSED, FAILED = "trained", "reused", "failed"
Record = dict[str, Any]


class RunFolder:
    """Where one run keeps its results."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bundles = folder, folder / "bundles"

    @classmethod
    def choose(cls, root: Path, run: str | None, resume: bool) -> RunFolder:
        """A new folder below `root`, or with `resume` the one called `run`, by default the newest.

        Raises UsageError for an unsafe name, a run that is there without `resume`, and none that is there with it.
        """
        check_writable(root)
        if run is not None and (not RUN_ID.fullmatch(run) or ".." in run):
            raise UsageError("not a safe name", field="--run", expected="1 to 100 of [A-Za-z0-9._-]", was=run[:40])
        there = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime_ns)
        if resume:
            found = [path for path in there if run is None or path.name == run]
            if not found:
                raise UsageError("no run to go on with", field="--resume", expected=f"a run in {str(root)!r}", was=run)
            return cls(found[-1])
        name = run or _new_name(root)
        if (root / name).exists():
            raise UsageError("the run is there already", field="--run", was=name, hint="go on with it by --resume")
        return cls(root / name)

    @property
    def id(self) -> str:
        """The run's name."""
        return self.folder.name

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run alone on this machine. Raises ComponentError when another process holds it."""
        check_writable(self.bundles)
        with (self.folder / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ComponentError("another process works on this run", field="--run", was=self.id) from error
            yield

    def write(self, name: str, record: Record) -> None:
        """Keep a symbol's record, or a pooled model's as `pooled/<name>`."""
        write_json_atomic(self.folder / f"{name}.json", record)

    def write_whole(self, result: Record) -> None:
        """Keep the result of the run."""
        write_json_atomic(self.folder.with_name(f"{self.id}.json"), result)

    def done(self, name: str, key: str) -> Record | None:
        """The record of work that is done under this key, where its bundles are still whole; else None."""
        try:
            record = json.loads((self.folder / f"{name}.json").read_text("utf-8"))
            if record["status"] == FAILED or record["key"] != key or not record["bundles"]:
                return None
            for bundle in record["bundles"]:
                if load_bundle(self.bundles / bundle["name"]).digest() != bundle["digest"]:
                    return None
        except (OSError, ValueError, KeyError, TypeError, ArtifactError):
            return None
        return dict(record) | {"status": REUSED}


def _new_name(root: Path) -> str:
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    names = (name, *(f"{name}-{number}" for number in range(2, 100)))
    return next((each for each in names if not (root / each).exists()), f"{name}-100")


def exit_code(records: Sequence[Mapping[str, Any]]) -> int:
    """0 where nothing failed; where all symbols failed for one reason its code (3 for bad data); else 1."""
    codes = [record["error"]["exit_code"] for record in records if record["status"] == FAILED]
    if not codes:
        return 0
    return int(codes[0]) if len(codes) == len(records) and len(set(codes)) == 1 else 1

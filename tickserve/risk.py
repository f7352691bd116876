"""The action file: what monitoring asks of each model's signals. `tickserve monitor export` writes it, a client obeys.

One JSON object, written atomically: `format`, `written_ns` (wall clock) and `models`, by name: `action` (none, label,
shrink, flat), `factor` (what an engine multiplies its size by), `reason`, `since_ns`, `version` of the model,
`measured`: whether there was enough to judge by, `cause`: what was judged, `bundle_digest`: of the model that was
judged, and `cleared_ns`: when a person lifted its action last. docs/drift.md says what each action does, and what
becomes of a file that cannot be trusted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tickserve.errors import ArtifactError, UsageError
from tickserve.store import canonical_json, write_atomic

FORMAT: Literal["tickserve.risk-actions/1"] = "tickserve.risk-actions/1"
MAX_BYTES = 1024 * 1024
HELD_S, LOOK_S = 2.0, 0.02
Action = Literal["none", "label", "shrink", "flat"]
ACTIONS: tuple[Action, ...] = ("none", "label", "shrink", "flat")  # each asks for more than the one before


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelAction(_Stored):
    """What is asked of one model's signals, why, and since when (wall clock)."""

    action: Action = "none"
    factor: float = Field(1.0, ge=0, le=1)
    reason: str = Field("", max_length=500)
    since_ns: int = 0
    version: str = ""
    measured: bool = True
    cause: Literal["", "features", "score", "calibration"] = ""
    bundle_digest: str = ""
    cleared_ns: int = Field(0, ge=0)


class ActionFile(_Stored):
    """The whole file."""

    format: Literal["tickserve.risk-actions/1"] = FORMAT
    written_ns: int = Field(gt=0)
    models: dict[str, ModelAction]


def write_actions(path: Path, written_ns: int, models: Mapping[str, ModelAction]) -> None:
    """Replace the file, whole or not at all. Raises ComponentError."""
    write_atomic(path, canonical_json(ActionFile(written_ns=written_ns, models=dict(models)).model_dump()) + b"\n")


@contextmanager
def actions_held(path: Path) -> Iterator[None]:
    """Keep other writers of the file off meanwhile: 2 s at most, and nobody where the folder cannot be locked."""
    folder = -1
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
    try:
        if folder >= 0:
            _lock(folder)
        yield
    finally:
        if folder >= 0:
            os.close(folder)


def _lock(folder: int) -> None:
    import fcntl  # a client, which only reads, does without

    end = time.monotonic() + HELD_S
    while time.monotonic() < end:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOOK_S)
        except OSError:  # a file system without locks
            return
        else:
            return


def clear_action(path: Path, model: str) -> ModelAction:
    """Lift what is asked of a model, as a person decides; what was asked before.

    Clients lift it at once. An exporter takes it up and measures the model anew, from this moment on. Raises
    UsageError for a model that is not in the file, ArtifactError, ComponentError, and OSError.
    """
    with actions_held(path):
        told = read_actions(path)
        before = told.models.get(model)
        if before is None:
            known = ", ".join(sorted(told.models)[:10]) or "none"
            raise UsageError("not in the action file", field="model", expected=f"one of: {known}", was=model[:100])
        now_ns = max(time.time_ns(), before.cleared_ns + 1)
        reason = f"cleared by a person, was {before.action}: {before.reason}"[:500]
        cleared = ModelAction(reason=reason, since_ns=now_ns, version=before.version, cleared_ns=now_ns)
        write_actions(path, max(now_ns, told.written_ns), {**told.models, model: cleared})
    return before


def read_actions(path: Path) -> ActionFile:
    """What the file says. Raises ArtifactError for what is none of these files, and OSError for what cannot be read."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ArtifactError("not an action file", field=path.name, expected=f"at most {MAX_BYTES} bytes")
    try:
        return ActionFile.model_validate(json.loads(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:100]
        raise ArtifactError(f"not an action file: {where}: {first['msg']}", field=path.name) from error
    except (ValueError, RecursionError) as error:  # torn, empty, not UTF-8, not JSON
        raise ArtifactError("not an action file: not JSON", field=path.name) from error

"""A TensorRT plan and what it is bound to: stored under its key, and refused anywhere else.

    <model>/tensorrt.timing                            tactics that were timed, where the build job ran in the cluster
    <model>/<n>/plans/<key>/{model.plan, plan.json}

A plan holds for one compute capability, one TensorRT, one driver, one graph and one set of build flags. The key is the
digest of these; the folder appears by a rename, and a plan that is there is never written again. Plans lie beside what
the version's manifest names: they are made after it was published and signed, each on its own kind of node.

No server loads a plan, and `repo push`, `pull` and `sync` leave plans behind: they are of one machine. plan.json holds
the gates' verdicts and the timings, and proves that model.plan is whole and what it was built for, not who built it:
whoever may write to the repository can write both. TensorRT runs what a plan says, so let nobody else write there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.tensorrt.target import Target
from tickserve.errors import ArtifactError, DigestMismatchError, ForeignPlanError
from tickserve.store import canonical_json, sha256_bytes, staged_directory, write_json_atomic

PLANS = "plans"
PLAN_FILE = "model.plan"
RECORD_FILE = "plan.json"
# In the model's folder, which Triton takes for no version: the next version of the same shape finds its tactics there.
TIMINGS = "tensorrt.timing"
SCHEMA = 1
KEY_DIGITS = 16
MAX_RECORD_BYTES = 262_144
AMPERE = (8, 0)


@dataclass(frozen=True)
class PlanKey:
    """Everything a plan is bound to. `flags` are JSON values: precision, profiles and compatibility of the build."""

    sm: str
    tensorrt: str
    driver: str
    onnx_sha256: str
    flags: Mapping[str, Any]

    @classmethod
    def of(cls, target: Target, onnx_sha256: str, flags: Mapping[str, Any]) -> PlanKey:
        """The key of what `target` would build from a graph."""
        return cls(target.sm, target.tensorrt, target.driver, onnx_sha256, flags)

    def text(self) -> str:
        """The name of the plan's folder: 16 hex digits."""
        return sha256_bytes(canonical_json(asdict(self))).removeprefix("sha256:")[:KEY_DIGITS]


def plan_folder(version: Path, key: PlanKey) -> Path:
    """Where a version's plan of this key is."""
    return version / PLANS / key.text()


def write_plan(version: Path, key: PlanKey, plan: bytes, extra: Mapping[str, Any]) -> Path:
    """Store an accepted plan and what was measured of it (`extra`, JSON values): whole, or not at all.

    Raises ComponentError when it cannot be written or is there already.
    """
    folder = plan_folder(version, key)
    record = {"schema_version": SCHEMA, "key": asdict(key), "plan_sha256": sha256_bytes(plan), "bytes": len(plan)}
    with staged_directory(folder) as staging:
        (staging / PLAN_FILE).write_bytes(plan)
        write_json_atomic(staging / RECORD_FILE, record | dict(extra))
    return folder


def read_plan(folder: Path, target: Target, onnx_sha256: str) -> tuple[bytes, PlanKey]:
    """The bytes of a plan, once they are whole and this machine is one it was built for.

    Raises ForeignPlanError, DigestMismatchError and ArtifactError.
    """
    plan, key = read_whole(folder)
    check_native(key, target, onnx_sha256)
    return plan, key


def read_whole(folder: Path) -> tuple[bytes, PlanKey]:
    """The bytes of a plan and its key, once they are what its record says; for this machine or for another.

    Raises DigestMismatchError and ArtifactError.
    """
    record = _record(folder)
    key = _key(record)
    if folder.name != key.text():
        raise DigestMismatchError("wrong key", field=RECORD_FILE, expected=folder.name[:100], was=key.text())
    path = folder / PLAN_FILE
    if path.is_symlink() or not path.is_file():
        raise ArtifactError("no plain file beside its record", field=PLAN_FILE)
    plan = path.read_bytes()
    actual = sha256_bytes(plan)
    if actual != record.get("plan_sha256"):
        expected = str(record.get("plan_sha256"))[:100]
        raise DigestMismatchError("wrong digest", field=PLAN_FILE, expected=expected, was=actual)
    return plan, key


def check_native(key: PlanKey, target: Target, onnx_sha256: str) -> None:
    """Raise ForeignPlanError unless a plan of this key is for this graph, GPU, TensorRT and driver."""
    pairs = (
        ("onnx_sha256", key.onnx_sha256 == onnx_sha256, key.onnx_sha256, onnx_sha256),
        ("sm", _same_hardware(key, target), key.sm, target.sm),
        ("tensorrt", _same_release(key, target), key.tensorrt, target.tensorrt),
        ("driver", key.driver == target.driver, key.driver, target.driver),
    )
    for field, same, built, here in pairs:
        if not same:
            raise ForeignPlanError("a plan that was built for another one", field=field, expected=here, was=built[:100])


def _same_hardware(key: PlanKey, target: Target) -> bool:
    if key.sm == target.sm:
        return True
    both = (_numbers(key.sm), _numbers(target.sm))
    return key.flags.get("hardware_compatible") == "ampere_plus" and min(both) >= AMPERE


def _same_release(key: PlanKey, target: Target) -> bool:
    """The same release; or, for a version-compatible plan, a later one of the same major release."""
    if key.tensorrt == target.tensorrt:
        return True
    built, here = _numbers(key.tensorrt), _numbers(target.tensorrt)
    return bool(key.flags.get("version_compatible")) and built[:1] == here[:1] and built <= here


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else -1 for part in version.split("."))


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD_FILE
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_RECORD_BYTES:
        raise ArtifactError("no record of a plan", field=RECORD_FILE, expected="a plain file of JSON")
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError("the record of a plan is not JSON", field=RECORD_FILE) from error
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA:
        raise ArtifactError("not a record of a plan", field=RECORD_FILE, expected=f"schema_version {SCHEMA}")
    return record


def _key(record: Mapping[str, Any]) -> PlanKey:
    found = record.get("key")
    names = ("sm", "tensorrt", "driver", "onnx_sha256")
    if not isinstance(found, dict) or set(found) != {*names, "flags"} or not isinstance(found["flags"], dict):
        raise ArtifactError("not the key of a plan", field="key", expected=", ".join((*names, "flags")))
    for name in names:
        if not isinstance(found[name], str):
            raise ArtifactError("not the key of a plan", field=f"key.{name}", expected="text")
    return PlanKey(**found)

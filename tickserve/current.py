"""The version in force of each published model: `<repository>/<model>/current.json`.

    {"version": 4, "manifest_sha256": "sha256:...", "previous": 3}

What Triton loads is `config.pbtxt`'s to say; which of the loaded versions an engine asks for is said here, so that a
version can be loaded and warmed before the first request goes to it. Written by an atomic rename: a reader sees the
old choice or the new one. The digest of the manifest keeps the file from pointing at other bytes than were chosen.
A repository without the file is served by its newest version.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tickserve.errors import ArtifactError, DigestMismatchError
from tickserve.manifest import MANIFEST_NAME
from tickserve.store import sha256_file, write_atomic

CURRENT_NAME = "current.json"
MAX_BYTES = 4_096
DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Current:
    """The version in force, the digest of its manifest.json, and the version that was in force before it."""

    version: int
    manifest_sha256: str
    previous: int | None = None

    def to_json(self) -> bytes:
        """What `current.json` holds."""
        value: dict[str, object] = {"version": self.version, "manifest_sha256": self.manifest_sha256}
        if self.previous is not None:
            value["previous"] = self.previous
        return (json.dumps(value, indent=2) + "\n").encode()


def read_current(model_folder: Path) -> Current | None:
    """What `current.json` of a model's folder says; None without the file.

    Raises ArtifactError for content that is not a choice. Whether the version is there is `folder_in_force`'s to say.
    """
    try:
        with (model_folder / CURRENT_NAME).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtifactError(f"cannot read: {error.strerror}", field=CURRENT_NAME) from error
    if len(data) > MAX_BYTES:
        raise ArtifactError("too large", field=CURRENT_NAME, expected=f"at most {MAX_BYTES} bytes")
    return _parse(data)


def _parse(data: bytes) -> Current:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError("not JSON", field=CURRENT_NAME) from error
    if not isinstance(value, dict):
        raise ArtifactError("wrong type", field=CURRENT_NAME, expected="an object", was=type(value).__name__)
    unknown = sorted(set(value) - {"version", "manifest_sha256", "previous"})
    if unknown:
        raise ArtifactError("unknown member", field=f"{CURRENT_NAME}: {str(unknown[0])[:50]}")
    digest, previous = value.get("manifest_sha256"), value.get("previous")
    if not isinstance(digest, str) or not DIGEST_PATTERN.fullmatch(digest):
        raise _wrong("manifest_sha256", "sha256:<64 hex digits>", digest)
    before = None if previous is None else _number("previous", previous)
    return Current(_number("version", value.get("version")), digest, before)


def _number(field: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 10**18:
        raise _wrong(field, "a whole number from 1", value)
    return value


def _wrong(field: str, expected: str, was: object) -> ArtifactError:
    return ArtifactError("wrong value", field=f"{CURRENT_NAME}: {field}", expected=expected, was=repr(was)[:80])


def folder_in_force(model_folder: Path) -> Path | None:
    """The folder of the version in force, its manifest held against `current.json`; None without the file.

    Raises ArtifactError when the version is not there, DigestMismatchError when its manifest is another one.
    """
    current = read_current(model_folder)
    if current is None:
        return None
    folder = model_folder / str(current.version)
    actual = _manifest_digest(folder)
    if actual != current.manifest_sha256:
        raise DigestMismatchError(
            f"model {model_folder.name!r} version {current.version} is not the one put in force",
            field=CURRENT_NAME,
            expected=current.manifest_sha256,
            was=actual,
        )
    return folder


def choose(model_folder: Path, version: int) -> Current:
    """The choice of `version`, not yet written; the choice before it is its `previous`. Raises ArtifactError."""
    return Current(version, _manifest_digest(model_folder / str(version)), _previous(model_folder, version))


def write_current(model_folder: Path, version: int) -> Current:
    """Put `version` in force, atomically, and give what was written.

    Raises ArtifactError when there is no such version, ComponentError when the folder cannot be written.
    """
    current = choose(model_folder, version)
    write_atomic(model_folder / CURRENT_NAME, current.to_json())
    return current


def _previous(model_folder: Path, version: int) -> int | None:
    try:
        before = read_current(model_folder)
    except ArtifactError:
        return None  # a damaged choice is replaced by the new one
    if before is None:
        return None
    return before.previous if before.version == version else before.version


def _manifest_digest(folder: Path) -> str:
    try:
        return sha256_file(folder / MANIFEST_NAME)
    except OSError as error:
        raise ArtifactError(
            f"model {folder.parent.name!r} has no version {folder.name}", field=MANIFEST_NAME, hint=error.strerror
        ) from error

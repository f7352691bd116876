"""Atomic files and directories, and their digests: nothing half-written is ever visible under its final name.

A file is written beside its target, flushed to disk, and renamed; a directory is staged beside its target and renamed
as a whole. Readers see the old thing, the new thing, or nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tickserve.errors import ComponentError

STAGING_PREFIX = ".staging-"


def canonical_json(value: Any) -> bytes:
    """`value` as the one JSON text its digest is taken over: sorted keys, no spaces, UTF-8, no NaN.

    Raises ValueError for NaN or infinity, which JSON cannot carry.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_bytes(data: bytes) -> str:
    """`sha256:<hex>` of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """`sha256:<hex>` of a file, read in chunks."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`: a temporary file beside it, fsync, rename.

    Raises ComponentError when the folder cannot be written (full disk, read-only file system, no permission); the
    old content is then still there.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=STAGING_PREFIX)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as indented JSON (keys in the given order), atomically. Raises as `write_atomic`."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def unwritable(path: Path, error: OSError) -> ComponentError:
    """The typed error for a folder or file that cannot be written."""
    return ComponentError(
        f"cannot write {path.name!r} in {str(path.parent)!r}: {error.strerror or error}",
        hint="choose a writable output folder",
    )


def check_writable(folder: Path) -> None:
    """Make `folder` and try to write in it, before work is spent on what is to go there. Raises ComponentError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(folder, error) from error


@contextmanager
def staged_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, renamed to `target` when the block ends well and removed when it does not.

    With `replace`, a `target` that exists is swapped out and removed afterwards; without it, it is an error.
    Raises ComponentError when the folder cannot be written or `target` exists.
    """
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=STAGING_PREFIX))
        staging.chmod(0o755)
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        _commit_directory(staging, target, replace=replace)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _commit_directory(staging: Path, target: Path, *, replace: bool) -> None:
    if not target.exists():
        staging.rename(target)
    elif replace:
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=STAGING_PREFIX)) / "old"
        target.rename(old)
        try:
            staging.rename(target)
        except OSError:
            old.rename(target)
            raise
        finally:
            shutil.rmtree(old.parent, ignore_errors=True)
    else:
        raise ComponentError(f"{target.name!r} exists already", hint="a version is immutable: publish the next one")
    with suppress(OSError):
        _sync_directory(target.parent)

"""Checkpoints of a fit on disk: safetensors and JSON, compressed, each a folder that is there whole or not at all.

`weights` holds the net alone, `state` what else is needed to go on with the same bits: the optimizer, the random
numbers, the best weights so far. The digest file is written last and names the bytes of every other file; what it does
not vouch for is never read. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import zstandard
from safetensors.torch import load, save

from tickserve.errors import ArtifactError
from tickserve.store import (
    STAGING_PREFIX,
    canonical_json,
    sha256_bytes,
    sha256_file,
    staged_directory,
    write_json_atomic,
)

FORMAT: Final = 1
DIGEST_NAME: Final = "digest.json"
WEIGHTS, STATE = "weights.safetensors.zst", "state.safetensors.zst"
PROGRESS: Final = "progress.json"
FOLDER_PREFIX: Final = "step-"
MAX_DIGEST_BYTES: Final = 65_536

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A fit after `step` steps: the net's weights, the other tensors by name, and JSON values."""

    step: int
    weights: Tensors
    state: Tensors
    progress: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one fit, of which the newest `keep` stay. `level` is that of zstd."""

    def __init__(self, folder: Path, keep: int = 2, level: int = 3) -> None:
        self.folder, self._keep, self._level = folder, keep, level

    def write(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint and remove those that are older than the newest `keep`.

        Raises ComponentError when the folder cannot be written (full disk, read-only); what was there stays.
        """
        target = self.folder / f"{FOLDER_PREFIX}{checkpoint.step:012d}"
        with staged_directory(target, replace=True) as staging:
            for name, tensors in ((WEIGHTS, checkpoint.weights), (STATE, checkpoint.state)):
                self._compress(save(tensors), staging / name)
            write_json_atomic(staging / PROGRESS, checkpoint.progress)
            _write_digest(staging, checkpoint.step)
        for old in sorted(self._folders(), reverse=True)[self._keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def _compress(self, data: bytes, path: Path) -> None:
        compressor = zstandard.ZstdCompressor(level=self._level, write_checksum=True)
        with path.open("wb") as file, compressor.stream_writer(file, size=len(data), closefd=False) as writer:
            writer.write(data)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; one that is damaged is passed over for the one before it."""
        for folder in sorted(self._folders(), reverse=True):
            try:
                return read_checkpoint(folder)
            except ArtifactError:
                continue
        return None

    def clear(self) -> None:
        """Remove every checkpoint of the fit, and what a killed process left half-written."""
        for folder in (*self._folders(), *self._leftovers()):
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a killed process left half-written."""
        for folder in self._leftovers():
            shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> Iterator[Path]:
        return self.folder.glob(f"{FOLDER_PREFIX}[0-9]*")

    def _leftovers(self) -> Iterator[Path]:
        return self.folder.glob(f"{STAGING_PREFIX}*")


def _write_digest(folder: Path, step: int) -> None:
    files = {
        path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size} for path in sorted(folder.iterdir())
    }
    said = {"format": FORMAT, "step": step, "files": files}
    write_json_atomic(folder / DIGEST_NAME, said | {"digest": sha256_bytes(canonical_json(said))})


def read_checkpoint(folder: Path) -> Checkpoint:
    """One checkpoint, verified. Raises ArtifactError naming the file that is missing, cut or changed."""
    said = _read_digest(folder)
    data = {name: _read_verified(folder / name, said["files"]) for name in (WEIGHTS, STATE, PROGRESS)}
    try:
        weights, state = (_tensors(data[name]) for name in (WEIGHTS, STATE))
        return Checkpoint(said["step"], weights, state, json.loads(data[PROGRESS]))
    except Exception as error:  # each library has errors of its own for bytes that are none of its format
        raise ArtifactError("not a checkpoint", field=folder.name) from error


def _tensors(data: bytes) -> Tensors:
    """By name, in the order of the names: processes that share shards have to take them up in the same order."""
    return dict(sorted(load(zstandard.ZstdDecompressor().decompress(data)).items()))


def _read_digest(folder: Path) -> dict[str, Any]:
    path = folder / DIGEST_NAME
    try:
        if path.stat().st_size > MAX_DIGEST_BYTES:
            raise ValueError("too long")
        said = json.loads(path.read_text("utf-8"))
        digest = said.pop("digest")
        whole = said["format"] == FORMAT and digest == sha256_bytes(canonical_json(said))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError("no checkpoint that was finished", field=f"{folder.name}/{DIGEST_NAME}") from error
    if not whole:
        raise ArtifactError("another format, or changed", field=f"{folder.name}/{DIGEST_NAME}")
    checked: dict[str, Any] = said
    return checked


def _read_verified(path: Path, files: dict[str, Any]) -> bytes:
    try:
        data = path.read_bytes()
        right = sha256_bytes(data) == files[path.name]["sha256"]
    except (OSError, KeyError) as error:
        raise ArtifactError("missing or unreadable", field=f"{path.parent.name}/{path.name}") from error
    if not right:
        raise ArtifactError("cut or changed", field=f"{path.parent.name}/{path.name}")
    return data

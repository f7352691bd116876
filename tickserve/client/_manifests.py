"""The manifests an engine pins: from objects, files, version directories, or a whole repository folder.

They come out of band, never from the server that is to be held against them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tickserve.client._check import Contract
from tickserve.current import folder_in_force
from tickserve.errors import ArtifactError, UsageError
from tickserve.manifest import MANIFEST_NAME, MODEL_NAME_PATTERN, Manifest, load_manifest, parse_manifest

ManifestSource = Manifest | Path | str
Manifests = ManifestSource | Mapping[str, ManifestSource]
_EXPECTED = "a Manifest, a path, or a mapping from model to those"


class Pinned(NamedTuple):
    """A contract, and the version to ask for: None is the newest the server has."""

    contract: Contract
    version: int | None


def _version_of(folder: Path) -> int | None:
    name = folder.resolve().name
    return int(name) if name.isascii() and name.isdigit() and len(name) < 19 and int(name) > 0 else None


def newest_versions(repository: Path) -> dict[str, Path]:
    """For each model of a repository folder the version directory to ask for.

    That is the version its `current.json` puts in force, and without one the newest that holds a manifest. Raises
    ArtifactError when there is none, or when the version in force is not there as it was chosen.
    """
    found: dict[str, Path] = {}
    for path in repository.glob(f"*/*/{MANIFEST_NAME}"):
        folder, model = path.parent, path.parent.parent.name
        version = _version_of(folder)
        if version is None or not MODEL_NAME_PATTERN.fullmatch(model):
            continue  # a staging folder, not a version
        newest = _version_of(found[model]) if model in found else None
        if newest is None or version > newest:
            found[model] = folder
    if not found:
        raise ArtifactError(f"no model version with a {MANIFEST_NAME} in {repository.name!r}", field="repository")
    return {model: folder_in_force(repository / model) or newest for model, newest in sorted(found.items())}


def load_manifests(repository: Path) -> dict[str, Manifest]:
    """The manifest of each model's version in `newest_versions`. Raises ArtifactError."""
    return {model: load_manifest(folder) for model, folder in newest_versions(repository).items()}


def pin(manifests: Manifests | None) -> dict[str, Pinned]:
    """Contracts by model name. A path to a version directory pins that version as well.

    Raises UsageError for a wrong type or name, ArtifactError for a manifest that cannot be trusted.
    """
    if manifests is None:
        return {}
    if isinstance(manifests, Mapping):
        return {model: _pin_named(model, source) for model, source in manifests.items()}
    if _is_repository(manifests):
        return {model: _pin_one(folder) for model, folder in newest_versions(Path(str(manifests))).items()}
    pinned = _pin_one(manifests)
    return {pinned.contract.name: pinned}


def _is_repository(source: ManifestSource) -> bool:
    if isinstance(source, Manifest) or not isinstance(source, str | os.PathLike):
        return False
    path = Path(source)
    return path.is_dir() and not (path / MANIFEST_NAME).exists()


def _pin_named(model: str, source: ManifestSource) -> Pinned:
    pinned = _pin_one(source)
    if pinned.contract.name != model:
        raise UsageError(
            "the manifest is of another model",
            field="manifest",
            expected=repr(model)[:100],
            was=repr(pinned.contract.name),
        )
    return pinned


def _pin_one(source: ManifestSource) -> Pinned:
    if isinstance(source, Manifest):
        return Pinned(Contract(source), None)
    if not isinstance(source, str | os.PathLike):
        raise UsageError("wrong type", field="manifest", expected=_EXPECTED, was=type(source).__name__)
    path = Path(source)
    if path.is_dir():
        return Pinned(Contract(load_manifest(path)), _version_of(path))
    if not path.is_file():
        raise UsageError("no such file", field="manifest", expected=_EXPECTED, was=repr(path.name)[:100])
    version = _version_of(path.parent) if path.name == MANIFEST_NAME else None
    return Pinned(Contract(parse_manifest(path.read_bytes())), version)

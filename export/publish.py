"""Publishing a version into a Triton model repository: all of it, or nothing anyone can see.

    <repository>/<model>/config.pbtxt                      belongs to the model, replaced by rename
    <repository>/<model>/current.json                      the version in force, replaced by rename
    <repository>/<model>/<n>/{model.onnx, manifest.json, golden.npz, manifest.sig}   immutable

A version is staged beside its place under a name Triton does not take for a version (it has to start with a digit),
verified by reading it back, signed where there is a key, and renamed; that rename commits the publish. config.pbtxt is
replaced just before, with the new manifest's digest: after a crash in between it names a version that is not there,
which Triton never looks up and the next publish overwrites, while the other order could serve a version whose digest no
one listed. current.json comes last: an engine asks for the new version only once it is there. A model's first version
comes as a whole folder, since Triton would report a model folder without a version as broken; it is staged beside the
repository, because every folder inside is a model to Triton. One publish at a time, by a lock file.
"""

from __future__ import annotations

import io
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.largest_batch import fitted, largest_batch
from export.onnx_graph import PROBABILITIES
from export.packed import pack
from export.parity import Recorded
from export.repository.loaded import by_number, versions_to_load
from export.repository.lock import locked
from export.repository.places import MKDTEMP_SUFFIX, new_model_staging
from export.triton_config import build_config, parse_config
from export.verify import numbers_in, verify_version, versions_of
from tickserve.config import ExportSettings, RepositorySettings
from tickserve.current import Current, read_current, write_current
from tickserve.errors import ArtifactError, SignatureError
from tickserve.manifest import GOLDEN_NAME, MANIFEST_NAME, ExportRecord, Manifest, load_manifest, write_manifest
from tickserve.model_config import CONFIG_NAME, MODEL_FILE
from tickserve.runtimes import Gated
from tickserve.signing import SigningKey, TrustedKeys, sign_version, signing_key, trusted_keys, verify_signature
from tickserve.store import STAGING_PREFIX, sha256_file, staged_directory, unwritable, write_atomic


@dataclass(frozen=True)
class Release:
    """What is published: the manifest with its export record, the served graph, and the golden pairs."""

    manifest: Manifest
    graph: bytes
    golden: bytes


@dataclass(frozen=True)
class Terms:
    """Who signs what is published, whose signatures are trusted, and whether it is put in force."""

    key: SigningKey | None = None
    trusted: TrustedKeys | None = None
    activate: bool = True

    @classmethod
    def of(cls, settings: RepositorySettings, *, activate: bool = True) -> Terms:
        """The terms that the settings and the environment give. Raises ConfigError for a key that is none."""
        return cls(signing_key(settings), trusted_keys(settings), activate)

    def check(self) -> None:
        """Raise SignatureError when what is published under these terms would be refused by whoever loads it."""
        if self.trusted is None:
            return
        wanted = " or ".join(sorted(self.trusted))
        if self.key is None:
            raise SignatureError("no key to sign with", field="repository.signing_key_file", expected=f"key {wanted}")
        if self.key.key_id not in self.trusted:
            raise SignatureError(
                "the signing key is not trusted",
                field="repository.signing_key_file",
                expected=f"key {wanted}",
                was=f"key {self.key.key_id}",
            )


NO_TERMS = Terms()


def publish(release: Release, repository: Path, settings: ExportSettings, terms: Terms = NO_TERMS) -> tuple[int, Path]:
    """Publish `release` as the next version and give its number and folder; the same bundle again gives the old ones.

    A bundle that was published before is not put in force again: it may have been rolled back. Raises ArtifactError
    when the name belongs to another contract or the staged version does not read back as it should, SignatureError when
    its signature would not be trusted, and ComponentError when the repository cannot be written or another publish
    holds it.
    """
    terms.check()
    name = release.manifest.name
    with locked(repository):
        existing = find_published(repository, release.manifest, settings, terms.trusted)
        if existing is not None:
            refresh_config(repository, name, settings)
            return existing, repository / name / str(existing)
        remove_leftovers(repository, name)
        check_contract(repository, release.manifest)
        version = max(numbers_in(repository / name), default=0) + 1

        def fill(staging: Path) -> None:
            (staging / MODEL_FILE).write_bytes(release.graph)
            (staging / GOLDEN_NAME).write_bytes(release.golden)
            write_manifest(staging, release.manifest)
            if terms.key is not None:
                sign_version(staging, version, terms.key)
            verify_version(staging, run_golden=True)

        def configure(folder: Path, digests: dict[int, str], current: Current | None, also: set[int]) -> None:
            _write_config(folder, release.manifest, settings, digests, current, also)

        return version, commit_version(repository / name, version, fill, configure, activate=terms.activate)


def find_published(
    repository: Path, manifest: Manifest, settings: ExportSettings, trusted: TrustedKeys | None = None
) -> int | None:
    """The version that holds this bundle, gated for these settings, verified; None when there is none."""
    folder = repository / manifest.name
    for version in reversed(versions_of(folder)):
        record = load_manifest(folder / str(version)).export
        if record and record.bundle_digest == manifest.digest() and _gated_for(record, settings):
            if trusted is not None:
                verify_signature(folder / str(version), trusted, version)
            verify_version(folder / str(version))
            return version
    return None


def _gated_for(record: ExportRecord, settings: ExportSettings) -> bool:
    """Whether the gates judged what these settings ask for; no `export.threads` asks for the automatic choice."""
    if record.max_batch != settings.max_batch:
        return False
    gated = record.judged_with() or Gated(threads=1, graph_level=0)
    return gated.threads == settings.threads if settings.threads else gated.asked is None


def check_contract(repository: Path, manifest: Manifest) -> None:
    """Engines hold requests against one contract per name, so another contract needs another name."""
    folder = repository / manifest.name
    versions = versions_of(folder)
    if not versions:
        return
    published = load_manifest(folder / str(versions[-1]))
    pairs = {
        "features.digest": (published.features.digest, manifest.features.digest),
        "inputs": (published.inputs, manifest.inputs),
        "outputs": (published.outputs, manifest.outputs),
        "classes": (published.classes, manifest.classes),
        # How many events lie between the steps of a window: an engine has to feed the model at that pace.
        "architecture.stride": (published.architecture.get("stride"), manifest.architecture.get("stride")),
    }
    for field, (expected, was) in pairs.items():
        if expected != was:
            raise ArtifactError(
                f"model {manifest.name!r} is published with another contract",
                field=field,
                expected=str(expected)[:200],
                was=str(was)[:200],
                hint="publish this bundle under another model name",
            )


def remove_leftovers(repository: Path, name: str) -> None:
    """Remove what a publish that was killed left behind; under the lock no live publish has any."""
    beside = repository.resolve().parent.glob(new_model_staging(repository) + MKDTEMP_SUFFIX)
    inside = (repository / name).glob(f"{STAGING_PREFIX}*") if (repository / name).is_dir() else ()
    for path in (*beside, *inside):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


Fill = Callable[[Path], None]
Configure = Callable[[Path, dict[int, str], "Current | None", set[int]], None]
"""Writes config.pbtxt of a model folder: the digest of each version, the version in force, what else to load."""


def commit_version(folder: Path, version: int, fill: Fill, configure: Configure, *, activate: bool) -> Path:
    """Stage what `fill` writes, configure, rename it to `folder/version`, and put it in force; under the lock.

    Until the version is in force the one before it stays loaded. Without `activate` what was in force stays so; a
    model's only version is in force by itself. Raises ComponentError when something cannot be written.
    """
    with _holder(folder.parent, new=not folder.exists()) as holder:
        place = holder / folder.name
        before = _in_force(place, pin=not activate)
        with staged_directory(place / str(version)) as staging:
            fill(staging)
            digest = sha256_file(staging / MANIFEST_NAME)
            after = Current(version, digest, before.version if before else None) if activate else before
            configure(place, manifest_digests(place) | {version: digest}, after, {before.version} if before else set())
        if activate:
            after = write_current(place, version)
            configure(place, manifest_digests(place), after, set())
        if holder != folder.parent:
            try:
                place.rename(folder)
            except OSError as error:
                raise unwritable(folder, error) from error
    return folder / str(version)


def _in_force(folder: Path, *, pin: bool) -> Current | None:
    """The choice in force; with `pin`, the newest version is made one where there is no choice."""
    try:
        current = read_current(folder)
    except ArtifactError:
        current = None  # damaged: the choice now made replaces it
    versions = versions_of(folder)
    if current is None and pin and versions:
        return write_current(folder, versions[-1])
    return current if current and current.version in versions else None


@contextmanager
def _holder(repository: Path, *, new: bool) -> Iterator[Path]:
    """Where the model's folder is filled: in the repository, or for a new model beside it when a rename reaches."""
    beside = repository.resolve().parent
    if not new or beside.stat().st_dev != repository.stat().st_dev:
        yield repository
        return
    try:
        holder = Path(tempfile.mkdtemp(dir=beside, prefix=new_model_staging(repository)))
    except OSError:
        # A mounted repository in a read-only root: the model's folder then appears before its first version.
        yield repository
        return
    try:
        yield holder
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def manifest_digests(folder: Path) -> dict[int, str]:
    """The digest of each published version's manifest.json."""
    return {version: sha256_file(folder / str(version) / MANIFEST_NAME) for version in versions_of(folder)}


def refresh_config(repository: Path, name: str, settings: ExportSettings) -> None:
    """Bring config.pbtxt of a published model up to the settings in force; untouched when nothing changed."""
    folder = repository / name
    current = _in_force(folder, pin=False)
    manifest = load_manifest(folder / str(current.version if current else versions_of(folder)[-1]))
    _write_config(folder, manifest, settings, manifest_digests(folder), current, set())


def _write_config(
    folder: Path,
    manifest: Manifest,
    settings: ExportSettings,
    digests: dict[int, str],
    current: Current | None,
    also: set[int],
) -> None:
    load = sorted({*versions_to_load(digests, current, settings.keep_versions), *also})
    rows = largest_batch(folder, load, manifest)
    manifest = ruling(folder, manifest)
    text = build_config(manifest, fitted(settings, rows), digests, by_number(digests, load, settings.keep_versions))
    options = parse_config(text)
    if (options.inputs, options.outputs) != (manifest.inputs, manifest.outputs):
        raise ArtifactError("the configuration does not read back as the manifest", field=CONFIG_NAME)
    path = folder / CONFIG_NAME
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomic(path, text.encode())


def ruling(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest config.pbtxt follows: of the version that is in force by now; `manifest` where none is, or reads."""
    current = _in_force(folder, pin=False)
    try:
        return load_manifest(folder / str(current.version)) if current else manifest
    except ArtifactError:
        return manifest


def read_pairs(path: Path, manifest: Manifest, least: int = 1) -> Recorded:
    """Recorded rows and research's probabilities from a `.npz` of the bundle.

    Raises ArtifactError naming the array that is wrong, or when there are fewer than `least` rows.
    """
    wanted = {tensor.name: tensor.shape for tensor in manifest.inputs} | {PROBABILITIES: (len(manifest.classes),)}
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in wanted}
    except (OSError, EOFError, TypeError, ValueError, KeyError, zipfile.BadZipFile) as error:  # TypeError: one .npy
        raise ArtifactError(f"not recorded pairs: {error}", field=path.name) from error
    first = found[manifest.inputs[0].name]
    count = len(first) if first.ndim else 0
    for field, shape in wanted.items():
        array = found[field]
        if array.dtype != np.float32 or array.shape != (count, *shape) or not count:
            raise ArtifactError(
                f"wrong recorded array in {path.name}",
                field=field,
                expected=f"float32 [rows, {', '.join(map(str, shape))}]",
                was=f"{array.dtype} {list(array.shape)}",
            )
    if count < least:
        raise ArtifactError("too few recorded rows", field=path.name, expected=f"at least {least}", was=str(count))
    return Recorded(pack(found, manifest), found[PROBABILITIES])

"""Publishing a version into a Triton model repository: all of it, or nothing anyone can see.

    <repository>/<model>/config.pbtxt                      belongs to the model, replaced by rename
    <repository>/<model>/<n>/{model.onnx, manifest.json, golden.npz}   immutable

A version is staged beside its place under a name Triton does not take for a version (it has to start with a digit),
verified by reading it back, and renamed; that rename commits the publish. config.pbtxt is replaced just before, with
the new manifest's digest: after a crash in between it names a version that is not there, which Triton never looks up
and the next publish overwrites, while the other order could serve a version whose digest no one listed. A model's first
version comes as a whole folder, since Triton would report a model folder without a version as broken; it is staged
beside the repository, because every folder inside is a model to Triton. One publish at a time, by a lock file.
"""

from __future__ import annotations

import fcntl
import io
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export import check_model, parity, runtime
from export.onnx_graph import PROBABILITIES
from export.parity import Recorded
from export.triton_config import build_config, check_config_matches, parse_config, read_config
from tickserve import golden
from tickserve.config import ExportSettings
from tickserve.errors import ArtifactError, ComponentError, DigestMismatchError, TickserveError
from tickserve.manifest import GOLDEN_NAME, MANIFEST_NAME, Manifest, load_manifest, verify_file, write_manifest
from tickserve.model_config import CONFIG_NAME, MODEL_FILE, BackendOptions
from tickserve.store import STAGING_PREFIX, sha256_file, staged_directory, unwritable, write_atomic

LOCK_NAME = ".publish.lock"
LOCK_WAIT_S = 60.0
VERSION_PATTERN = re.compile(r"[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class Release:
    """What is published: the manifest with its export record, the served graph, and the golden pairs."""

    manifest: Manifest
    graph: bytes
    golden: bytes


def versions_of(model_folder: Path) -> list[int]:
    """The published versions of a model, oldest first: numbered folders that hold a manifest."""
    return [version for version in numbers_in(model_folder) if (model_folder / str(version) / MANIFEST_NAME).is_file()]


def numbers_in(model_folder: Path) -> list[int]:
    """Whatever is named like a version, in order; what is not one, an empty folder say, keeps its number taken."""
    if not model_folder.is_dir():
        return []
    return sorted(int(path.name) for path in model_folder.iterdir() if VERSION_PATTERN.fullmatch(path.name))


def publish(release: Release, repository: Path, settings: ExportSettings) -> tuple[int, Path]:
    """Publish `release` as the next version and give its number and folder; the same bundle again gives the old ones.

    Raises ArtifactError when the name belongs to another contract or the staged version does not read back as it
    should, and ComponentError when the repository cannot be written or another publish holds it.
    """
    with locked(repository):
        existing = find_published(repository, release.manifest, settings.max_batch)
        if existing is not None:
            refresh_config(repository, release.manifest, settings)
            return existing, repository / release.manifest.name / str(existing)
        _remove_leftovers(repository, release.manifest.name)
        _check_contract(repository, release.manifest)
        return _commit(release, repository, settings)


@contextmanager
def locked(repository: Path, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """Hold the repository's lock file. Raises ComponentError when another publish holds it for longer than `wait_s`."""
    try:
        repository.mkdir(parents=True, exist_ok=True)
        file = (repository / LOCK_NAME).open("a")
    except OSError as error:
        raise unwritable(repository, error) from error
    with file:
        deadline = time.monotonic() + wait_s
        while not _try_lock(file):
            if time.monotonic() >= deadline:
                raise ComponentError("another publish holds this repository", field=LOCK_NAME, hint="try again later")
            time.sleep(0.02)
        yield


def _try_lock(file: io.TextIOWrapper) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def find_published(repository: Path, manifest: Manifest, max_batch: int) -> int | None:
    """The version that holds this bundle, gated for this largest batch, verified; None when there is none."""
    folder = repository / manifest.name
    for version in reversed(versions_of(folder)):
        record = load_manifest(folder / str(version)).export
        if record and record.bundle_digest == manifest.digest() and record.max_batch == max_batch:
            verify_version(folder / str(version))
            return version
    return None


def _check_contract(repository: Path, manifest: Manifest) -> None:
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


def _remove_leftovers(repository: Path, name: str) -> None:
    """Remove what a publish that was killed left behind; under the lock no live publish has any."""
    beside = repository.resolve().parent.glob(f"{_new_model_prefix(repository)}*")
    inside = (repository / name).glob(f"{STAGING_PREFIX}*") if (repository / name).is_dir() else ()
    for path in (*beside, *inside):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _new_model_prefix(repository: Path) -> str:
    return f"{STAGING_PREFIX}{repository.resolve().name}-"


def _commit(release: Release, repository: Path, settings: ExportSettings) -> tuple[int, Path]:
    folder = repository / release.manifest.name
    version = max(numbers_in(folder), default=0) + 1
    with _holder(repository, new=not folder.exists()) as holder:
        _stage_version(release, holder / folder.name, version, settings)
        if holder != repository:
            try:
                (holder / folder.name).rename(folder)
            except OSError as error:
                raise unwritable(folder, error) from error
    return version, folder / str(version)


@contextmanager
def _holder(repository: Path, *, new: bool) -> Iterator[Path]:
    """Where the model's folder is filled: in the repository, or for a new model beside it when a rename reaches."""
    beside = repository.resolve().parent
    if not new or beside.stat().st_dev != repository.stat().st_dev:
        yield repository
        return
    try:
        holder = Path(tempfile.mkdtemp(dir=beside, prefix=_new_model_prefix(repository)))
    except OSError:
        # A mounted repository in a read-only root: the model's folder then appears before its first version.
        yield repository
        return
    try:
        yield holder
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _stage_version(release: Release, folder: Path, version: int, settings: ExportSettings) -> None:
    with staged_directory(folder / str(version)) as staging:
        (staging / MODEL_FILE).write_bytes(release.graph)
        (staging / GOLDEN_NAME).write_bytes(release.golden)
        write_manifest(staging, release.manifest)
        verify_version(staging, run_golden=True)
        digests = manifest_digests(folder) | {version: sha256_file(staging / MANIFEST_NAME)}
        _write_config(folder, release.manifest, settings, digests)


def manifest_digests(folder: Path) -> dict[int, str]:
    """The digest of each published version's manifest.json."""
    return {version: sha256_file(folder / str(version) / MANIFEST_NAME) for version in versions_of(folder)}


def refresh_config(repository: Path, manifest: Manifest, settings: ExportSettings) -> None:
    """Bring config.pbtxt of a published model up to the settings in force; untouched when nothing changed."""
    folder = repository / manifest.name
    _write_config(folder, manifest, settings, manifest_digests(folder))


def _write_config(folder: Path, manifest: Manifest, settings: ExportSettings, digests: dict[int, str]) -> None:
    text = build_config(manifest, settings, digests)
    options = parse_config(text)
    if (options.inputs, options.outputs) != (manifest.inputs, manifest.outputs):
        raise ArtifactError("the configuration does not read back as the manifest", field=CONFIG_NAME)
    path = folder / CONFIG_NAME
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomic(path, text.encode())


def verify_version(folder: Path, *, run_golden: bool = False) -> Manifest:
    """The manifest of a published version, once its files are what the manifest names and the graph is safe.

    With `run_golden`, ONNX Runtime also has to give research's numbers for the golden rows. Raises ArtifactError,
    DigestMismatchError, UnsafeModelError, GateRefusedError.
    """
    manifest = load_manifest(folder)
    record = manifest.export
    if record is None:
        raise ArtifactError("expected a published version, was a bundle", field="export")
    if record.bundle_digest != manifest.digest() or record.bundle_id != manifest.bundle_id():
        raise DigestMismatchError(
            "wrong digest", field="export.bundle_digest", expected=manifest.digest(), was=record.bundle_digest[:100]
        )
    parity.check_tolerance(manifest)
    verify_file(folder, MODEL_FILE, record.onnx_sha256)
    verify_file(folder, GOLDEN_NAME, record.golden_sha256)
    model = check_model.read_model(folder / MODEL_FILE)
    check_model.check_signature(model, manifest.inputs, manifest.outputs)
    if run_golden:
        _run_golden(folder, manifest)
    return manifest


def verify_versions(folder: Path) -> tuple[dict[int, Manifest], dict[int, TickserveError]]:
    """The versions of a model that can be trusted, and why each other one cannot.

    Raises ArtifactError when config.pbtxt itself cannot be read or asks for what is not honoured.
    """
    options = read_config(folder / CONFIG_NAME)
    verified: dict[int, Manifest] = {}
    refused: dict[int, TickserveError] = {}
    for version in numbers_in(folder):
        try:
            verified[version] = _verify_served(folder, version, options)
        except TickserveError as error:
            refused[version] = error
        except OSError as error:
            name = Path(str(error.filename or folder)).name
            refused[version] = ArtifactError(f"cannot read: {error.strerror}", field=name)
    return verified, refused


def _verify_served(folder: Path, version: int, options: BackendOptions) -> Manifest:
    """`verify_version`, and the version held against its model's configuration."""
    path = folder / str(version)
    if not (path / MANIFEST_NAME).is_file():
        raise ArtifactError(f"no {MANIFEST_NAME}: not a published version", field=MANIFEST_NAME)
    digest, listed = sha256_file(path / MANIFEST_NAME), options.manifests.get(version, "none")
    if listed != digest:
        raise DigestMismatchError("wrong digest", field=f"manifest.{version}", expected=listed, was=digest)
    manifest = verify_version(path)
    if manifest.name != folder.name:
        raise ArtifactError("wrong model name", field="name", expected=folder.name, was=manifest.name)
    gated = manifest.export.max_batch if manifest.export else 0
    if options.max_batch != gated:
        # A larger batch than was gated, or a smaller one: either way not what the parity gate saw.
        raise ArtifactError(
            f"{CONFIG_NAME} serves another largest batch than was gated",
            field="max_batch_size",
            expected=str(gated),
            was=str(options.max_batch),
        )
    check_config_matches(options, check_model.read_model(path / MODEL_FILE))
    return manifest


def _run_golden(folder: Path, manifest: Manifest) -> None:
    """Hold the graph against the golden pairs as the gates do, and as the backend will when it loads them."""
    pairs = golden.read_golden(folder / GOLDEN_NAME, manifest.inputs, manifest.outputs)
    rows = pairs[manifest.inputs[0].name]
    served = runtime.score_onnx(folder / MODEL_FILE, {manifest.inputs[0].name: rows})
    parity.hold("golden", rows, pairs[PROBABILITIES], served, manifest)
    golden.compare(pairs, served, manifest.outputs, tolerance=manifest.tolerance, bundle_id=manifest.bundle_id())


def read_pairs(path: Path, manifest: Manifest, least: int = 1) -> Recorded:
    """Recorded rows and research's probabilities from a `.npz` of the bundle.

    Raises ArtifactError naming the array that is wrong, or when there are fewer than `least` rows.
    """
    name = manifest.inputs[0].name
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            rows, probabilities = arrays[name], arrays["probabilities"]
    except (OSError, EOFError, TypeError, ValueError, KeyError, zipfile.BadZipFile) as error:  # TypeError: one .npy
        raise ArtifactError(f"not recorded pairs: {error}", field=path.name) from error
    count = len(rows) if rows.ndim else 0
    shapes = {name: (rows, manifest.inputs[0].shape), "probabilities": (probabilities, (len(manifest.classes),))}
    for field, (array, shape) in shapes.items():
        if array.dtype != np.float32 or array.shape != (count, *shape) or not count:
            raise ArtifactError(
                f"wrong recorded array in {path.name}",
                field=field,
                expected=f"float32 [rows, {', '.join(map(str, shape))}]",
                was=f"{array.dtype} {list(array.shape)}",
            )
    if count < least:
        raise ArtifactError("too few recorded rows", field=path.name, expected=f"at least {least}", was=str(count))
    return Recorded(rows, probabilities)

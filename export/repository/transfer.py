"""Versions from one repository to another: pull, push, and publishing straight into a bucket.

Numbers, bytes and signatures stay as they are. Everything is verified before it can be seen: into a folder it is
staged, verified and renamed; into a bucket its files are written and read back, and `config.pbtxt`, which commits it,
comes after them. `current.json` comes last.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from export import job, publish
from export.contents import named_files
from export.largest_batch import largest_batch, with_largest_batch
from export.repository.force import configure, in_force, put_in_force
from export.repository.loaded import by_number, versions_to_load
from export.repository.naming import naming
from export.repository.places import Local, Repository, require_model
from export.repository.remote import Remote
from export.triton_config import read_config, with_gated, with_versions
from export.verify import verify_served, verify_version
from tickserve.config import ExportSettings
from tickserve.current import CURRENT_NAME, Current, choose, read_current
from tickserve.errors import ArtifactError, DigestMismatchError
from tickserve.manifest import MANIFEST_NAME, Manifest, load_bundle, load_manifest
from tickserve.model_config import CONFIG_NAME
from tickserve.signing import SIGNATURE_NAME, verify_signature
from tickserve.store import sha256_bytes, sha256_file, write_atomic


@dataclass(frozen=True)
class Copied:
    """One version on its way; `copied` is false when the same bytes were there before."""

    model: str
    version: int
    copied: bool
    in_force: bool


def transfer(
    source: Repository,
    target: Repository,
    *,
    keep: int,
    terms: publish.Terms,
    models: Iterable[str] = (),
    version: int | None = None,
    every: bool = False,
) -> list[Copied]:
    """Copy the version in force of each model (or `version`, or `every` one) and, on these terms, put it in force.

    Raises ArtifactError and below for what does not verify or would change a published version, ComponentError when
    something cannot be read or written, each naming the version; none is then seen in part.
    """
    done = []
    for model in [require_model(source, name) for name in models] or source.models():
        now = version if version is not None else in_force(source, model)
        if now is None:
            raise ArtifactError(f"no version of {model!r} is in force", field=CURRENT_NAME)
        others = [each for each in source.versions(model) if each != now] if every else []
        # The one in force first: the others then cannot be taken for it.
        done.append(_copy(source, target, model, now, keep, terms))
        done += [_copy(source, target, model, each, keep, replace(terms, activate=False)) for each in others]
    return done


def _copy(source: Repository, target: Repository, model: str, version: int, keep: int, terms: publish.Terms) -> Copied:
    with naming(model, version):
        return _copied(source, target, model, version, keep, terms)


def _copied(
    source: Repository, target: Repository, model: str, version: int, keep: int, terms: publish.Terms
) -> Copied:
    folder = source.folder(model, version)
    manifest = verify_served(folder.parent, version, read_config(folder.parent / CONFIG_NAME), terms.trusted)
    digest = sha256_file(folder / MANIFEST_NAME)
    with target.locked():
        there = version in target.versions(model)
        if there:
            _check_same(target, model, version, digest, terms)
        else:
            publish.check_contract(target.root, manifest)
            receive = _into_bucket if isinstance(target, Remote) else _into_folder
            receive(folder, target, version, keep, terms)
        if terms.activate and in_force_by_choice(target, model) != version:
            put_in_force(target, model, version, keep)
        return Copied(model, version, not there, in_force(target, model) == version)


def in_force_by_choice(repository: Repository, model: str) -> int | None:
    """The version that current.json names, if it can be read."""
    try:
        current = read_current(repository.root / model)
    except ArtifactError:
        return None
    return current.version if current else None


def _check_same(target: Repository, model: str, version: int, digest: str, terms: publish.Terms) -> None:
    """A published version stays what it is: the same one again is verified, another one refused."""
    folder = target.folder(model, version)
    found = sha256_file(folder / MANIFEST_NAME)
    if found != digest:
        raise ArtifactError(
            f"version {version} of {model!r} is published already, with other content",
            field=f"{model}/{version}/{MANIFEST_NAME}",
            expected=found,
            was=digest,
            hint="a version is immutable: publish the next one",
        )
    verify_served(folder.parent, version, read_config(folder.parent / CONFIG_NAME), terms.trusted)


def _contents(folder: Path) -> dict[str, bytes]:
    """The files of a version in the order they are written, held against the manifest's digests once more."""
    manifest = load_manifest(folder)
    found = {name: (folder / name).read_bytes() for name in named_files(manifest)}
    for name, digest in named_files(manifest).items():
        if sha256_bytes(found[name]) != digest:
            raise DigestMismatchError("wrong digest", field=name, expected=digest, was=sha256_bytes(found[name]))
    if (folder / SIGNATURE_NAME).is_file():
        found[SIGNATURE_NAME] = (folder / SIGNATURE_NAME).read_bytes()
    return found | {MANIFEST_NAME: (folder / MANIFEST_NAME).read_bytes()}


def _into_folder(folder: Path, target: Repository, version: int, keep: int, terms: publish.Terms) -> None:
    model, contents = folder.parent.name, _contents(folder)
    if version in target.taken(model):
        raise ArtifactError("the number is taken by what is no version", field=f"{model}/{version}")
    publish.remove_leftovers(target.root, model)

    def fill(staging: Path) -> None:
        for name, data in contents.items():
            (staging / name).write_bytes(data)
        verify_version(staging, run_golden=True)
        if terms.trusted is not None:
            verify_signature(staging, terms.trusted, version)

    def write(place: Path, digests: dict[int, str], current: Current | None, also: set[int]) -> None:
        path = place / CONFIG_NAME
        old = path.read_text("utf-8") if path.is_file() else None
        text = (folder.parent / CONFIG_NAME).read_text("utf-8") if terms.activate or old is None else old
        load = sorted({*versions_to_load(digests, current, keep), *also})
        changed = with_versions(text, digests, by_number(digests, load, keep), keep)
        coming = load_manifest(folder)
        changed = with_gated(changed, publish.ruling(place, coming))
        changed = with_largest_batch(changed, largest_batch(place, load, coming))
        if changed != old:
            write_atomic(path, changed.encode())

    publish.commit_version(target.root / model, version, fill, write, activate=terms.activate)


def _into_bucket(folder: Path, target: Repository, version: int, keep: int, terms: publish.Terms) -> None:
    assert isinstance(target, Remote)  # noqa: S101  # for the type checker; the caller asked
    model = folder.parent.name
    if version in target.taken(model):
        target.remove(model, version)  # what a killed upload left under this number
    versions = target.versions(model)
    if versions and not terms.activate and read_current(target.root / model) is None:
        target.put(f"{model}/{CURRENT_NAME}", choose(target.root / model, versions[-1]).to_json())
    for name, data in _contents(folder).items():
        target.put_checked(f"{model}/{version}/{name}", data)
    text = (folder.parent / CONFIG_NAME).read_text("utf-8") if terms.activate or not versions else None
    configure(target, model, read_current(target.root / model), keep, text=text, new=version)


def publish_bundle(
    bundle: Path,
    repository: Repository,
    settings: ExportSettings,
    terms: publish.Terms,
    progress: job.Progress | None = None,
    measure: job.Measure = "off",
) -> job.Published:
    """`export_bundle` into any repository. For a bucket it is measured and judged here, and then the version is pushed.

    Raises as `export_bundle` and `transfer` do, ArtifactError too when another publish took the number meanwhile.
    """
    if isinstance(repository, Local):
        return job.export_bundle(bundle, repository.root, settings, progress, terms, measure)
    manifest = load_bundle(bundle)
    with tempfile.TemporaryDirectory(prefix="tickserve-publish-") as folder:
        desk = Path(folder) / "repository"
        _copy_known(repository, manifest, desk)
        published = job.export_bundle(bundle, desk, settings, progress, terms, measure)
        if not published.reused:
            _copy(Local(desk), repository, manifest.name, published.version, settings.keep_versions, terms)
        return published


def _copy_known(repository: Repository, manifest: Manifest, desk: Path) -> None:
    """What a publish has to know of a model: its manifests, configuration and numbers, and this bundle's version."""
    name = manifest.name
    for version in repository.versions(name):
        record = load_manifest(repository.root / name / str(version)).export
        if record and record.bundle_digest == manifest.digest():
            repository.folder(name, version)
    if (repository.root / name).is_dir():
        shutil.copytree(repository.root / name, desk / name)
    for version in repository.taken(name):
        (desk / name / str(version)).mkdir(parents=True, exist_ok=True)

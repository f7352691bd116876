"""The repository sync: a folder that holds exactly the versions in force at a source, each verified before it is seen.

What runs before a server starts (the init container of a pod), in NVIDIA's image too: it needs the extra `repository`
and neither ONNX nor protobuf. Digests, signatures, the configuration and the contract are checked while everything
lies in a staging folder; only then is anything renamed to where a server looks. What does not verify changes nothing:
the versions synced before stay, and a pod that starts with an empty folder does not start. Graphs and golden rows were
checked by the publish that the signature vouches for, and are again by the backend where it is ours.

The order for a model that is there already, each step one atomic replacement: the new version's folder, `config.pbtxt`
with both versions, `current.json`, `config.pbtxt` with the new one, and last the old one's removal. Killed in between,
either version is served whole, and the next sync finishes it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from export.contents import export_record, named_files
from export.repository.lock import LOCK_NAME, locked
from export.repository.naming import naming
from export.repository.source import Source
from export.repository.written import Written, read_written
from tickserve.current import CURRENT_NAME, Current, read_current
from tickserve.errors import ArtifactError, DigestMismatchError, TickserveError, UsageError
from tickserve.manifest import MANIFEST_NAME, Manifest, load_manifest, verify_file
from tickserve.model_config import CONFIG_NAME
from tickserve.signing import SIGNATURE_NAME, TrustedKeys, signed_by, verify_signature
from tickserve.store import STAGING_PREFIX, sha256_file, unwritable, write_atomic, write_json_atomic

MARKER_NAME = ".sync.json"
MAX_TEXT_BYTES = 16 * 2**20
MAX_SMALL_BYTES = 4_096
# What `mkdtemp` adds to a name.
SUFFIX = "[a-z0-9_]" * 8


@dataclass(frozen=True)
class Synced:
    """A model's version in force, as it now lies in the folder; `copied` is false when it lay there before."""

    model: str
    version: int
    manifest_sha256: str
    signed_by: str | None
    size_bytes: int
    copied: bool


@dataclass(frozen=True)
class Result:
    """What a sync did: each model's version, and what it took away, by name (`model` or `model/version`)."""

    models: list[Synced]
    removed: list[str]


@dataclass(frozen=True)
class _Staged:
    """A model that verified: its configuration, its choice, and its version's folder where that is to be moved."""

    version: Synced
    current: Current
    config: Written
    folder: Path


def sync(
    source: Source,
    into: Path,
    *,
    trusted: TrustedKeys | None = None,
    models: Sequence[str] = (),
    limit_bytes: int = 4 * 2**30,
) -> Result:
    """Make `into` hold the version in force of each model (or of `models`) and no other, once all of them verify.

    With `trusted` keys each has to be signed by one of them. Raises UsageError for a folder that holds something a sync
    did not put there, ArtifactError and below, naming the model and version, for what cannot be trusted or is larger
    than `limit_bytes` together, ComponentError for what cannot be read or written.
    """
    _check_ours(into)
    names = _names(source, models)
    with locked(into):
        write_json_atomic(into / MARKER_NAME, {"source": source.label})
        _remove_leftovers(into)
        with _staging(into) as staging:
            left, staged = limit_bytes, []
            for name in names:
                staged.append(_stage(source, into, staging, name, trusted, left))
                left -= staged[-1].version.size_bytes
            removed = [gone for each in staged for gone in _commit(each, into, staging)]
            return Result([each.version for each in staged], removed + _remove_others(into, names, staging))


def _check_ours(into: Path) -> None:
    """Refuse to make a mirror of a folder that is something else: its versions would be removed."""
    try:
        found = {path.name for path in into.iterdir()} if into.exists() else set()
    except OSError as error:
        raise UsageError("not a folder that can be read", field="--into", was=str(into)[:200]) from error
    foreign = sorted(name for name in found if name != LOCK_NAME and not name.startswith(STAGING_PREFIX))
    if foreign and MARKER_NAME not in found:
        raise UsageError(
            "holds what no sync put there",
            field="--into",
            expected="an empty folder, or one that was synced",
            was=repr(foreign[0])[:100],
            hint="name a folder inside it",
        )


def _names(source: Source, models: Sequence[str]) -> list[str]:
    have = source.models()
    for name in models:
        if name not in have:
            raise ArtifactError(
                f"{source.label} has no model of that name",
                field="--model",
                expected=", ".join(have) or "none",
                was=repr(name)[:100],
            )
    if not have:
        raise ArtifactError(f"{source.label} holds no model", field="--source")
    return list(dict.fromkeys(models)) or have


@contextmanager
def _staging(into: Path) -> Iterator[Path]:
    """A folder on the same file system: beside `into`, where Triton does not look, or inside when that is a mount."""
    place = into.resolve().parent
    if place.stat().st_dev != into.stat().st_dev or not os.access(place, os.W_OK):
        place = into
    try:
        staging = Path(tempfile.mkdtemp(dir=place, prefix=_prefix(into)))
    except OSError as error:
        raise unwritable(into, error) from error
    try:
        yield staging
    except OSError as error:
        raise unwritable(into, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _prefix(into: Path) -> str:
    return f"{STAGING_PREFIX}sync-{into.resolve().name}-"


def _remove_leftovers(into: Path) -> None:
    """What a killed sync left; under the lock no live one has any."""
    staged = _prefix(into) + SUFFIX
    found = [*into.resolve().parent.glob(staged), *into.glob(staged), *into.glob(f"*/{STAGING_PREFIX}*")]
    found += into.glob(f"{STAGING_PREFIX}*")
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            path.unlink()


def _stage(source: Source, into: Path, staging: Path, model: str, trusted: TrustedKeys | None, limit: int) -> _Staged:
    current = _current(source, staging / model, model)
    config = read_written(_text(source, staging, f"{model}/{CONFIG_NAME}"))
    if config.options.name != model:
        raise ArtifactError("wrong model name", field="name", expected=model, was=config.options.name[:100])
    version = current.version if current else _newest(source, model, config)
    with naming(model, version):
        folder = staging / model / str(version)
        digest = _manifest_digest(source, staging, model, version)
        _check_listed(digest, version, config, current)
        signer = _check_signature(source, staging, folder, trusted)
        manifest = load_manifest(folder)
        _check_contract(manifest, model, config)
        there = _there(into / model / str(version), digest)
        size = _fetch(source, staging, f"{model}/{version}", manifest, limit, there)
        now = Current(version, digest, None)
        return _Staged(Synced(model, version, digest, signer, size, not there), now, config, folder)


def _text(source: Source, staging: Path, name: str, limit: int = MAX_TEXT_BYTES) -> bytes:
    """The bytes of a small file, which are kept in the staging folder under its name."""
    size = source.size(name)
    if size is None:
        raise ArtifactError("missing from the source", field=name)
    if size > limit:
        raise ArtifactError("too large", field=name, expected=f"at most {limit} bytes", was=str(size))
    data = b"".join(source.pieces(name, size))
    (staging / name).parent.mkdir(parents=True, exist_ok=True)
    (staging / name).write_bytes(data)
    return data


def _current(source: Source, folder: Path, model: str) -> Current | None:
    """What the source's current.json says; None without the file."""
    if source.size(f"{model}/{CURRENT_NAME}") is None:
        return None
    _text(source, folder.parent, f"{model}/{CURRENT_NAME}", MAX_SMALL_BYTES)
    return read_current(folder)


def _newest(source: Source, model: str, config: Written) -> int:
    """Without a choice the newest version is in force; one counts once the configuration lists it and it is there."""
    listed = (each for each in config.options.manifests if source.size(f"{model}/{each}/{MANIFEST_NAME}") is not None)
    version = max(listed, default=None)
    if version is None:
        raise ArtifactError(f"no version of {model!r} is in force", field=CURRENT_NAME)
    return version


def _manifest_digest(source: Source, staging: Path, model: str, version: int) -> str:
    _text(source, staging, f"{model}/{version}/{MANIFEST_NAME}")
    return sha256_file(staging / model / str(version) / MANIFEST_NAME)


def _check_listed(digest: str, version: int, config: Written, current: Current | None) -> None:
    listed = config.options.manifests.get(version, "none")
    if listed != digest:
        raise DigestMismatchError("wrong digest", field=f"manifest.{version}", expected=listed, was=digest)
    if current and current.manifest_sha256 != digest:
        expected = current.manifest_sha256
        raise DigestMismatchError("not the version put in force", field=CURRENT_NAME, expected=expected, was=digest)


def _check_signature(source: Source, staging: Path, folder: Path, trusted: TrustedKeys | None) -> str | None:
    """Who signed the version; without keys to trust, who it claims did."""
    name = f"{folder.parent.name}/{folder.name}/{SIGNATURE_NAME}"
    if source.size(name) is not None:
        _text(source, staging, name, MAX_SMALL_BYTES)
    return signed_by(folder) if trusted is None else verify_signature(folder, trusted, int(folder.name))


def _check_contract(manifest: Manifest, model: str, config: Written) -> None:
    """Hold the configuration, which nobody signs, against the manifest."""
    record, options = export_record(manifest), config.options
    held = {
        "name": (model, manifest.name),
        "export.bundle_digest": (manifest.digest(), record.bundle_digest),
        "export.bundle_id": (manifest.bundle_id(), record.bundle_id),
        "input": (manifest.inputs, options.inputs),
        "output": (manifest.outputs, options.outputs),
    }
    if options.max_batch > record.max_batch:
        # Fewer rows than were gated are right: another version that the source loads was gated for no more.
        held["max_batch_size"] = (f"at most {record.max_batch}", options.max_batch)
    for field, (expected, was) in held.items():
        if expected != was:
            error = DigestMismatchError if field == "export.bundle_digest" else ArtifactError
            raise error("not what the manifest says", field=field, expected=str(expected)[:200], was=str(was)[:200])


def _there(folder: Path, digest: str) -> bool:
    """Whether this very version lies in `folder` undamaged. Raises ArtifactError when another one does."""
    try:
        for name, wanted in named_files(load_manifest(folder)).items():
            verify_file(folder, name, wanted)
    except (TickserveError, OSError):
        return False  # nothing, or what is damaged and will be replaced
    found = sha256_file(folder / MANIFEST_NAME)
    if found != digest:
        raise ArtifactError(
            "lies in the folder already, with other content",
            field=MANIFEST_NAME,
            expected=found,
            was=digest,
            hint="a version is immutable: publish the next one, or sync into an empty folder",
        )
    return True


def _fetch(source: Source, staging: Path, place: str, manifest: Manifest, limit: int, there: bool) -> int:
    """Copy the files the manifest names, unless they are `there`, and give their size with it. Raises ArtifactError."""
    digests = {f"{place}/{name}": digest for name, digest in named_files(manifest).items()}
    sizes = {name: source.size(name) for name in (*digests, f"{place}/{MANIFEST_NAME}")}
    missing = next((name for name, size in sizes.items() if size is None), None)
    if missing:
        raise ArtifactError("missing from the source", field=missing)
    total = sum(size for size in sizes.values() if size is not None)
    if total > limit:
        raise ArtifactError("larger than the limit", field="--size-limit", expected=f"{limit} bytes", was=str(total))
    for name, digest in digests.items() if not there else ():
        _copy(source, staging / name, name, sizes[name] or 0, digest)
    return total


def _copy(source: Source, path: Path, name: str, size: int, wanted: str) -> None:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in source.pieces(name, size):
            digest.update(piece)
            file.write(piece)
    found = f"sha256:{digest.hexdigest()}"
    if found != wanted:
        raise DigestMismatchError("wrong digest", field=path.name, expected=wanted, was=found)


def _commit(staged: _Staged, into: Path, staging: Path) -> list[str]:
    """Put a verified model where a server looks; the names of the versions that went."""
    target, version = into / staged.version.model, staged.version.version
    digest = staged.current.manifest_sha256
    if not target.exists():
        _commit_new(staged, target, digest)
        return []
    if staged.version.copied:
        _move(target / str(version), staging / f"damaged-{version}")
        _flush(staged.folder)
        staged.folder.rename(target / str(version))
    else:
        _renew_signature(staged.folder, target / str(version))
    before = _before(target, version)
    previous = next(iter(before), None)
    _write_config(target, staged.config, {**before, version: digest}, _gated(target, previous))
    if _choice(target) != (version, digest):
        write_atomic(target / CURRENT_NAME, Current(version, digest, previous).to_json())
    _write_config(target, staged.config, {version: digest})
    return _remove_versions(target, version, staging)


def _commit_new(staged: _Staged, target: Path, digest: str) -> None:
    place, version = staged.folder.parent, staged.version.version
    write_atomic(place / CONFIG_NAME, staged.config.only({version: digest}).encode())
    write_atomic(place / CURRENT_NAME, staged.current.to_json())
    _flush(staged.folder)
    place.rename(target)
    _flush(target.parent, deep=False)


def _flush(folder: Path, *, deep: bool = True) -> None:
    """Have a folder, and the files in it, on the disk before a name leads to them."""
    for path in (*(folder.iterdir() if deep else ()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(path: Path, away: Path) -> bool:
    """Take something out of sight, where it is there."""
    if not path.exists() and not path.is_symlink():
        return False
    path.rename(away)
    return True


def _renew_signature(staged: Path, target: Path) -> None:
    """A version that was signed again keeps its bytes and gets the new signature."""
    new = (staged / SIGNATURE_NAME).read_bytes() if (staged / SIGNATURE_NAME).is_file() else None
    old = (target / SIGNATURE_NAME).read_bytes() if (target / SIGNATURE_NAME).is_file() else None
    if new is not None and new != old:
        write_atomic(target / SIGNATURE_NAME, new)


def _choice(target: Path) -> tuple[int, str] | None:
    try:
        current = read_current(target)
    except ArtifactError:
        return None
    return (current.version, current.manifest_sha256) if current else None


def _before(target: Path, version: int) -> dict[int, str]:
    """The other version that is in force until now, with its digest, if it is there whole."""
    choice = _choice(target)
    if choice is None or choice[0] == version:
        return {}
    try:
        return {choice[0]: choice[1]} if sha256_file(target / str(choice[0]) / MANIFEST_NAME) == choice[1] else {}
    except OSError:
        return {}


def _gated(target: Path, version: int | None) -> int | None:
    """The rows a version was gated for: while it is loaded beside another, neither is served with more."""
    if version is None:
        return None
    with suppress(TickserveError):
        record = load_manifest(target / str(version)).export
        return record.max_batch if record else None
    return None


def _write_config(target: Path, config: Written, digests: dict[int, str], most_rows: int | None = None) -> None:
    path, data = target / CONFIG_NAME, config.only(digests, most_rows).encode()
    if not path.is_file() or path.read_bytes() != data:
        write_atomic(path, data)


def _remove_versions(target: Path, keep: int, staging: Path) -> list[str]:
    """Whatever else lies in a model's folder: old versions first, then what no sync put there."""
    kept = {str(keep), CONFIG_NAME, CURRENT_NAME}
    gone = sorted(path for path in target.iterdir() if path.name not in kept)
    return _take_away(gone, staging, f"{target.name}/")


def _remove_others(into: Path, models: Iterable[str], staging: Path) -> list[str]:
    kept = {*models, MARKER_NAME, LOCK_NAME, staging.name}
    return _take_away(sorted(path for path in into.iterdir() if path.name not in kept), staging, "")


def _take_away(paths: Iterable[Path], staging: Path, label: str) -> list[str]:
    gone = []
    for path in paths:
        path.rename(Path(tempfile.mkdtemp(dir=staging)) / path.name)
        gone.append(f"{label}{path.name}")
    return gone

"""What a repository holds: one entry for each version."""

from __future__ import annotations

from dataclasses import dataclass

from export.repository.collect import kept
from export.repository.force import in_force
from export.repository.places import Repository, require_model
from export.triton_config import chosen_by_policy, parse_config
from tickserve.errors import ArtifactError, TickserveError
from tickserve.manifest import MANIFEST_NAME, load_manifest
from tickserve.model_config import CONFIG_NAME
from tickserve.signing import TrustedKeys, signed_by, verify_signature
from tickserve.store import sha256_file


@dataclass(frozen=True)
class Entry:
    """A version. `signature` is `trusted`, `refused`, `unsigned`, or `unchecked` where no key is trusted."""

    model: str
    version: int
    in_force: bool
    loaded: bool
    kept: bool
    size_bytes: int
    created: str
    manifest_sha256: str
    signed_by: str | None
    signature: str
    problem: str | None


def entries(
    repository: Repository, *, keep: int, trusted: TrustedKeys | None = None, model: str | None = None
) -> list[Entry]:
    """The versions by model and number, oldest first. `keep` is what `gc` would keep. Raises ArtifactError."""
    models = [require_model(repository, model)] if model else repository.models()
    found = []
    for name in models:
        now, stays = in_force(repository, name), kept(repository, name, keep)
        loads = loaded(repository, name)
        found += [
            _entry(repository, name, version, version == now, version in loads, version in stays, trusted)
            for version in repository.versions(name)
        ]
    return found


def loaded(repository: Repository, model: str) -> list[int]:
    """The versions that config.pbtxt has Triton load; none where it cannot be read."""
    try:
        text = (repository.root / model / CONFIG_NAME).read_text("utf-8")
        parse_config(text)
        return chosen_by_policy(text, repository.versions(model))
    except (OSError, UnicodeDecodeError, ArtifactError):
        return []


def _entry(
    repository: Repository,
    model: str,
    version: int,
    force: bool,
    loads: bool,
    stays: bool,
    trusted: TrustedKeys | None,
) -> Entry:
    folder = repository.root / model / str(version)
    created, problem, signer = "", None, None
    try:
        created = load_manifest(folder).provenance.created
        signer = signed_by(folder)
    except TickserveError as error:
        problem = str(error)
    return Entry(
        model=model,
        version=version,
        in_force=force,
        loaded=loads,
        kept=stays,
        size_bytes=repository.size(model, version),
        created=created,
        manifest_sha256=sha256_file(folder / MANIFEST_NAME),
        signed_by=signer,
        signature=_signature(repository, model, version, trusted, signer),
        problem=problem,
    )


def _signature(
    repository: Repository, model: str, version: int, trusted: TrustedKeys | None, signer: str | None
) -> str:
    if trusted is None:
        return "unchecked" if signer else "unsigned"
    try:
        verify_signature(repository.root / model / str(version), trusted, version)
    except TickserveError:
        return "refused" if signer else "unsigned"
    return "trusted"

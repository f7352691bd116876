"""Garbage collection: old versions and what killed writers left, never what may be asked for.

A version that goes is first dropped from `config.pbtxt`, then renamed to what is no version, then deleted: whoever
looks in between sees it whole or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.repository.force import in_force, predecessor
from export.repository.places import Repository, require_model
from export.triton_config import chosen_by_policy, parse_config, without_versions
from tickserve.errors import ArtifactError
from tickserve.model_config import CONFIG_NAME


@dataclass(frozen=True)
class Collected:
    """What went, or would go: versions with their bytes, and leftovers by name."""

    versions: list[tuple[str, int, int]]
    leftovers: list[str]
    dry_run: bool


def kept(repository: Repository, model: str, keep: int) -> set[int]:
    """The versions that stay: the newest `keep`, the one in force and its predecessor, and what Triton loads."""
    versions = repository.versions(model)
    try:
        text = (repository.root / model / CONFIG_NAME).read_text("utf-8")
        parse_config(text)
        stays = {*versions[-keep:], *chosen_by_policy(text, versions)}
        now, before = in_force(repository, model), predecessor(repository, model)
    except (OSError, UnicodeDecodeError, ArtifactError):
        return set(versions)  # what is in force cannot be told, so nothing goes
    return set(versions) if now is None else stays | {now, *([before] if before is not None else [])}


def collect(repository: Repository, *, keep: int, model: str | None = None, dry_run: bool = False) -> Collected:
    """Remove the versions not kept and the leftovers; with `dry_run` only say which.

    Raises ComponentError at once while another writer holds the repository, and when something cannot be deleted.
    """
    if dry_run:
        return Collected(_doomed(repository, keep, model), repository.leftovers(), dry_run=True)
    with repository.locked(wait_s=0.0):
        doomed, left = _doomed(repository, keep, model), repository.leftovers()
        for name in sorted({each[0] for each in doomed}):
            _remove(repository, name, [version for each, version, _ in doomed if each == name])
        repository.remove_leftovers()
        return Collected(doomed, left, dry_run=False)


def _doomed(repository: Repository, keep: int, model: str | None) -> list[tuple[str, int, int]]:
    models = [require_model(repository, model)] if model else repository.models()
    return [
        (name, version, repository.size(name, version))
        for name in models
        for stays in [kept(repository, name, keep)]
        for version in repository.versions(name)
        if version not in stays
    ]


def _remove(repository: Repository, model: str, versions: list[int]) -> None:
    text = (repository.root / model / CONFIG_NAME).read_text("utf-8")
    repository.put(f"{model}/{CONFIG_NAME}", without_versions(text, versions).encode())
    for version in versions:
        repository.remove(model, version)

"""Putting a published version in force: rolling back, and forward again.

The order, each step one atomic replacement:

1. `config.pbtxt` names the version to come beside those that are loaded: nothing that answers now is taken away;
2. `current.json` names it: engines that follow the file go over;
3. `config.pbtxt` lets go of what is newer, so that a request without a version gets the one in force too.

Killed in between, a repository serves either version whole, and the same command finishes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from export.largest_batch import largest_batch, with_largest_batch
from export.repository.loaded import by_number, versions_to_load
from export.repository.places import Repository, require_model
from export.triton_config import read_config, with_gated, with_versions
from export.verify import verify_served
from tickserve.current import CURRENT_NAME, Current, choose, read_current
from tickserve.errors import ArtifactError
from tickserve.manifest import MANIFEST_NAME, load_manifest
from tickserve.model_config import CONFIG_NAME
from tickserve.signing import TrustedKeys
from tickserve.store import sha256_file


@dataclass(frozen=True)
class Move:
    """What a rollback did: the version in force before and now."""

    model: str
    before: int | None
    now: int


def rollback(
    repository: Repository, model: str, to: int | None, *, keep: int, trusted: TrustedKeys | None = None
) -> Move:
    """Put version `to` of `model` in force, or the one before; `keep` is how many versions Triton loads.

    Raises ArtifactError when there is no such version, and ArtifactError or SignatureError when it does not verify:
    then nothing has changed.
    """
    with repository.locked():
        require_model(repository, model)
        before = in_force(repository, model)
        version = to if to is not None else predecessor(repository, model)
        if version is None:
            raise ArtifactError(f"model {model!r} has no version before the one in force", field="version")
        folder = repository.folder(model, version)
        verify_served(folder.parent, version, read_config(folder.parent / CONFIG_NAME), trusted)
        put_in_force(repository, model, version, keep)
        return Move(model, before, version)


def in_force(repository: Repository, model: str) -> int | None:
    """The version in force: what is chosen, else the newest. None for a damaged choice or no version."""
    versions = repository.versions(model)
    try:
        current = read_current(repository.root / model)
    except ArtifactError:
        return None
    if current is None:
        return versions[-1] if versions else None
    return current.version


def predecessor(repository: Repository, model: str) -> int | None:
    """The version to go back to: what was in force before where it is older, else the next older one."""
    now = in_force(repository, model)
    older = [version for version in repository.versions(model) if now is not None and version < now]
    current = read_current(repository.root / model) if older else None
    if current and current.previous in older:
        return current.previous
    return older[-1] if older else None


def put_in_force(repository: Repository, model: str, version: int, keep: int) -> None:
    """The three steps, for a version that was verified; under the lock. Raises ComponentError."""
    chosen = choose(repository.root / model, version)
    before = in_force(repository, model)
    configure(repository, model, chosen, keep, also={before} if before is not None else set())
    repository.put(f"{model}/{CURRENT_NAME}", chosen.to_json())
    configure(repository, model, chosen, keep)


def configure(
    repository: Repository,
    model: str,
    current: Current | None,
    keep: int,
    *,
    also: Iterable[int] = (),
    text: str | None = None,
    new: int | None = None,
) -> None:
    """Write config.pbtxt for the versions there are, with `new`, to load what `current` asks for and `also`.

    `text` replaces its other content. Threads and graph level are those gated for the version that is in force by now,
    the largest batch is one that every version to load was gated for. Untouched when nothing changes; under the lock.
    """
    folder = repository.root / model
    old = (folder / CONFIG_NAME).read_text("utf-8") if (folder / CONFIG_NAME).is_file() else None
    versions = sorted({*repository.versions(model), *([new] if new is not None else [])})
    digests = {version: sha256_file(folder / str(version) / MANIFEST_NAME) for version in versions}
    load = sorted({*versions_to_load(versions, current, keep), *(set(also) & set(versions))})
    numbers = load if repository.by_number else by_number(versions, load, keep)
    changed = with_versions(text or old or "", digests, numbers, keep)
    ruling = in_force(repository, model)
    if ruling in versions or new is not None:
        changed = with_gated(changed, load_manifest(folder / str(ruling if ruling in versions else new)))
    changed = with_largest_batch(changed, largest_batch(folder, load))
    if changed != old:
        repository.put(f"{model}/{CONFIG_NAME}", changed.encode())

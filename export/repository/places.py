"""Where a repository is: a folder of this machine, or a prefix of an S3 bucket. One interface for both.

Reading goes through `root`, a folder laid out as Triton's model repository: the repository itself, or a copy of what is
committed in the bucket. Writing goes through `put` and `remove`, one file or version at a time, each of them atomic;
the order of the calls is what keeps a repository whole, and belongs to the callers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from export.repository.absent import no_version
from export.repository.lock import LOCK_WAIT_S, locked
from export.verify import numbers_in, versions_of
from tickserve.config import RepositorySettings
from tickserve.errors import ArtifactError, UsageError
from tickserve.manifest import MODEL_NAME_PATTERN
from tickserve.model_config import CONFIG_NAME
from tickserve.store import STAGING_PREFIX, unwritable, write_atomic

S3 = "s3://"
REMOVED_PREFIX = f"{STAGING_PREFIX}removed-"
MKDTEMP_SUFFIX = "[a-z0-9_]" * 8


class Repository(Protocol):
    """A repository that is open."""

    root: Path
    label: str
    """How messages name it: never a path of this machine."""
    by_number: bool
    """Whether config.pbtxt has to name each version to load, because others may be seen half-written."""

    def models(self) -> list[str]:
        """The names of the models that hold a version or a configuration."""
        ...

    def versions(self, model: str) -> list[int]:
        """The published versions, oldest first."""
        ...

    def taken(self, model: str) -> list[int]:
        """Every number that is in use, published or not."""
        ...

    def folder(self, model: str, version: int) -> Path:
        """The folder of a version with all of its files. Raises ArtifactError when there is none."""
        ...

    def files(self) -> list[str]:
        """The name of every file, relative to the repository."""
        ...

    def size(self, model: str, version: int) -> int:
        """The bytes of a version's files."""
        ...

    def locked(self, wait_s: float = LOCK_WAIT_S) -> AbstractContextManager[None]:
        """Hold the repository against other writers. Raises ComponentError when one does not let go."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Replace the file `name` (`model/config.pbtxt`), atomically. Raises ComponentError."""
        ...

    def remove(self, model: str, version: int) -> None:
        """Take a version away: first out of sight, then its bytes. Raises ComponentError."""
        ...

    def leftovers(self) -> list[str]:
        """What killed writers left behind, by name; under the lock no live one has any."""
        ...

    def remove_leftovers(self) -> None:
        """Remove it. Raises ComponentError."""
        ...


class Local:
    """A folder."""

    label = "the repository"
    by_number = False

    def __init__(self, root: Path) -> None:
        self.root = root

    def models(self) -> list[str]:
        """As `Repository.models`."""
        if not self.root.is_dir():
            return []
        folders = (path for path in self.root.iterdir() if path.is_dir() and MODEL_NAME_PATTERN.fullmatch(path.name))
        return sorted(path.name for path in folders if versions_of(path) or (path / CONFIG_NAME).is_file())

    def versions(self, model: str) -> list[int]:
        """As `Repository.versions`."""
        return versions_of(self.root / model)

    def taken(self, model: str) -> list[int]:
        """As `Repository.taken`."""
        return numbers_in(self.root / model)

    def folder(self, model: str, version: int) -> Path:
        """As `Repository.folder`."""
        if version not in self.versions(model):
            raise no_version(self.label, self.versions(model), model, version)
        return self.root / model / str(version)

    def files(self) -> list[str]:
        """As `Repository.files`; links are named, never followed."""
        found = []
        for folder, folders, names in os.walk(self.root):
            links = [name for name in folders if (Path(folder) / name).is_symlink()]
            found += [str((Path(folder) / name).relative_to(self.root)) for name in (*names, *links)]
        return sorted(found)

    def size(self, model: str, version: int) -> int:
        """As `Repository.size`."""
        return sum(path.stat().st_size for path in self.folder(model, version).rglob("*") if path.is_file())

    def locked(self, wait_s: float = LOCK_WAIT_S) -> AbstractContextManager[None]:
        """As `Repository.locked`."""
        return locked(self.root, wait_s)

    def put(self, name: str, data: bytes) -> None:
        """As `Repository.put`."""
        write_atomic(self.root / name, data)

    def remove(self, model: str, version: int) -> None:
        """As `Repository.remove`: renamed to what is not a version, then deleted."""
        folder = self.root / model / str(version)
        hidden = folder.with_name(f"{REMOVED_PREFIX}{version}-{os.getpid()}")
        try:
            folder.rename(hidden)
            shutil.rmtree(hidden)
        except OSError as error:
            raise unwritable(folder, error) from error

    def leftovers(self) -> list[str]:
        """As `Repository.leftovers`."""
        return [path.name for path in self._left()]

    def remove_leftovers(self) -> None:
        """As `Repository.remove_leftovers`."""
        for path in self._left():
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                raise unwritable(path, error) from error

    def _left(self) -> list[Path]:
        beside = self.root.resolve().parent.glob(new_model_staging(self.root) + MKDTEMP_SUFFIX)
        inside = (path for depth in ("", "*/", "*/*/") for path in self.root.glob(f"{depth}{STAGING_PREFIX}*"))
        return sorted([*beside, *inside])


def new_model_staging(root: Path) -> str:
    """How the folders begin, beside a repository, in which a new model is staged; `mkdtemp` adds the suffix."""
    return f"{STAGING_PREFIX}{root.resolve().name}-"


def require_model(repository: Repository, model: str) -> str:
    """`model`, when the repository has it. Raises ArtifactError naming those it has."""
    if model not in repository.models():
        have = ", ".join(repository.models()) or "none"
        raise ArtifactError(
            f"{repository.label} has no model of that name", field="model", expected=have, was=repr(model)[:100]
        )
    return model


@contextmanager
def open_repository(where: str, settings: RepositorySettings, *, create: bool = False) -> Iterator[Repository]:
    """The repository at a path or `s3://bucket/prefix`.

    Raises UsageError for a folder that is not there (unless it is to be created) and for another kind of address,
    ComponentError for a bucket that cannot be reached.
    """
    if where.startswith(S3):
        from export.repository.remote import Remote

        with Remote.opened(where, settings) as remote:
            yield remote
        return
    if "://" in where:
        raise UsageError(
            "wrong address", field="repository", expected="a folder or s3://bucket/prefix", was=where[:100]
        )
    if not create and not Path(where).is_dir():
        raise UsageError("no such folder", field="repository", was=where[:200])
    yield Local(Path(where))

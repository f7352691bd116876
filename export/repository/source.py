"""Where the repository sync reads from: a folder (a volume, a mounted OCI image), or a prefix of a bucket in S3 or GCS.

Read-only, in pieces, and nothing but names, sizes and bytes: what they mean, and whether they are to be trusted, is for
the reader. Google's storage is read through its S3-compatible API, with HMAC keys, so that it needs no other library.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from export.repository.bucket import Bucket
from tickserve.config import RepositorySettings
from tickserve.errors import ArtifactError, ComponentError, UsageError
from tickserve.manifest import MODEL_NAME_PATTERN
from tickserve.model_config import CONFIG_NAME

S3, GCS = "s3://", "gs://"
GCS_ENDPOINT = "https://storage.googleapis.com"
PIECE_BYTES = 8 * 2**20


class Source(Protocol):
    """A repository to read from."""

    label: str
    """How messages name it."""

    def models(self) -> list[str]:
        """The names of the models that have a configuration."""
        ...

    def size(self, name: str) -> int | None:
        """The bytes of the file `name` (`model/config.pbtxt`); None when there is none."""
        ...

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """The first `size` bytes of a file. Raises ArtifactError when it has gone, ComponentError."""
        ...


class Folder:
    """A folder. Links are followed, as a volume may be made of them; the digests say whether the bytes are right."""

    label = "the source"

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UsageError("no such folder", field="--source", was=str(root)[:200])
        self._root = root

    def models(self) -> list[str]:
        """As `Source.models`."""
        try:
            names = sorted(path.name for path in self._root.iterdir() if MODEL_NAME_PATTERN.fullmatch(path.name))
        except OSError as error:
            raise _unreadable("the folder", error) from error
        return [name for name in names if self.size(f"{name}/{CONFIG_NAME}") is not None]

    def size(self, name: str) -> int | None:
        """As `Source.size`; what is no plain file is none."""
        try:
            found = (self._root / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _unreadable(name, error) from error
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """As `Source.pieces`."""
        try:
            with (self._root / name).open("rb") as file:
                while size > 0 and (piece := file.read(min(PIECE_BYTES, size))):
                    size -= len(piece)
                    yield piece
        except FileNotFoundError as error:
            raise ArtifactError("missing from the source", field=name) from error
        except OSError as error:
            raise _unreadable(name, error) from error


def _unreadable(name: str, error: OSError) -> ComponentError:
    return ComponentError(f"cannot read {name}: {error.strerror}", field="--source")


class Objects:
    """A prefix of a bucket, listed once."""

    def __init__(self, url: str, settings: RepositorySettings) -> None:
        scheme, _, place = url.partition("://")
        if f"{scheme}://" == GCS and not settings.s3_endpoint_url:
            settings = settings.model_copy(update={"s3_endpoint_url": GCS_ENDPOINT})
        self._bucket = Bucket(f"{S3}{place}", settings)
        self.label = f"{scheme}{self._bucket.url.removeprefix('s3')}"
        self._sizes = self._bucket.listing()

    def models(self) -> list[str]:
        """As `Source.models`."""
        suffix = f"/{CONFIG_NAME}"
        names = (name.removesuffix(suffix) for name in self._sizes if name.endswith(suffix))
        return sorted(name for name in names if MODEL_NAME_PATTERN.fullmatch(name))

    def size(self, name: str) -> int | None:
        """As `Source.size`."""
        return self._sizes.get(name)

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """As `Source.pieces`."""
        for start in range(0, size, PIECE_BYTES):
            yield self._bucket.get_range(name, start, min(start + PIECE_BYTES, size))


def open_source(where: str, settings: RepositorySettings) -> Source:
    """The source at a path, `s3://bucket/prefix` or `gs://bucket/prefix`. Raises UsageError, ComponentError."""
    if where.startswith((S3, GCS)):
        return Objects(where, settings)
    if "://" in where:
        wanted = f"a folder, {S3}bucket/prefix or {GCS}bucket/prefix"
        raise UsageError("wrong address", field="--source", expected=wanted, was=where[:100])
    return Folder(Path(where))

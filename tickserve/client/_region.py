"""A piece of memory shared with a server on this machine, and what of it holds what.

Its name is random and its file belongs to this user alone; the name is gone from the file system as soon as the server
has mapped it, so that nothing is left behind however this process ends.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tickserve.client._transport import Tensor
from tickserve.errors import TransportError, UnsupportedPlatformError

FOLDER = Path("/dev/shm")  # noqa: S108 - where the system keeps shared memory, not a temporary file
ALIGNED = 64
SMALLEST = 64 * 1024


class Place(NamedTuple):
    """Where one tensor lies in a region."""

    name: str
    offset: int
    size: int


def places(sizes: list[tuple[str, int]], offset: int = 0) -> tuple[list[Place], int]:
    """Places for tensors of these names and bytes from `offset` on, and where they end."""
    found = []
    for name, size in sizes:
        found.append(Place(name, offset, size))
        offset += -(-size // ALIGNED) * ALIGNED
    return found, offset


class Region:
    """`size` bytes shared with the server; `register(name, key, size)` makes them known to it."""

    __slots__ = ("_memory", "name", "requests", "size")

    def __init__(self, size: int, register: Callable[[str, str, int], None]) -> None:
        if not FOLDER.is_dir():
            raise UnsupportedPlatformError("no shared memory here", field="transport", expected=f"a folder {FOLDER}")
        self.name = f"tickserve-{secrets.token_hex(16)}"
        self.size = SMALLEST
        while self.size < size:
            self.size *= 2
        self.requests: dict[object, bytes] = {}  # the constant part of each request that was made for this region
        path = FOLDER / self.name
        try:
            self._memory = _mapped(path, self.size)
            register(self.name, f"/{self.name}", self.size)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise TransportError(f"no shared memory: {reason}", field="transport", hint="is /dev/shm full?") from error
        finally:
            with suppress(OSError):
                path.unlink()

    def write(self, tensors: tuple[Tensor, ...], where: list[Place]) -> None:
        """Put the tensors' bytes in their places."""
        memory = self._memory
        for tensor, (_, offset, size) in zip(tensors, where, strict=True):
            memory[offset : offset + size] = tensor.data

    def read(self, place: Place) -> bytes:
        """A copy of what lies there: the next request writes over it."""
        return self._memory[place.offset : place.offset + place.size]

    def close(self) -> None:
        """Give this process's view of it back; idempotent."""
        self._memory.close()


def _mapped(path: Path, size: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)  # a file that only says its size kills who writes when memory is short
        memory = mmap.mmap(descriptor, size)
        with suppress(AttributeError, OSError):
            memory.madvise(mmap.MADV_DONTFORK)  # a child has no business in it
        return memory
    finally:
        os.close(descriptor)

"""An S3 bucket's prefix as named bytes: typed errors, conditional writes, and a lock that a dead holder loses.

Needs the extra `repository`. A write is one PUT, which S3 shows whole or not at all. `If-None-Match` and `If-Match`
(AWS since 2024, MinIO, moto) make the lock exclusive and a configuration's replacement a compare-and-swap.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from export.repository.lock import LOCK_NAME
from tickserve.config import RepositorySettings
from tickserve.errors import ArtifactError, ComponentError, MissingExtraError, UsageError

LEASE_S = 600.0
MAX_OBJECT_BYTES = 2**30
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60


class Bucket:
    """Objects under `s3://bucket/prefix`, by their names relative to it."""

    def __init__(self, url: str, settings: RepositorySettings) -> None:
        self._base = url.removeprefix("s3://").rstrip("/")
        self.url = f"s3://{self._base}"
        if not self._base.split("/")[0] or any(part in ("", ".", "..") for part in self._base.split("/")):
            raise UsageError("wrong address", field="repository", expected="s3://bucket/prefix", was=url[:100])
        self._fs = _filesystem(settings)
        self._etags: dict[str, str] = {}

    @contextmanager
    def _talking(self, what: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

        try:
            yield
        except PermissionError as error:
            raise ComponentError(f"{what}: access denied", field=self.url) from error
        except FileNotFoundError as error:
            raise ComponentError(f"{what}: no such bucket or object", field=self.url) from error
        except (OSError, BotoCoreError) as error:
            raise ComponentError(f"{what}: {type(error).__name__}", field=self.url, hint=str(error)[:200]) from error

    def listing(self) -> dict[str, int]:
        """The size of each object, by name. Raises ComponentError."""
        with self._talking("cannot list"):
            found = self._fs.find(self._base, detail=True)
        for path, info in found.items():
            self._etags[self._name(path)] = info["ETag"]
        return {self._name(path): int(info["size"]) for path, info in found.items()}

    def _name(self, path: str) -> str:
        return path.removeprefix(f"{self._base}/")

    def get(self, name: str) -> bytes:
        """The bytes of an object. Raises ArtifactError when there is none, ComponentError."""
        with self._talking(f"cannot read {name}"):
            try:
                if self._fs.size(f"{self._base}/{name}") > MAX_OBJECT_BYTES:
                    raise ArtifactError("too large", field=name, expected=f"at most {MAX_OBJECT_BYTES} bytes")
                return bytes(self._fs.cat_file(f"{self._base}/{name}"))
            except FileNotFoundError as error:
                raise ArtifactError("missing from the bucket", field=name[:200]) from error

    def get_range(self, name: str, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end` of an object. Raises ArtifactError when there is none, ComponentError."""
        with self._talking(f"cannot read {name}"):
            try:
                return bytes(self._fs.cat_file(f"{self._base}/{name}", start=start, end=end))
            except FileNotFoundError as error:
                raise ArtifactError("missing from the bucket", field=name[:200]) from error

    def put(self, name: str, data: bytes) -> None:
        """Replace an object. Raises ComponentError."""
        with self._talking(f"cannot write {name}"):
            self._fs.pipe_file(f"{self._base}/{name}", data)

    def create(self, name: str, data: bytes) -> None:
        """Write an object that is not there. Raises ComponentError when another writer's is."""
        with self._talking(f"cannot write {name}"):
            try:
                self._fs.pipe_file(f"{self._base}/{name}", data, mode="create")
                return
            except FileExistsError:
                pass
        if self.get(name) != data:  # equal: only the answer to an earlier attempt was lost
            raise ComponentError(f"another publish wrote {name}", hint="try again")

    def swap(self, name: str, data: bytes) -> None:
        """Replace an object that is still as `listing` saw it. Raises ComponentError when another writer was faster."""
        seen = self._etags.get(name)
        condition = {"IfMatch": seen} if seen else {"mode": "create"}
        with self._talking(f"cannot write {name}"):
            try:
                self._etags[name] = self._fs.pipe_file(f"{self._base}/{name}", data, **condition)["ETag"]
            except OSError as error:
                if "PreconditionFailed" in repr(error.__cause__) or isinstance(error, FileExistsError):
                    raise ComponentError(f"another publish changed {name}", hint="try again") from error
                raise

    def delete(self, names: list[str]) -> None:
        """Delete objects. Raises ComponentError."""
        if names:
            with self._talking("cannot delete"):
                self._fs.rm([f"{self._base}/{name}" for name in names])

    @contextmanager
    def locked(self, wait_s: float, lease_s: float = LEASE_S) -> Iterator[None]:
        """Hold the lock object. Raises ComponentError when another holds it for longer than `wait_s`.

        A holder that died loses it: at once to this machine, and to others when its lease is over.
        """
        mine = {"owner": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid()}
        deadline = time.monotonic() + wait_s
        while not self._take(mine | {"until": time.time() + lease_s}):
            if time.monotonic() >= deadline:
                raise ComponentError("another publish holds this repository", field=LOCK_NAME, hint="try again later")
            time.sleep(0.1)
        try:
            yield
        finally:
            with suppress(ComponentError, ArtifactError):
                if self._holder().get("owner") == mine["owner"]:
                    self.delete([LOCK_NAME])

    def _take(self, mine: dict[str, Any]) -> bool:
        if self._create_lock(mine):
            return True
        try:
            holder = self._holder()
        except ArtifactError:  # released just now
            return self._create_lock(mine)
        if holder.get("owner") == mine["owner"]:  # ours: only the answer to an earlier attempt was lost
            return True
        if not _gone(holder):
            return False
        self.delete([LOCK_NAME])
        return self._create_lock(mine)

    def _create_lock(self, mine: dict[str, Any]) -> bool:
        with self._talking("cannot lock"):
            try:
                self._fs.pipe_file(f"{self._base}/{LOCK_NAME}", json.dumps(mine).encode(), mode="create")
            except FileExistsError:
                return False
        return True

    def _holder(self) -> dict[str, Any]:
        try:
            value = json.loads(self.get(LOCK_NAME))
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}


def _gone(holder: dict[str, Any]) -> bool:
    until, pid = holder.get("until"), holder.get("pid")
    if not isinstance(until, int | float) or time.time() > until:
        return True
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _filesystem(settings: RepositorySettings) -> Any:
    try:
        import fsspec  # type: ignore[import-untyped]
        import s3fs  # type: ignore[import-untyped]  # noqa: F401  # fsspec finds it by name
    except ImportError as error:
        raise MissingExtraError.of(str(error.name), "repository") from error
    # The instance caches of fsspec would keep an endpoint, credentials and listings of another call.
    return fsspec.filesystem(
        "s3",
        endpoint_url=settings.s3_endpoint_url or None,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"max_attempts": 3},
            # Every digest is checked by us, and services other than AWS do not know these checksums.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    )

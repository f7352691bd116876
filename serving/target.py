"""The server a swap works on, and the lock that keeps two of them from working on one model at the same time."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from serving.control import Control, Credential
from serving.folders import runtime_folder
from tickserve.errors import ComponentError
from tickserve.signing import TrustedKeys
from tickserve.store import unwritable


@dataclass(frozen=True)
class Target:
    """A running server: where it answers, what opens it, where its models come from.

    `view` is the folder through which an embedded server sees `repository`, `pid` its process; both None for a server
    elsewhere, whose own repository holds the same versions as `repository` here. `grpc_url` None: loads go over HTTP.
    `trusted` are the keys the server was started with, where that is known, as it is not of a server elsewhere: whoever
    asks for a swap cannot do without them.
    """

    http_url: str
    grpc_url: str | None
    credential: Credential | None
    repository: Path
    view: Path | None = None
    pid: int | None = None
    trusted: TrustedKeys | None = None

    @property
    def control(self) -> Control:
        """Its closed APIs."""
        return Control(self.http_url, self.grpc_url, self.credential)

    @contextmanager
    def locked(self, model: str) -> Iterator[None]:
        """Hold what may change `model` on this server. Raises ComponentError when somebody else does."""
        path = self._lock_path(model)
        try:
            file = path.open("a")
        except OSError as error:
            raise unwritable(path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ComponentError(
                    "another swap of this model is under way", field="model", was=repr(model), hint="try again later"
                ) from error
            yield

    def _lock_path(self, model: str) -> Path:
        if self.view is not None:
            return self.view.parent / f".swap-{model}.lock"
        where = hashlib.sha256(self.http_url.encode()).hexdigest()[:12]
        return runtime_folder() / f"swap-{model}-{where}.lock"

"""A repository in an S3 bucket, laid out as Triton reads it from there.

What is committed is what `config.pbtxt` lists: a version counts once its manifest's digest is among the parameters of
that one object, which is replaced last, by compare-and-swap, after every file of the version was read back. Its version
policy names the versions one by one, so Triton too looks at nothing else. A partial upload is objects that no one
looks at; the next push of the same number overwrites them, `gc` removes them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.contents import named_files
from export.repository.absent import no_version
from export.repository.bucket import Bucket
from export.repository.lock import LOCK_WAIT_S
from export.triton_config import parse_config
from export.verify import VERSION_PATTERN
from tickserve.config import RepositorySettings
from tickserve.current import CURRENT_NAME
from tickserve.errors import ArtifactError, ComponentError
from tickserve.manifest import MANIFEST_NAME, MODEL_NAME_PATTERN, load_manifest
from tickserve.model_config import CONFIG_NAME
from tickserve.signing import SIGNATURE_NAME
from tickserve.store import unwritable


class Remote:
    """As `Repository`; `root` is a temporary copy of the committed configurations, choices and manifests."""

    by_number = True

    def __init__(self, url: str, settings: RepositorySettings, root: Path) -> None:
        self.bucket = Bucket(url, settings)
        self.label, self.root = self.bucket.url, root
        self._sizes: dict[str, int] = {}
        self._committed: dict[str, list[int]] = {}
        self._damaged: set[str] = set()
        self.refresh()

    @classmethod
    @contextmanager
    def opened(cls, url: str, settings: RepositorySettings) -> Iterator[Remote]:
        """The repository, with a copy that is gone afterwards. Raises ComponentError when it cannot be reached."""
        with tempfile.TemporaryDirectory(prefix="tickserve-repository-") as folder:
            yield cls(url, settings, Path(folder))

    def refresh(self) -> None:
        """Read again what is committed."""
        self._sizes, self._committed, self._damaged = self.bucket.listing(), {}, set()
        models = {name.split("/")[0] for name in self._sizes if name.endswith(f"/{CONFIG_NAME}")}
        for model in sorted(name for name in models if MODEL_NAME_PATTERN.fullmatch(name)):
            self._read_model(model)

    def _read_model(self, model: str) -> None:
        config = self.bucket.get(f"{model}/{CONFIG_NAME}")
        self._keep(f"{model}/{CONFIG_NAME}", config)
        self._committed[model] = []
        if f"{model}/{CURRENT_NAME}" in self._sizes:
            self._keep(f"{model}/{CURRENT_NAME}", self.bucket.get(f"{model}/{CURRENT_NAME}"))
        try:
            self._count(model, config)
        except ArtifactError:
            # Nothing of it counts, and nothing of it is a leftover; what is wrong is for `verify` and `lint` to say.
            self._damaged.add(model)
            return
        for version in self._committed[model]:
            self._fetch(model, version, (MANIFEST_NAME, SIGNATURE_NAME))

    def _fetch(self, model: str, version: int, names: tuple[str, ...]) -> None:
        for name in names:
            path = f"{model}/{version}/{name}"
            if path in self._sizes and not (self.root / path).is_file():
                self._keep(path, self.bucket.get(path))

    def _keep(self, name: str, data: bytes) -> None:
        path = self.root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise unwritable(path, error) from error

    def models(self) -> list[str]:
        """As `Repository.models`."""
        return sorted(self._committed)

    def versions(self, model: str) -> list[int]:
        """As `Repository.versions`: those that are committed."""
        return sorted(self._committed.get(model, []))

    def taken(self, model: str) -> list[int]:
        """As `Repository.taken`: with those of partial uploads."""
        found = {name.split("/")[1] for name in self._sizes if name.startswith(f"{model}/") and name.count("/") > 1}
        return sorted(int(number) for number in found if VERSION_PATTERN.fullmatch(number))

    def folder(self, model: str, version: int) -> Path:
        """As `Repository.folder`: fetched into the copy, not yet verified."""
        if version not in self.versions(model):
            raise no_version(self.label, self.versions(model), model, version)
        path = self.root / model / str(version)
        self._fetch(model, version, tuple(named_files(load_manifest(path))))
        return path

    def files(self) -> list[str]:
        """As `Repository.files`."""
        return sorted(self._sizes)

    def size(self, model: str, version: int) -> int:
        """As `Repository.size`."""
        return sum(size for name, size in self._sizes.items() if name.startswith(f"{model}/{version}/"))

    @contextmanager
    def locked(self, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
        """As `Repository.locked`; what was read before is read again."""
        with self.bucket.locked(wait_s):
            self.refresh()
            yield

    def put(self, name: str, data: bytes) -> None:
        """As `Repository.put`; a configuration only while no other writer has replaced it."""
        if name.endswith(f"/{CONFIG_NAME}"):
            self.bucket.swap(name, data)
        else:
            self.bucket.put(name, data)
        self._sizes[name] = len(data)
        self._keep(name, data)
        if name.endswith(f"/{CONFIG_NAME}"):
            self._count(name.split("/")[0], data)

    def _count(self, model: str, config: bytes) -> None:
        """What is committed from now on: the versions this configuration lists and whose manifest is there."""
        listed = parse_config(config.decode("utf-8", "replace")).manifests
        self._committed[model] = [each for each in listed if f"{model}/{each}/{MANIFEST_NAME}" in self._sizes]

    def put_checked(self, name: str, data: bytes) -> None:
        """Write a file of a version, once, and read it back. Raises ComponentError when other bytes are there."""
        self.bucket.create(name, data)
        self._sizes[name] = len(data)
        self._keep(name, data)
        if self.bucket.get(name) != data:
            raise ComponentError("the bucket gives back other bytes than were written", field=name)

    def remove(self, model: str, version: int) -> None:
        """As `Repository.remove`; its configuration has stopped listing it before, which took it out of sight."""
        self._delete(f"{model}/{version}/")
        self._committed[model] = [each for each in self.versions(model) if each != version]

    def _delete(self, prefix: str) -> None:
        names = [name for name in self._sizes if name.startswith(prefix)]
        self.bucket.delete(names)
        for name in names:
            del self._sizes[name]
            (self.root / name).unlink(missing_ok=True)

    def leftovers(self) -> list[str]:
        """As `Repository.leftovers`: numbers with objects that no configuration lists."""
        models = {name.split("/")[0] for name in self._sizes if name.count("/") > 1}
        return sorted(
            f"{model}/{version}"
            for model in models
            if MODEL_NAME_PATTERN.fullmatch(model) and model not in self._damaged
            for version in self.taken(model)
            if version not in self.versions(model)
        )

    def remove_leftovers(self) -> None:
        """As `Repository.remove_leftovers`."""
        for name in self.leftovers():
            self._delete(f"{name}/")

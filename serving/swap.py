"""The swap of a served model to another version, with the server running and nobody noticing.

    verify -> load beside -> warm -> golden -> memory -> flip -> drain -> unload

Until the flip the old version serves and nothing that a client sees has changed: whatever goes wrong before it takes
the new version away again and says at which step. The flip is the rename of `current.json` (tickserve/current.py);
clients that follow it ask for the new version from then on, by number, so each answer is one version's. The old one
goes once its requests have ended and no new one has come for a while; while somebody still asks for it, it stays.

A version that is to be swapped in is published without putting it in force (`tickserve repo publish --no-activate`):
whoever asks for the version in force would otherwise ask for it before it is loaded. Clients that follow do not.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.repository.force import predecessor, put_in_force
from export.repository.places import Local
from export.triton_config import read_config
from export.verify import numbers_in, verify_served
from serving import loading, memory_sentinel
from serving.golden import check_golden, infer, read_golden
from serving.memory_sentinel import Arrays, Memory
from serving.target import Target
from tickserve.config import ExportSettings, SwapSettings
from tickserve.current import CURRENT_NAME, read_current
from tickserve.errors import ArtifactError, ComponentError, RequestError, TickserveError
from tickserve.manifest import Manifest, check_model_name
from tickserve.model_config import CONFIG_NAME
from tickserve.signing import TrustedKeys
from tickserve.store import write_atomic

POLL_S = 0.02
KEEP = ExportSettings().keep_versions

Flipped = Callable[[int, Manifest], object]


@dataclass(frozen=True)
class Swapped:
    """A swap that succeeded. `steps_ms` is the time of each step; `memory` is a reason where it was not measured.

    `drained` False: version `previous` was still asked for and is still loaded.
    """

    model: str
    version: int
    previous: int | None
    drained: bool
    memory: Memory | str
    steps_ms: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def swap(
    target: Target,
    model: str,
    version: int | None = None,
    *,
    settings: SwapSettings,
    keep: int = KEEP,
    trusted: TrustedKeys | None = None,
    flipped: Flipped | None = None,
) -> Swapped:
    """Serve `version` of `model` (the newest published one without it) in place of what is served.

    `keep` is how many versions a server loads when it starts (`export.keep_versions`). `flipped` is called at the flip,
    for clients of this process: `lambda version, manifest: client.repin(...)`.
    Raises, with the old version serving as before: ArtifactError and its kin (verify), ServerRejectedError (load),
    GateRefusedError (golden, memory), ComponentError when another swap of the model is under way, TransportError.
    """
    with target.locked(_known(target, model)):
        folder = target.repository / model
        chosen = _newest(folder) if version is None else version
        return _Swap(target, model, chosen, settings, keep, trusted, flipped).run()


def rollback(
    target: Target,
    model: str,
    *,
    settings: SwapSettings,
    keep: int = KEEP,
    trusted: TrustedKeys | None = None,
    flipped: Flipped | None = None,
) -> Swapped:
    """Swap back to the version before the one in force. Raises ArtifactError when there is none, and as `swap`."""
    version = predecessor(Local(target.repository), _known(target, model))
    if version is None:
        raise ArtifactError(f"model {model!r} has no version before the one in force", field="version")
    return swap(target, model, version, settings=settings, keep=keep, trusted=trusted, flipped=flipped)


def _known(target: Target, model: str) -> str:
    try:
        check_model_name(model)
    except ValueError as error:
        raise ArtifactError(str(error), field="model") from error
    if not (target.repository / model / CONFIG_NAME).is_file():
        names = sorted(path.parent.name for path in target.repository.glob(f"[a-z0-9]*/{CONFIG_NAME}"))
        expected = " or ".join(names) or "a published model"
        raise ArtifactError("no such model in the repository", field="model", expected=expected, was=repr(model))
    return model


def _both(server: TrustedKeys | None, caller: TrustedKeys | None) -> TrustedKeys | None:
    """The keys that server and caller trust: a caller without any does not open a server that asks for signatures."""
    if server is None or caller is None:
        return caller if server is None else server
    return {key: raw for key, raw in server.items() if caller.get(key) == raw}


def _newest(folder: Path) -> int:
    numbers = numbers_in(folder)
    if not numbers:
        raise ArtifactError(f"model {folder.name!r} has no version", field="version")
    return numbers[-1]


class _Swap:
    """One swap on its way: what is served, and the time of each step."""

    def __init__(
        self,
        target: Target,
        model: str,
        version: int,
        settings: SwapSettings,
        keep: int,
        trusted: TrustedKeys | None,
        flipped: Flipped | None,
    ) -> None:
        self._target, self._model, self._version, self._keep = target, model, version, keep
        self._settings, self._trusted, self._flipped = settings, _both(target.trusted, trusted), flipped
        self._folder = target.repository / model
        self._loader = loading.Loader(target, model, settings.load_timeout_s)
        self._steps: dict[str, float] = {}
        self._step = "start"

    def run(self) -> Swapped:
        served: Sequence[int] = ()
        try:
            served = self._loader.served()
            with self._timed("verify"):
                manifest = self._verify()
            previous = self._in_force(served)
            with self._undone(served):
                memory = self._prepare(manifest, served)
                with self._timed("flip"):
                    self._flip(manifest)
        except TickserveError as error:
            raise self._refused(error, served) from error
        drained = self._retire([number for number in served if number != self._version])
        return Swapped(
            self._model, self._version, None if previous == self._version else previous, drained, memory, self._steps
        )

    def _prepare(self, manifest: Manifest, served: Sequence[int]) -> Memory | str:
        """The new version loaded beside the old, warm, right, and not leaking."""
        with self._timed("load"):
            self._loader.load([*served, self._version], (self._version,))
        rows = self._rows(manifest)
        sizes = loading.expected_batches(self._folder, [*served, self._version])
        with self._timed("warm"):
            self._warm(sizes, rows)
        with self._timed("golden"):
            headers = self._target.control.headers
            path = self._folder / str(self._version)
            url, most = self._target.http_url, sizes[-1]
            check_golden(url, self._model, self._version, path, headers=headers, most_rows=most)
        with self._timed("memory"):
            return memory_sentinel.watch(self._target, self._version, manifest, _batch(rows, most), self._settings)

    def _verify(self) -> Manifest:
        options = read_config(self._folder / CONFIG_NAME)
        return verify_served(self._folder, self._version, options, self._trusted)

    def _in_force(self, served: Sequence[int]) -> int | None:
        current = read_current(self._folder)
        if current is not None and current.version in served:
            return current.version
        return max(served) if served else None

    def _rows(self, manifest: Manifest) -> Arrays:
        pairs = read_golden(self._folder / str(self._version), manifest)
        return {tensor.name: pairs[tensor.name] for tensor in manifest.inputs}

    def _warm(self, expected: Sequence[int], rows: Arrays) -> None:
        """One request of each batch size that the batcher makes: allocations and kernels are chosen per shape."""
        sizes = sorted({1, *expected})
        connection = http.client.HTTPConnection(self._target.http_url, timeout=self._settings.load_timeout_s)
        try:
            for size in (*sizes, *sizes):
                headers = self._target.control.headers
                infer(connection, self._model, self._version, _batch(rows, size), headers)
        finally:
            connection.close()

    def _flip(self, manifest: Manifest) -> None:
        """Put the version in force, or leave everything as it was."""
        paths = [self._folder / name for name in (CURRENT_NAME, CONFIG_NAME)]
        before = [path.read_bytes() if path.is_file() else None for path in paths]
        repository = Local(self._target.repository)
        with repository.locked():
            try:
                put_in_force(repository, self._model, self._version, self._keep)
                if self._flipped is not None:
                    self._flipped(self._version, manifest)
            except BaseException:
                for path, data in zip(paths, before, strict=True):
                    _restore(path, data)
                raise

    def _retire(self, old: Sequence[int]) -> bool:
        """Drain and unload the old versions; False when one is still asked for. The new one serves either way."""
        with self._timed("drain"):
            quiet = [number for number in old if self._quiet(number)]
        with self._timed("unload"), suppress(TickserveError):
            self._loader.load([number for number in old if number not in quiet] + [self._version], ())
            self._loader.wait_gone(quiet)
            return len(quiet) == len(old)
        return False

    def _quiet(self, version: int) -> bool:
        """Whether requests for `version` stop coming, within the drain's time."""
        deadline = time.monotonic() + self._settings.drain_timeout_s
        seen, since = -1, time.monotonic()
        while time.monotonic() < deadline:
            try:
                count = self._target.control.counts(self._model, version).requests
            except (RequestError, ComponentError, ValueError, KeyError):
                return False
            if count != seen:
                seen, since = count, time.monotonic()
            elif time.monotonic() - since >= self._settings.drain_quiet_ms / 1e3:
                return True
            time.sleep(POLL_S)
        return False

    @contextmanager
    def _undone(self, served: Sequence[int]) -> Iterator[None]:
        """Take the new version away again when the block fails for whatever reason."""
        try:
            yield
        except BaseException:
            with suppress(TickserveError):
                if served:
                    self._loader.load(served, ())
                    self._loader.wait_gone({self._version} - set(served))
            raise

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        self._step, began = step, time.monotonic()
        try:
            yield
        finally:
            self._steps[step] = round((time.monotonic() - began) * 1e3, 1)

    def _refused(self, error: TickserveError, served: Sequence[int]) -> TickserveError:
        serving = f"version {' and '.join(map(str, served))} serves as before" if served else "nothing has changed"
        where = f"model {self._model!r} version {self._version} refused at step {self._step!r}"
        named = type(error)(f"{where}: {error}", hint=serving)
        named.field, named.expected, named.was = error.field, error.expected, error.was
        return named


def _restore(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink(missing_ok=True)
    elif path.read_bytes() != data:
        write_atomic(path, data)


def _batch(rows: Arrays, size: int) -> Arrays:
    """`size` rows, the golden ones over and over."""
    return {name: np.resize(values, (size, *values.shape[1:])) for name, values in rows.items()}

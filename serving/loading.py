"""Which versions of a model a running server has loaded, and how to change that: one way for each kind of server.

The embedded server sees its repository through a view (serving/view.py), so the view changes and the server looks. A
server elsewhere has a repository of its own, so the list of versions goes along with the load request.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as schema

from export.largest_batch import fit_to
from serving import stubs, view
from serving.target import Target
from tickserve.errors import ComponentError
from tickserve.model_config import CONFIG_NAME

POLL_S = 0.01


class Loader:
    """The loaded versions of one model on one server."""

    def __init__(self, target: Target, model: str, timeout_s: float) -> None:
        self._target, self._model, self._timeout_s = target, model, timeout_s
        self._source = target.repository / model
        self._view = None if target.view is None else target.view / model

    def served(self) -> tuple[int, ...]:
        """The versions loaded now, oldest first; an embedded server's in the view's words."""
        if self._view is not None:
            return view.shown(self._view)
        return self._target.control.versions(self._model)

    def load(self, versions: Iterable[int], awaited: Iterable[int]) -> None:
        """Have exactly `versions` loaded, and return when those of `awaited` answer.

        Versions that are loaded already go on serving. Raises ServerRejectedError with the server's reason; the server
        then still has what it had before.
        """
        numbers = sorted(set(versions))
        if self._view is None:
            self._target.control.load(self._model, self._timeout_s, _config(self._source, numbers))
        else:
            view.show(self._source, self._view, numbers)
            self._target.control.load(self._model, self._timeout_s)
        deadline = time.monotonic() + self._timeout_s
        for version in awaited:
            while not self._target.control.ready(self._model, version):
                _check(deadline, f"version {version} is not ready after {self._timeout_s:g} s")
                time.sleep(POLL_S)

    def reload(self, version: int) -> None:
        """Load `version` anew: first without it, then with it."""
        others = [number for number in self.served() if number != version]
        if others:
            self.load(others, ())
            self._wait_unready([version])
            if self._view is not None:
                view.show(self._source, self._view, [*others, version])
        else:
            self._target.control.unload(self._model, self._timeout_s)
            self._wait_unready([version])
        self.load([*others, version], (version,))

    def wait_gone(self, versions: Iterable[int]) -> None:
        """Return when the server has let go of `versions`, processes included. Raises ComponentError."""
        gone = list(versions)
        self._wait_unready(gone)
        pid, deadline = self._target.pid, time.monotonic() + self._timeout_s
        while pid is not None and any(
            stub.model == self._model and stub.version in gone for stub in stubs.stubs_of(pid).values()
        ):
            _check(deadline, "the old version's process does not end")
            time.sleep(POLL_S)
        if self._view is not None:
            for version in gone:
                view.forget(self._view, version)

    def _wait_unready(self, versions: Iterable[int]) -> None:
        deadline = time.monotonic() + self._timeout_s
        for version in versions:
            while self._target.control.ready(self._model, version):
                _check(deadline, f"version {version} does not unload")
                time.sleep(POLL_S)


def expected_batches(folder: Path, versions: Iterable[int]) -> tuple[int, ...]:
    """The batch sizes to expect while `versions` of a model are loaded: the preferred ones, last the largest."""
    config = _parse(folder)
    fit_to(config, folder, versions)
    return *config.dynamic_batching.preferred_batch_size, config.max_batch_size


def _parse(folder: Path) -> Any:
    return text_format.Parse((folder / CONFIG_NAME).read_text("utf-8"), schema.ModelConfig())


def _config(folder: Path, versions: Sequence[int]) -> dict[str, Any]:
    """The model's configuration in Triton's JSON form, naming `versions`, with rows that all of them were gated for."""
    config = _parse(folder)
    config.version_policy.Clear()
    config.version_policy.specific.versions.extend(versions)
    fit_to(config, folder, versions)
    value: dict[str, Any] = json_format.MessageToDict(config, preserving_proto_field_name=True)
    return value


def _check(deadline: float, reason: str) -> None:
    if time.monotonic() > deadline:
        raise ComponentError(reason, field="swap.load_timeout_s")

"""`monitor export`: follow a journal, measure, export, and write the action file, until it is told to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from monitoring.drift.decide import Decider
from monitoring.drift.families import DriftCollector, Snapshot
from monitoring.drift.monitor import DriftMonitor
from tickserve.config import DriftSettings
from tickserve.errors import ArtifactError, ComponentError, EmptyDataError
from tickserve.journal import GapRecord, JournalTail, Record
from tickserve.manifest import Manifest
from tickserve.metrics import Endpoint
from tickserve.risk import ModelAction, actions_held, read_actions, write_actions

LOG = logging.getLogger("tickserve.drift")
NS_PER_S = 1_000_000_000


class DriftExporter:
    """One journal, followed; `look()` takes what is new and says what it means.

    `action_file`: where the actions go (None: nowhere); what it says already holds until it is lifted. `once`: the
    whole journal as it is, thresholds without their times. `look`: gives the manifests anew, for a bundle in none
    of `manifests`. Raises EmptyDataError for a folder that is not there.
    """

    def __init__(
        self,
        journal: Path,
        manifests: dict[str, Manifest],
        settings: DriftSettings,
        action_file: Path | None = None,
        *,
        once: bool = False,
        look: Callable[[], Mapping[str, Manifest]] | None = None,
    ) -> None:
        if not journal.is_dir():
            raise EmptyDataError("no journal here", field=journal.name, expected="a folder of *.tsj files")
        since_ns = 0 if once else time.time_ns() - int(settings.window_s * NS_PER_S)
        if once:
            settings = settings.model_copy(update={"raise_s": 0.0, "clear_s": 0.0})
        self._tail, self._since_ns = JournalTail(journal, since_ns=since_ns), since_ns
        self._monitor = DriftMonitor(manifests, settings, look)
        before = _asked_before(action_file)
        self._decider = Decider(settings, before)
        self._cleared = {model: asked.cleared_ns for model, asked in before.items() if asked.cleared_ns}
        for model, cleared_ns in self._cleared.items():
            self._monitor.forget(model, cleared_ns)
        self._action_file, self._failing = action_file, False
        self._collector, self._registry = DriftCollector(), CollectorRegistry(auto_describe=False)
        self._registry.register(self._collector)

    @property
    def damaged(self) -> int:
        """Frames of the journal that could not be read."""
        return self._tail.damaged

    def look(self) -> Snapshot:
        """Read what is new, measure, decide, and write the action file. Changes are logged."""
        self._monitor.feed(record for record in self._tail.poll() if _moment(record) >= self._since_ns)
        if self._action_file is None:
            return self._decided()
        with actions_held(self._action_file):
            self._take_up_cleared(self._action_file)
            told = self._decided()
            self._write(self._action_file)
        return told

    def rendered(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics, as `/metrics` says them, and their content type."""
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind

    def _decided(self) -> Snapshot:
        measured = self._monitor.measure()
        for change in self._decider.decide(measured, time.time_ns()):
            LOG.warning("model %r: %s -> %s: %s", change.model, change.before, change.after, change.reason)
        told = self._collector.snapshot = Snapshot(measured, self._decider.asked, self._monitor.counted)
        return told

    def _take_up_cleared(self, path: Path) -> None:
        """What a person has lifted in the file since the last look (`monitor clear`)."""
        try:
            models = read_actions(path).models
        except (ArtifactError, OSError):  # it is about to be written anew
            return
        for model, asked in models.items():
            if asked.cleared_ns > self._cleared.get(model, 0):
                self._cleared[model] = asked.cleared_ns
                self._decider.clear(model, asked)
                self._monitor.forget(model, asked.cleared_ns)
                LOG.warning("model %r: %s", model, asked.reason)

    def _write(self, path: Path) -> None:
        """A disk that is full costs no metric: clients see a file that grows old, and say so in every signal."""
        try:
            write_actions(path, time.time_ns(), self._decider.asked)
        except ComponentError as error:
            if not self._failing:
                LOG.error("the action file cannot be written, clients will find it old: %s", error)
            self._failing = True
            return
        if self._failing:
            LOG.warning("the action file is written again")
        self._failing = False


def run(
    exporter: DriftExporter, settings: DriftSettings, say: Callable[[str], Any], option: str = "drift.port"
) -> None:
    """Serve `/metrics` and look every `every_s`, until interrupted. Raises PortInUseError."""
    with ExitStack() as stack:
        endpoint = Endpoint(settings.address, settings.port, exporter.rendered, option=option)
        stack.callback(endpoint.close)
        say(f"serving {endpoint.url}")
        failing = False
        while True:
            started = time.monotonic()
            try:
                exporter.look()
                failing = False
            except OSError as error:  # clients see the action file grow old meanwhile
                if not failing:
                    LOG.error("the journal cannot be read: %s", error.strerror)
                failing = True
            time.sleep(max(0.0, settings.every_s - (time.monotonic() - started)))


def _moment(record: Record) -> int:
    return record.last_ns if isinstance(record, GapRecord) else record.wall_ns


def _asked_before(path: Path | None) -> dict[str, ModelAction]:
    """The actions of an earlier run. One that cannot be read is no reason not to measure."""
    if path is None or not path.exists():
        return {}
    try:
        return read_actions(path).models
    except (ArtifactError, OSError) as error:
        LOG.warning("the action file is not taken up: %s", error)
        return {}

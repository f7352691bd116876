"""From records to what is known of each model: decisions to their bundle, outcomes to their decision, all bounded."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from monitoring.drift.tally import UP, BundleTally, Measured, Outcome
from tickserve.config import DriftSettings
from tickserve.errors import TickserveError, UsageError
from tickserve.journal import OUTCOME, ActionRecord, DecisionRecord, GapRecord, Record
from tickserve.manifest import CLASSES, MANIFEST_NAME, Manifest, load_manifest

LOG = logging.getLogger("tickserve.drift")
MAX_BUNDLES = 256
RELOOK_S = 10.0
AHEAD_NS = 5_000_000_000  # a writer's clock may be ahead of this machine's by so much


class _Asked(NamedTuple):
    """A decision that waits for its outcomes, one a row."""

    tally: BundleTally
    wall_ns: int
    decision: tuple[str, ...]
    p_up: tuple[float, ...]
    known: set[int]


class Counted(NamedTuple):
    """What was read so far, and what could not be used."""

    statuses: Mapping[tuple[str, str], int]  # by model and status
    outcomes_unmatched: int
    outcomes_unread: int
    lost: int
    newest_ns: int


class DriftMonitor:
    """Takes the records of a journal and says what is known of each bundle. Not safe for threads.

    `look`: gives the manifests anew; asked when a bundle is not in `manifests`, at most every `RELOOK_S`.
    """

    def __init__(
        self,
        manifests: Mapping[str, Manifest],
        settings: DriftSettings,
        look: Callable[[], Mapping[str, Manifest]] | None = None,
    ) -> None:
        self._manifests, self._settings, self._look = manifests, settings, look
        self._looked = -math.inf
        self._bundles: OrderedDict[tuple[str, str], BundleTally] = OrderedDict()  # the one heard of last is last
        self._waiting: OrderedDict[str, _Asked] = OrderedDict()
        self._statuses: Counter[tuple[str, str]] = Counter()
        self._cleared: dict[str, int] = {}  # by model: what came before counts no more
        self._unmatched = self._unread = self._lost = self._newest_ns = 0

    def feed(self, records: Iterable[Record]) -> int:
        """Count `records`; how many there were."""
        number = 0
        latest_ns = time.time_ns() + AHEAD_NS
        for record in records:
            number += 1
            if isinstance(record, GapRecord):
                self._lost += record.count
                continue
            wall_ns = min(record.wall_ns, latest_ns)
            self._newest_ns = max(self._newest_ns, wall_ns)
            if isinstance(record, DecisionRecord):
                self._decision(record, wall_ns)
            elif record.action == OUTCOME:
                self._outcome(record)
        return number

    def measure(self) -> list[Measured]:
        """What is known of each bundle; of a model's bundles, the one that was asked last comes last."""
        return [tally.measure(self._newest_ns) for tally in self._bundles.values()]

    def forget(self, model: str, before_ns: int) -> None:
        """Measure a model anew: nothing of it from before a moment counts, if it is read again or not."""
        self._cleared[model] = before_ns
        for (name, _), tally in self._bundles.items():
            if name == model:
                tally.forget(before_ns)

    @property
    def counted(self) -> Counted:
        """What was read so far."""
        return Counted(dict(self._statuses), self._unmatched, self._unread, self._lost, self._newest_ns)

    def _decision(self, record: DecisionRecord, wall_ns: int) -> None:
        if not record.bundle_digest:  # no model that is pinned was asked: its name may be anything
            return
        key = (record.model, record.bundle_digest)
        self._statuses[record.model, record.status] += 1
        tally = self._bundles.get(key)
        if tally is None or not tally.pinned:
            manifest = self._manifest_of(record.bundle_digest)
            if tally is not None and manifest is not None:
                tally.learn(manifest)
        if tally is None:
            tally = self._bundles[key] = BundleTally(*key, manifest, self._settings)
            if record.model in self._cleared:
                tally.forget(self._cleared[record.model])
            if len(self._bundles) > MAX_BUNDLES:
                self._bundles.popitem(last=False)
        self._bundles.move_to_end(key)
        tally.add(record, wall_ns)
        if record.status == "OK" and record.decision is not None and "probabilities" in record.outputs:
            up = record.classes.index(UP)
            p_up = tuple(record.outputs["probabilities"][:, up].tolist())
            self._waiting[record.request_id] = _Asked(tally, wall_ns, record.decision, p_up, set())
            if len(self._waiting) > self._settings.join_records:
                self._waiting.popitem(last=False)

    def _manifest_of(self, digest: str) -> Manifest | None:
        """The manifest of a bundle; a model may have been published after this was started."""
        if digest not in self._manifests and self._look is not None and time.monotonic() - self._looked >= RELOOK_S:
            self._looked = time.monotonic()
            try:
                self._manifests = self._look()
            except (TickserveError, OSError) as error:  # half-written, or gone for now: it is looked for again
                LOG.warning("the manifests cannot be read again: %s", error)
        return self._manifests.get(digest)

    def _outcome(self, record: ActionRecord) -> None:
        try:
            row, outcome = _read(record.fields)
        except ValueError:
            self._unread += 1
            return
        asked = self._waiting.get(record.request_id)
        if asked is None or not 0 <= row < len(asked.decision) or row in asked.known:
            self._unmatched += 1
            return
        asked.known.add(row)
        # In the window where the decision was taken: that is whose calibration it is.
        asked.tally.add_outcome(outcome, asked.decision[row], asked.p_up[row], asked.wall_ns)
        if len(asked.known) == len(asked.decision):
            del self._waiting[record.request_id]


def _read(fields: Mapping[str, str]) -> tuple[int, Outcome]:
    """The row and its outcome. Raises ValueError for what is none."""
    realised = fields.get("realised")
    if realised is not None and realised not in CLASSES:
        raise ValueError("realised: expected a class")
    return int(fields.get("row", "0")), Outcome(
        realised, _number(fields.get("pnl_bp")), _number(fields.get("turnover"))
    )


def _number(text: str | None) -> float | None:
    if text is None:
        return None
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return number


def known_manifests(places: Iterable[Path]) -> dict[str, Manifest]:
    """The manifests at `places` by their bundle digest: repository folders (every version), versions, bundles, files.

    Raises UsageError where there is none, and ArtifactError for one that is not valid.
    """
    found: dict[str, Manifest] = {}
    for place in places:
        start = place.parent if place.name == MANIFEST_NAME else place
        folders = sorted({path.parent for below in ("", "*/", "*/*/") for path in start.glob(below + MANIFEST_NAME)})
        if not folders:
            expected = "a repository, a version or a bundle"
            raise UsageError("no manifest here", field="repository", expected=expected, was=place.name[:100])
        for folder in folders:
            manifest = load_manifest(folder)
            found[manifest.digest()] = manifest
    return found

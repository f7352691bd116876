"""One bundle's records, added up: features and score against its reference, ages, outcomes. B rows, F features."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from monitoring.drift.psi import psi
from monitoring.drift.window import Window
from tickserve.config import DriftSettings
from tickserve.journal import DecisionRecord
from tickserve.manifest import Manifest
from tickserve.reference import Reference

SCORE = "score"
UP = "up"
QUANTILES = (0.5, 0.9, 0.99)
PROBABILITY_BINS = 10
# Ages from a microsecond to eleven days, each place 2.3 % wider than the one before; what is younger lies in the first.
AGES_PER_DECADE, YOUNGEST_S, AGE_PLACES = 100, 1e-6, 1_200
HITS, CALLS = range(2)


@dataclass(frozen=True)
class Outcome:
    """How one row's decision turned out: None is not known."""

    realised: str | None
    pnl_bp: float | None
    turnover: float | None


@dataclass(frozen=True)
class Calibration:
    """P(up) against how often "up" came true, by bins of equal width: rows, mean predicted, share realised of each."""

    error: float
    rows: int
    bins: tuple[tuple[int, float, float], ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """What is known of one bundle by now. None is not known: too few rows, outcomes, or no reference."""

    model: str
    version: str
    bundle_digest: str
    reference: bool
    rows: int
    score_rows: int
    psi: dict[str, float]
    psi_max: float | None
    psi_score: float | None
    age_s: dict[str, float]
    calibration: Calibration | None
    hit_rate: float | None
    outcomes: int
    pnl_bp: float
    turnover: float
    notes: tuple[str, ...] = field(default=())

    @property
    def psi_features(self) -> dict[str, float]:
        """Of the features alone."""
        return {name: value for name, value in self.psi.items() if name != SCORE}


class BundleTally:
    """Adds up what one bundle was asked and answered. `manifest` None: it is in no repository that is known."""

    def __init__(self, model: str, bundle_digest: str, manifest: Manifest | None, settings: DriftSettings) -> None:
        self.model, self.bundle_digest, self.version = model, bundle_digest, ""
        self._manifest, self._settings = manifest, settings
        self._reference: Reference | None = None
        self._columns: tuple[str, ...] = ()
        self._input, self._forgotten_ns = "", 0
        span = (settings.window_s, settings.slices)
        self._ages = Window((AGE_PLACES,), *span)
        self._reliability = Window((PROBABILITY_BINS, 3), *span, dtype=np.float64)
        self._trading = Window((2,), *span)
        self._windows = [self._ages, self._reliability, self._trading]
        self.outcomes, self.pnl_bp, self.turnover = 0, 0.0, 0.0
        self.statuses: Counter[str] = Counter()
        if manifest is not None:
            self.learn(manifest)

    @property
    def pinned(self) -> bool:
        """Whether its manifest is known."""
        return self._manifest is not None

    def learn(self, manifest: Manifest) -> None:
        """Measure against this manifest's reference, from here on."""
        self._manifest, self._reference = manifest, manifest.reference
        self._columns, self._input = manifest.features.columns, manifest.inputs[0].name
        if manifest.reference is None:
            return
        span = (self._settings.window_s, self._settings.slices)
        self._edges = _padded(manifest.reference)
        self._features = Window((len(self._columns), self._edges.shape[1] + 2), *span)
        self._scores = Window(_places(manifest.reference), *span)
        self._windows += [self._features, self._scores]
        for window in (self._features, self._scores):
            window.forget(self._forgotten_ns)

    def add(self, record: DecisionRecord, wall_ns: int) -> None:
        """Count one decision, at `wall_ns`."""
        version = record.version if record.version is not None else record.version_asked
        self.version = str(version) if version is not None else self.version
        if record.event_age_us is not None:
            slot = self._ages.at(wall_ns)
            if slot is not None:
                slot[_age_place(record.event_age_us / 1e6)] += 1
        if self._reference is None:
            return
        for tensor in record.tensors:
            if tensor.name == self._input:
                shape = (tensor.shape[0], -1, len(self._columns))
                # Of a window the newest row: the others were counted when they were the newest.
                self._add_features(np.frombuffer(tensor.data, "<f4").reshape(shape)[:, -1], wall_ns)
        answered = record.status == "OK" or record.fallback == "local"
        if answered and self._reference.score is not None and "score" in record.outputs:
            slot = self._scores.at(wall_ns)
            if slot is not None:
                slot += self._reference.score.counts_of(record.outputs["score"].reshape(-1))

    def _add_features(self, rows: npt.NDArray[np.float32], wall_ns: int) -> None:
        slot = self._features.at(wall_ns)
        if slot is None:
            return
        unknown = np.isnan(rows)
        places = (rows[:, :, np.newaxis] > self._edges[np.newaxis]).sum(axis=2)  # [B, F], the bin of each
        places[unknown] = slot.shape[1] - 1
        np.add.at(slot, (np.arange(rows.shape[1])[np.newaxis], places), 1)

    def add_outcome(self, outcome: Outcome, decision: str, p_up: float, wall_ns: int) -> None:
        """Count how one row turned out."""
        self.outcomes += 1
        self.pnl_bp += outcome.pnl_bp or 0.0
        self.turnover += outcome.turnover or 0.0
        reliability, trading = (each.at(wall_ns) for each in (self._reliability, self._trading))
        if outcome.realised is None or reliability is None or trading is None:
            return
        place = min(int(p_up * PROBABILITY_BINS), PROBABILITY_BINS - 1)
        reliability[place] += (1.0, p_up, float(outcome.realised == UP))
        if "flat" not in (decision, outcome.realised):
            trading[CALLS] += 1
            trading[HITS] += decision == outcome.realised

    def forget(self, before_ns: int) -> None:
        """Begin anew: what came before a moment, or is here by now, is not measured any more."""
        self._forgotten_ns = before_ns
        for window in self._windows:
            window.forget(before_ns)

    def measure(self, now_ns: int) -> Measured:
        """Everything that can be said at a moment of the journal's time."""
        for window in self._windows:
            window.advance(now_ns)
        index = self._indices()
        judged = [value for name, value in index.items() if is_judged(name, self._settings)]
        trading = self._trading.total()
        rows, score_rows = self._rows()
        return Measured(
            model=self.model,
            version=self.version,
            bundle_digest=self.bundle_digest,
            reference=self._reference is not None,
            rows=rows,
            score_rows=score_rows,
            psi=index,
            psi_max=max(judged, default=None),
            psi_score=index.get(SCORE),
            age_s=_quantiles(self._ages.total()),
            calibration=self._calibration(),
            hit_rate=float(trading[HITS] / trading[CALLS]) if trading[CALLS] >= self._settings.min_outcomes else None,
            outcomes=self.outcomes,
            pnl_bp=self.pnl_bp,
            turnover=self.turnover,
            notes=self._notes(rows),
        )

    def _rows(self) -> tuple[int, int]:
        if self._reference is None:
            return 0, 0
        features = self._features.total()
        return int(features[0].sum()) if len(features) else 0, int(self._scores.total().sum())

    def _notes(self, rows: int) -> tuple[str, ...]:
        if self._manifest is None:
            return ("no reference: this bundle is in no repository that was named",)
        if self._reference is None:
            return ("no reference: the manifest was written without one",)
        least = self._settings.min_rows
        return () if rows >= least else (f"too few rows: {rows} of {least} in the window",)

    def _indices(self) -> dict[str, float]:
        """PSI by feature, and of the score, where there are rows enough."""
        reference, least = self._reference, self._settings.min_rows
        if reference is None:
            return {}
        found = {}
        for name, column, counts in zip(self._columns, reference.columns, self._features.total(), strict=True):
            bins = len(column.shares)
            if counts.sum() >= least:
                found[name] = psi(column, np.append(counts[:bins], counts[-1]), reference.rows)
        scores = self._scores.total()
        if reference.score is not None and scores.sum() >= least:
            found[SCORE] = psi(reference.score, scores, reference.score_rows)
        return found

    def _calibration(self) -> Calibration | None:
        sums: Any = self._reliability.total()
        count = int(sums[:, 0].sum())
        if count < self._settings.min_outcomes:
            return None
        places = tuple(int(place) for place in np.flatnonzero(sums[:, 0]))
        bins = tuple(
            (int(sums[at, 0]), float(sums[at, 1] / sums[at, 0]), float(sums[at, 2] / sums[at, 0])) for at in places
        )
        error = sum(rows * abs(predicted - realised) for rows, predicted, realised in bins) / count
        return Calibration(error, count, bins, places)


def is_judged(name: str, settings: DriftSettings) -> bool:
    """Whether a PSI of this name may ask for an action."""
    return name not in settings.ignore and (SCORE if name == SCORE else "features") in settings.judge


def _padded(reference: Reference) -> npt.NDArray[np.float32]:
    """The edges of all columns [F, K], filled up with infinity: nothing lies above it."""
    most = max((len(column.edges) for column in reference.columns), default=0)
    edges = np.full((len(reference.columns), most), np.inf, np.float32)
    for row, column in zip(edges, reference.columns, strict=True):
        row[: len(column.edges)] = column.edges
    return edges


def _places(reference: Reference) -> tuple[int]:
    return (len(reference.score.shares) + 1 if reference.score is not None else 1,)


def _age_place(seconds: float) -> int:
    if seconds <= YOUNGEST_S:
        return 0
    return min(AGE_PLACES - 1, int(np.log10(seconds / YOUNGEST_S) * AGES_PER_DECADE) + 1)


def _quantiles(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    """The upper end of the place that each quantile lies in."""
    total = int(counts.sum())
    if not total:
        return {}
    reached = np.cumsum(counts)
    places = {quantile: int(np.searchsorted(reached, quantile * total)) for quantile in QUANTILES}
    return {f"{quantile:g}": YOUNGEST_S * 10 ** (place / AGES_PER_DECADE) for quantile, place in places.items()}

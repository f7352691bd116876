"""What was measured as metric families of prometheus_client. Names and labels: docs/metrics.md."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from monitoring.drift.monitor import Counted
from monitoring.drift.tally import Measured
from tickserve.risk import ACTIONS, ModelAction

MODEL, VERSION = "model", "version"


@dataclass(frozen=True)
class Snapshot:
    """All that is exported, as of one look."""

    measured: Sequence[Measured]
    asked: Mapping[str, ModelAction]
    counted: Counted


class DriftCollector:
    """Gives the newest snapshot to a registry."""

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None

    def collect(self) -> Iterator[Metric]:
        """Every family; none before the first look. What is not known has no sample."""
        told = self.snapshot
        if told is not None:
            # A version that is published again has another bundle: of one name, the bundle that was asked last counts.
            newest = {(each.model, each.version): each for each in told.measured}
            yield from _drift(list(newest.values()))
            yield from _calibration(list(newest.values()))
            yield from _trading(list(newest.values()))
            yield from _journal(told)


def _gauge(name: str, text: str, labels: Sequence[str], samples: Mapping[Any, float | None]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in samples.items():
        if value is not None:
            family.add_metric(key, value)
    return family


def _counter(name: str, text: str, labels: Sequence[str], samples: Mapping[Any, float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in samples.items():
        family.add_metric(key, value)
    return family


def _drift(measured: Sequence[Measured]) -> Iterator[Metric]:
    psi = {(m.model, m.version, name): value for m in measured for name, value in m.psi.items()}
    yield _gauge(
        "tickserve_drift_psi", "Population stability index against training.", (MODEL, VERSION, "feature"), psi
    )
    worst = {(m.model, m.version): m.psi_max for m in measured}
    yield _gauge("tickserve_drift_psi_max", "The largest of those that are judged.", (MODEL, VERSION), worst)
    ages = {(m.model, quantile): value for m in measured for quantile, value in m.age_s.items()}
    yield _gauge("tickserve_feature_age_seconds", "Age of the newest event when scored.", (MODEL, "quantile"), ages)


def _calibration(measured: Sequence[Measured]) -> Iterator[Metric]:
    known = [(m.model, m.version, m.calibration) for m in measured if m.calibration is not None]
    errors = {(model, version): found.error for model, version, found in known}
    yield _gauge("tickserve_calibration_error", "Mean distance of P(up) from what came true.", (MODEL, VERSION), errors)
    bins = {
        (model, version, str(place), kind): value
        for model, version, found in known
        for place, (_, predicted, realised) in zip(found.places, found.bins, strict=True)
        for kind, value in (("predicted", predicted), ("realised", realised))
    }
    labels = (MODEL, VERSION, "bin", "kind")
    yield _gauge(
        "tickserve_calibration_bin_ratio", "P(up) and the share that went up, by tenths of P(up).", labels, bins
    )


def _trading(measured: Sequence[Measured]) -> Iterator[Metric]:
    told = [m for m in measured if m.outcomes]
    names = (MODEL, VERSION)
    rates = {(m.model, m.version): m.hit_rate for m in told}
    yield _gauge("tickserve_trading_hit_ratio", "Calls of a side that were right, of those that moved.", names, rates)
    outcomes = {(m.model, m.version): float(m.outcomes) for m in told}
    yield _counter("tickserve_trading_outcomes", "Decisions whose outcome is known.", names, outcomes)
    profits = {(m.model, m.version): m.pnl_bp for m in told}
    # A sum that falls too, so no counter: `delta`, not `rate`.
    yield _gauge("tickserve_trading_pnl_bp_total", "Sum of what outcomes made, basis points.", names, profits)
    traded = {(m.model, m.version): m.turnover for m in told}
    yield _counter("tickserve_trading_turnover", "Sum of what outcomes traded.", names, traded)


def _journal(told: Snapshot) -> Iterator[Metric]:
    actions = {
        (model, action): float(asked.action == action) for model, asked in told.asked.items() for action in ACTIONS
    }
    yield _gauge("tickserve_drift_action", "1: this is what clients are asked for.", (MODEL, "action"), actions)
    counted = told.counted
    records = {key: float(count) for key, count in counted.statuses.items()}
    yield _counter("tickserve_journal_records", "Decisions read.", (MODEL, "status"), records)
    if counted.newest_ns:
        family = GaugeMetricFamily("tickserve_journal_lag_seconds", "Age of the newest record that was read.")
        family.add_metric((), max(0.0, (time.time_ns() - counted.newest_ns) / 1e9))
        yield family

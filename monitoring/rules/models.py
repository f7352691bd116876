"""Alerts on what the journal says about the models: drift, calibration, right calls, and whether it is read at all."""

from __future__ import annotations

from functools import partial

from monitoring.rules.rule import Alert, Group, number
from monitoring.rules.servers import in_session_only
from tickserve.config import MonitoringSettings


def model_alerts(settings: MonitoringSettings) -> Group:
    """Every alert on the models."""
    alert = partial(Alert, severity="warning", after_s=settings.ticket_after_s)
    return Group(
        "tickserve-models",
        [
            alert(
                alert="TickserveDrift",
                expr=f"max by (namespace, model, version) (tickserve_drift_psi_max) > {number(settings.psi)}",
                summary="{{ $labels.model }} meets another market than it was trained on",
                description="The largest population stability index that is judged: {{ $value | printf `%.2f` }}.",
                keys=("psi", "ticket_after_s"),
            ),
            Alert(
                alert="TickserveDriftFlat",
                severity="critical",
                expr='max by (namespace, model) (tickserve_drift_action{action="flat"}) == 1',
                after_s=settings.page_after_s,
                summary="Clients trade nothing on {{ $labels.model }}: its drift says flat",
                description="The drift action in force is flat: every decision of the model is taken as flat.",
                keys=("page_after_s",),
            ),
            alert(
                alert="TickserveCalibration",
                expr="max by (namespace, model, version) (tickserve_calibration_error)"
                f" > {number(settings.calibration_error)}",
                summary="Probabilities of {{ $labels.model }} are not what happens",
                description="Predicted and realised shares differ by {{ $value | humanizePercentage }} in the mean.",
                keys=("calibration_error", "ticket_after_s"),
            ),
            alert(
                alert="TickserveHitRatio",
                # The exporter has no ratio of fewer outcomes than drift.min_outcomes.
                expr=f"tickserve_trading_hit_ratio < {number(settings.hit_ratio)}",
                summary="{{ $labels.model }} is wrong too often",
                description="Only {{ $value | humanizePercentage }} of its calls were right.",
                keys=("hit_ratio", "ticket_after_s"),
            ),
            Alert(
                alert="TickserveJournalLag",
                severity="warning",
                expr="max by (namespace, job, instance) (tickserve_journal_lag_seconds)"
                f" > {number(settings.journal_lag_s)}{in_session_only(settings)}",
                after_s=settings.page_after_s,
                summary="The journal of {{ $labels.instance }} is not read, or not written",
                description="Its newest record is {{ $value | humanizeDuration }} old: so are drift and calibration.",
                keys=("journal_lag_s", "session_days", "session_open", "session_close", "page_after_s"),
            ),
            Alert(
                alert="TickserveJournalDown",
                severity="warning",
                expr=f'up{{job=~"{settings.journal_jobs}"}} == 0',
                after_s=settings.page_after_s,
                summary="Nobody follows the journal at {{ $labels.instance }}",
                description="Prometheus could not scrape it: drift, calibration and hit rate are not measured.",
                keys=("journal_jobs", "page_after_s"),
            ),
        ],
    )

"""Prometheus rules as typed Python: what is recorded, what alerts, and the thresholds from `[monitoring]`."""

from __future__ import annotations

from monitoring.rules.clients import client_alerts
from monitoring.rules.deadline import deadline_alerts
from monitoring.rules.gpu import gpu_alerts
from monitoring.rules.models import model_alerts
from monitoring.rules.recorded import recorded_group
from monitoring.rules.rule import Alert, Group
from monitoring.rules.servers import server_alerts
from tickserve.config import MonitoringSettings


def groups(settings: MonitoringSettings) -> tuple[Group, ...]:
    """Every group of rules; one becomes one file."""
    return (
        recorded_group(settings),
        deadline_alerts(settings),
        server_alerts(settings),
        client_alerts(settings),
        model_alerts(settings),
        gpu_alerts(settings),
    )


def alerts(settings: MonitoringSettings) -> dict[str, Alert]:
    """Every alert by its name."""
    return {rule.alert: rule for group in groups(settings) for rule in group.rules if isinstance(rule, Alert)}

"""Grafana dashboards as typed Python; every panel's query is PromQL that a test sends to a real Prometheus."""

from __future__ import annotations

from monitoring.dashboards.capacity import capacity
from monitoring.dashboards.gpu import gpu
from monitoring.dashboards.models import models
from monitoring.dashboards.panel import Dashboard
from monitoring.dashboards.serving import serving
from monitoring.dashboards.trading import trading
from tickserve.config import MonitoringSettings


def dashboards(settings: MonitoringSettings) -> tuple[Dashboard, ...]:
    """Every dashboard, with the limits of its alerts drawn in."""
    return (serving(settings), models(settings), trading(settings), gpu(settings), capacity(settings))

"""Alerts on what the engines' clients say: errors, fallbacks, stale events, observations lost."""

from __future__ import annotations

from monitoring.rules.rule import Alert, Group, number
from monitoring.rules.series import CALLS, OK, Series
from tickserve.config import MonitoringSettings


def client_alerts(settings: MonitoringSettings) -> Group:
    """Every alert on the clients."""
    alerts = [*_shares(settings), _event_age(settings), _lost(settings), *_watched(settings)]
    return Group("tickserve-clients", alerts)


def _shares(settings: MonitoringSettings) -> list[Alert]:
    series = Series(settings)
    over = f"{{{{ $value | humanizePercentage }}}} of calls over {series.window}"
    return [
        Alert(
            alert="TickserveClientErrors",
            severity="critical",
            expr=f"{series.share('client_error')} > {number(settings.error_ratio)}",
            after_s=settings.page_after_s,
            summary="Engines get errors from {{ $labels.model }}",
            description=f"{over} failed: on the way, in the server, or with no replica alive.",
            keys=("error_ratio", "window_s", "page_after_s"),
        ),
        Alert(
            alert="TickserveInputsRejected",
            severity="warning",
            expr=f"{series.share('rejected_input')} > {number(settings.error_ratio)}",
            after_s=settings.page_after_s,
            summary="Engines send {{ $labels.model }} what it refuses",
            description=f"{over} were refused before they were sent: their input breaks the manifest's contract.",
            keys=("error_ratio", "window_s", "page_after_s"),
        ),
        Alert(
            alert="TickserveFallbacks",
            severity="critical",
            expr=f"{series.share('fallback')} > {number(settings.fallback_ratio)}",
            after_s=settings.page_after_s,
            summary="Engines trade on the fallback of {{ $labels.model }}",
            description=f"{over} were answered by the fallback and not by the model.",
            keys=("fallback_ratio", "window_s", "page_after_s"),
        ),
        Alert(
            alert="TickserveStale",
            severity="critical",
            expr=f"{series.share('stale')} > {number(settings.stale_ratio)}",
            after_s=settings.page_after_s,
            summary="Features for {{ $labels.model }} are too old to score",
            description=f"{over} got no number, because their newest event was too old.",
            keys=("stale_ratio", "window_s", "page_after_s"),
        ),
    ]


def _event_age(settings: MonitoringSettings) -> Alert:
    series = Series(settings)
    return Alert(
        alert="TickserveEventAge",
        severity="warning",
        expr=f"{series.quantile('event_age_seconds', 'p99')} > {number(settings.event_age_s)}",
        after_s=settings.page_after_s,
        summary="Events reach {{ $labels.model }} late",
        description="The newest event of one call in a hundred is older than {{ $value | humanizeDuration }},"
        f" over {series.window}.",
        keys=("event_age_s", "window_s", "page_after_s"),
    )


def _lost(settings: MonitoringSettings) -> Alert:
    series = Series(settings)
    return Alert(
        alert="TickserveObservationsLost",
        severity="warning",
        expr=f"increase(tickserve_client_lost_total[{series.window}]) > 0",
        after_s=0,
        summary="{{ $labels.instance }} loses observations",
        description=f"{{{{ $value | humanize }}}} calls are missing from its metrics, over {series.window};"
        " its other numbers are too low.",
        keys=("window_s",),
    )


def _watched(settings: MonitoringSettings) -> list[Alert]:
    series = Series(settings)
    return [
        Alert(
            alert="TickserveClientDown",
            severity="critical",
            expr=f'up{{job=~"{settings.client_jobs}"}} == 0',
            after_s=settings.page_after_s,
            summary="The metrics of the engine {{ $labels.instance }} are gone",
            description="Prometheus could not scrape it: the engine has ended, hangs, or serves no metrics.",
            keys=("client_jobs", "page_after_s"),
        ),
        Alert(
            alert="TickserveClientsUnseen",
            severity="warning",
            # Nothing is scraped that could be down: no target, or another job's.
            expr=f"sum(rate({series.served(OK)}[{series.window}])) > 0\nunless on () count({CALLS})",
            after_s=settings.ticket_after_s,
            summary="Servers answer requests, and no engine's metrics say so",
            description="{{ $value | humanize }} requests a second, and no target reports a call:"
            " deadlines, errors and fallbacks are seen by nobody.",
            keys=("server_jobs", "window_s", "ticket_after_s"),
        ),
    ]
